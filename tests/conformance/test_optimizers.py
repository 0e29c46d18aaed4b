"""What every registered optimizer must do, whatever its rule. What does not apply to whom: optimizer_tasks.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from optimizer_tasks import (
    LR,
    Classifier,
    LeastSquares,
    Logistic,
    assert_same,
    build,
    differ,
    exact_tunings,
    make,
    names,
    tunings,
)
from torch import nn

from soul import config
from soul.optim.base import UpdateRule
from soul.registry import OPTIMIZERS

# What a spec is


@pytest.mark.parametrize("name", names())
def test_spec_is_a_frozen_record(name: str) -> None:
    spec = make(name)
    assert type(spec).name == name
    assert len(OPTIMIZERS.summary(name)) > 20
    assert config.component(OPTIMIZERS, config.plain(spec), "") == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", names())
def test_spec_hands_its_settings_to_the_rule(name: str) -> None:
    spec = dataclasses.replace(OPTIMIZERS.get(name)(), lr=0.125, weight_decay=0.25)
    problem = Classifier()
    for group in spec.build(problem.model.parameters(), problem.model).param_groups:
        assert group["lr"] == 0.125
        assert group["weight_decay"] == 0.25
        for field, value in spec.settings().items():
            assert group.get(field, value) == value


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan")])
def test_refuses_a_learning_rate_of_zero_or_less(name: str, lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        make(name, lr=lr)


@pytest.mark.parametrize("name", names())
def test_refuses_a_negative_weight_decay(name: str) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        make(name, weight_decay=-0.1)


@pytest.mark.parametrize("name", names())
def test_builds_an_update_rule_that_has_nothing_to_say_yet(name: str) -> None:
    spec, rule = build(name, Classifier())
    assert isinstance(rule, UpdateRule)
    assert isinstance(rule, torch.optim.Optimizer)
    assert hasattr(spec, "curvature") == spec.needs_curvature
    assert rule.metrics() == {}
    assert rule.predicted_kl() is None


# What it does to a loss


@pytest.mark.parametrize("name", names())
def test_solves_logistic_regression(name: str) -> None:
    best, start = Logistic().best(), float(Logistic().loss().detach())
    left = []
    for spec in tunings(name, (0.1, 1.0, 0.3, 0.03, 10.0)):
        problem = Logistic()
        rule = spec.build(problem.model.parameters(), problem.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / 150)
        for step in range(150):
            problem.run(spec, rule, 1, step)
            schedule.step()
        left.append((float(problem.loss().detach()) - best) / (start - best))
        if left[-1] < 0.1:
            break
    assert -1e-9 < min(left) < 0.1


SGD_STEPS: dict[bool, int] = {}


def sgd_steps(rotated: bool) -> int:
    """Return how many steps SGD needs with the best of its learning rates and momenta."""
    if rotated not in SGD_STEPS:
        fewest = 600
        for momentum in (0.96, 0.9, 0.98, 0.0):
            for rate in (3.5, 1.8, 1.0, 0.3):
                problem = LeastSquares(rotated=rotated)
                target = 1e-6 * float(problem.loss().detach())
                fewest = min(fewest, problem.steps_to(make("sgd", lr=rate, momentum=momentum), target, fewest - 1))
        SGD_STEPS[rotated] = fewest
    return SGD_STEPS[rotated]


@pytest.mark.parametrize("name", names("second_order"))
def test_curvature_saves_steps_where_the_condition_is_bad(name: str) -> None:
    """Condition number 1e4: a fifth of the steps of SGD, both with the best of their rates and momenta.

    The axes of the input are the eigenvectors of the curvature for rules that know only a diagonal.
    """
    rotated = make(name).needs_modules
    steps = sgd_steps(rotated) // 5
    ratios = []
    for spec in exact_tunings(name, (0.1, 0.3, 0.2)):
        problem = LeastSquares(rotated=rotated)
        start = float(problem.loss().detach())
        ratios.append(problem.loss_after(spec, steps) / start)
        if ratios[-1] <= 1e-6:
            break
    assert min(ratios) <= 1e-6


@pytest.mark.parametrize("name", names())
def test_is_deterministic(name: str) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # what went on before must not matter
        problem = Classifier()
        spec, rule = build(name, problem, weight_decay=0.1)
        problem.run(spec, rule, 12)
        results.append(problem.weights())
    assert differ(results[0], Classifier().weights())
    assert_same(*results)


@pytest.mark.parametrize("name", names())
def test_low_precision_parameters_stay_so_and_learn(name: str) -> None:
    problem = Classifier(torch.bfloat16)
    spec, rule = build(name, problem)
    before = float(problem.loss().detach())
    problem.run(spec, rule, 30)
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in problem.model.parameters())
    assert float(problem.loss().detach()) < before


@pytest.mark.parametrize("name", names())
def test_ascends_where_told_to(name: str) -> None:
    """``maximize`` is the same as turning the sign of every gradient, once."""
    results = []
    for maximize in (False, True):
        problem = Classifier()
        spec = make(name, lr=LR, weight_decay=0.1)
        rule = spec.build([{"params": list(problem.model.parameters()), "maximize": maximize}], problem.model)
        for step in range(6):
            problem.bring_curvature(spec, rule, step)
            (problem.loss() * (1 if maximize else -1)).backward()
            before = [p.grad.clone() for p in problem.model.parameters() if p.grad is not None]
            rule.step()
            assert_same([p.grad for p in problem.model.parameters() if p.grad is not None], before)
            rule.zero_grad()
        results.append(problem.weights())
    assert_same(*results)


@pytest.mark.parametrize("name", names())
def test_zero_gradients_move_nothing(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    problem.bring_curvature(spec, rule, 0)
    for p in problem.model.parameters():
        p.grad = torch.zeros_like(p)
    before = problem.weights()
    rule.step()
    assert_same(problem.weights(), before)
    problem.run(spec, rule, 2, 1)
    assert all(bool(p.isfinite().all()) for p in problem.model.parameters())


@pytest.mark.parametrize("name", names())
def test_curvature_alone_moves_nothing(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    before = problem.weights()
    for step in range(3):
        problem.bring_curvature(spec, rule, step)
    assert_same(problem.weights(), before)


@pytest.mark.parametrize("name", names("estimates"))
def test_an_estimate_is_as_good_as_its_root(name: str) -> None:
    """``update_curvature({p: h})`` and ``p.grad = sqrt(h); update_curvature()`` say the same."""
    results = []
    for explicit in (False, True):
        problem = Classifier(torch.float64)
        _, rule = build(name, problem)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            roots = {p: torch.rand(p.shape, generator=generator).double() for p in problem.model.parameters()}
            for p, root in roots.items():
                p.grad = None if explicit else root
            rule.update_curvature({p: root.square() for p, root in roots.items()} if explicit else None)
            rule.zero_grad()
            problem.loss().backward()
            rule.step()
        results.append(problem.weights())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# How it is driven


@pytest.mark.parametrize("name", names())
def test_schedulers_drive_the_learning_rate(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.0 if step == 1 else 1.0)
    problem.run(spec, rule, 1)
    scheduler.step()
    before = problem.weights()
    problem.run(spec, rule, 1, start=1)
    assert_same(problem.weights(), before)
    scheduler.step()
    problem.run(spec, rule, 1, start=2)
    assert differ(problem.weights(), before)


@pytest.mark.parametrize("name", names())
def test_a_tensor_is_a_learning_rate_too(name: str) -> None:
    results = []
    for tensor in (False, True):
        problem = Classifier()
        spec = make(name, lr=0.5, weight_decay=0.1)
        lr: Any = torch.tensor(0.02) if tensor else 0.02
        rule = spec.build([{"params": list(problem.model.parameters()), "lr": lr}], problem.model)
        problem.run(spec, rule, 2)
        for group in rule.param_groups:  # as a scheduler would, in place
            group["lr"] = group["lr"].fill_(0.01) if tensor else 0.01
        problem.run(spec, rule, 2, start=2)
        results.append(problem.weights())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", names())
def test_closure_gives_the_loss(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    problem.run(spec, rule, 1)
    problem.bring_curvature(spec, rule, 1)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        rule.zero_grad()
        loss = problem.loss()
        loss.backward()
        calls.append(float(loss.detach()))
        return calls[-1]

    with torch.no_grad():
        assert rule.step(closure) == calls[0]
    assert len(calls) == 1
    assert float(problem.loss().detach()) < calls[0]


@pytest.mark.parametrize("name", names())
def test_hooks_run_once_around_a_step(name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.Muon):
        cls([p], lr=0.1)  # torch wraps the step of a class when it is first used, which must not make hooks run twice
    problem = Classifier()
    spec, rule = build(name, problem)
    seen: list[tuple[str, list[torch.Tensor]]] = []
    rule.register_step_pre_hook(lambda *_: seen.append(("before", problem.weights())))
    rule.register_step_post_hook(lambda *_: seen.append(("after", problem.weights())))
    start = problem.weights()
    problem.run(spec, rule, 2)
    assert [when for when, _ in seen] == ["before", "after", "before", "after"]
    assert_same(seen[0][1], start)
    assert differ(seen[1][1], start)
    assert_same(seen[3][1], problem.weights())


@pytest.mark.parametrize("name", names())
def test_a_step_is_told_nothing_but_gradients(name: str) -> None:
    """Trainers, scalers and engines call ``step()``; what they pack around a rule may call it group by group."""
    problem = Classifier()
    spec, rule = build(name, problem)
    problem.bring_curvature(spec, rule, 0)
    problem.loss().backward()
    rule.zero_grad(set_to_none=True)
    before = problem.weights()
    rule.step()  # no gradients at all
    assert_same(problem.weights(), before)
