"""The search for the longest step within bounds."""

from __future__ import annotations

import math

import pytest

from soul.methods.step_size import Bounds, Trial, longest


def quadratic(cost: float, gain: float = 0.0, offset: float = 0.0):
    """A step whose KL is quadratic and whose NLL is linear in its length, with a list of what was asked."""
    asked: list[float] = []

    def measure(alpha: float) -> Trial:
        asked.append(alpha)
        return Trial(alpha, (offset + math.sqrt(cost) * alpha) ** 2, gain * alpha)

    return measure, asked


@pytest.mark.parametrize("first", [1e-9, 1e-3, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_a_quadratic_is_filled_from_any_start(first, offset):
    measure, asked = quadratic(4.0, offset=offset)
    bounds = Bounds(kl=0.09, kl_before=offset**2)
    found = longest(measure, first, bounds, trials=30)
    assert found is not None
    assert 0.081 <= found.kl <= 0.09
    if 1e-3 <= first <= 1:
        assert len(asked) <= 8


def test_a_good_guess_costs_one_trial_and_a_fair_one_two():
    for first, most in ((0.147, 1), (0.2, 2)):
        measure, asked = quadratic(4.0)
        assert longest(measure, first, Bounds(kl=0.09)) is not None
        assert len(asked) <= most


def test_the_target_is_not_overshot():
    measure, _ = quadratic(1.0, gain=100.0)
    found = longest(measure, 0.9, Bounds(kl=1.0, nll=3.0), trials=20)
    assert found is not None
    assert 3.0 <= found.nll <= 3.3
    assert found.kl < 0.01


def test_the_budget_comes_before_the_target():
    measure, _ = quadratic(1.0, gain=1.0)
    found = longest(measure, 10.0, Bounds(kl=0.25, nll=3.0), trials=20)
    assert found is not None
    assert 0.225 <= found.kl <= 0.25


def test_a_longest_step_is_kept_to():
    measure, asked = quadratic(1.0)
    found = longest(measure, 100.0, Bounds(kl=1.0, alpha=0.01))
    assert found is not None
    assert found.alpha == 0.01
    assert asked == [0.01]
    measure, asked = quadratic(1.0)
    found = longest(measure, 100.0, Bounds(kl=1.0, alpha=50.0))  # too long: shortened as any other
    assert found is not None
    assert 0.9 <= found.kl <= 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_a_number_goes_too_far(broken):
    def measure(alpha: float) -> Trial:
        return Trial(alpha, broken if alpha > 0.5 else alpha**2, 0.0)

    found = longest(measure, 1000.0, Bounds(kl=1.0), trials=20)
    assert found is not None
    assert 0.25 < found.alpha <= 0.5
    nothing = longest(lambda a: Trial(a, broken, broken), 1.0, Bounds(kl=1.0))
    assert nothing is None


def test_a_jump_is_closed_in_on():
    """The KL leaps over the bound: the search ends below the leap, near it."""

    def measure(alpha: float) -> Trial:
        return Trial(alpha, alpha**2 if alpha < 0.7 else 100.0, 0.0)

    found = longest(measure, 1.0, Bounds(kl=1.0), trials=25)
    assert found is not None
    assert 0.65 < found.alpha < 0.7
