from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import hmean

from soul.metrics import contest
from soul.metrics.contest import Cell, choose, knowledge, point, points_of, sides
from soul.metrics.frontier import (
    forgetting,
    forgetting_at,
    frontier,
    lost_area,
    ratio_interval,
    relative_utility,
    utility,
)
from soul.report.contest import mean_attained


@pytest.mark.parametrize("seed", range(5))
def test_lost_area_is_what_a_fine_grid_counts(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(p) for p in rng.uniform([0, 0.3], [1, 1], size=(rng.integers(1, 9), 2))]
    n = 600
    f, u = np.meshgrid((np.arange(n) + 0.5) / n, 0.5 + 0.5 * (np.arange(n) + 0.5) / n)
    dominated = np.zeros_like(f, dtype=bool)
    for a, b in points:
        dominated |= (f <= a) & (u <= b)
    assert lost_area(points) == pytest.approx(1 - dominated.mean(), abs=4 / n)


def test_what_lies_above_a_figures_curve_is_the_mean_lost_area():
    """Of requests one of which reaches no more than a part."""
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, 2001)
    found = [[tuple(p) for p in rng.uniform([0, 0.4], [share, 1], size=(4, 2))] for share in (1, 0.5, 0.2)]
    above = 1 - (mean_attained(found, grid)[1:].mean() - 0.5) / 0.5
    assert above == pytest.approx(np.mean([lost_area(points) for points in found]), abs=2e-3)


def test_more_points_never_lose_more():
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.uniform(0.4, 1, size=(12, 2))]
    losses = [lost_area(points[:i]) for i in range(len(points) + 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 1
    assert lost_area(frontier(points)) == pytest.approx(losses[-1], abs=1e-15)


def test_useless_models_count_for_nothing():
    assert lost_area([(1.0, 0.5), (0.9, 0.2), (0.0, 1.0)]) == 1
    assert forgetting_at([(0.9, 0.94), (0.3, 0.95)], 0.95) == 0.3


def test_forgetting_ends_where_it_is_clipped():
    assert forgetting(0.9, before=0.8, gold=0.2) == 0
    assert forgetting(0.0, before=0.8, gold=0.2) == 1
    assert forgetting(float("nan"), before=0.8, gold=0.2) == 0
    with pytest.raises(ValueError, match="nothing to forget"):
        forgetting(0.1, before=0.2, gold=0.2)


def test_utility_is_a_ratio_of_harmonic_means():
    before = {"a": 0.9, "b": 0.4, "text_nll": 3.0}
    now = {"a": 0.8, "b": 0.3, "text_nll": 3.2}
    expected = hmean([0.8, 0.3, np.exp(-0.2)]) / hmean([0.9, 0.4, 1.0])
    assert utility(now, before) == pytest.approx(expected, rel=1e-12)
    better = {"a": 1.0, "b": 1.0, "text_nll": 1.0}
    assert utility(better, before) == 1
    assert utility({**now, "text_nll": float("nan")}, before) == 0
    assert utility({**now, "text_nll": 900.0}, before) < 1e-3


def test_relative_utility_lets_no_measure_buy_anothers_loss():
    before = {"kept": 0.89, "authors": 0.43, "facts": 0.28, "text_nll": 3.0}
    now = {**before, "kept": 0.445, "facts": 0.30}
    assert relative_utility(now, before) == pytest.approx(hmean([0.5, 1, 1, 1]), rel=1e-12)
    assert utility(now, before) > 0.9 > relative_utility(now, before)
    assert relative_utility(before, before) == 1
    assert relative_utility({**before, "text_nll": -2000.0}, before) == 1
    assert relative_utility({**before, "new": 0.0}, {**before, "new": 0.0}) == 1
    assert relative_utility({**before, "kept": 0.0}, before) == 0
    assert relative_utility({**before, "text_nll": float("nan")}, before) == 0
    assert relative_utility({**before, "text_nll": 3.5}, before) == pytest.approx(hmean([1, 1, 1, np.exp(-0.5)]))


def test_ratio_interval_takes_every_resample_of_few_requests():
    a, b = [1.0, 2.0, 4.0], [2.0, 2.0, 5.0]
    draws = [
        np.mean([a[i] for i in pick]) / np.mean([b[i] for i in pick]) for pick in itertools.product(range(3), repeat=3)
    ]
    value, low, high = ratio_interval(a, b)
    assert value == pytest.approx(7 / 9)
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert ratio_interval([0.5] * 9, [1.0] * 9) == (0.5, 0.5, 0.5)
    value, low, high = ratio_interval([0.3], [0.25])  # a single request says nothing of others
    assert value == pytest.approx(1.2)
    assert math.isnan(low) and math.isnan(high)  # noqa: PT018 - one statement: there is no interval
    with pytest.raises(ValueError, match="same requests"):
        ratio_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same requests"):
        ratio_interval([1.0])


def test_of_several_others_the_best_of_each_resample_counts():
    a, b, c = [4.0, 2.0, 4.0], [9.0, 1.0, 2.0], [1.0, 8.0, 4.0]
    picks = [list(pick) for pick in itertools.product(range(3), repeat=3)]
    draws = [np.mean(np.take(a, pick)) / min(np.mean(np.take(b, pick)), np.mean(np.take(c, pick))) for pick in picks]
    value, low, high = ratio_interval(a, b, c)
    assert value == pytest.approx(10 / 12)
    assert high == pytest.approx(np.quantile(draws, 0.975))
    assert high > ratio_interval(a, b)[2]  # who is best is not known
    assert low == ratio_interval(a, b)[1]
    assert ratio_interval([0.3], [0.5], [0.25])[0] == pytest.approx(1.2)


def covered(alone: float, sides: int = 1) -> float:
    """Return how many of 300 contests' intervals hold the true ratio.

    Requests of unequal difficulty, the same for both sides, a ratio of exp(-.7) where both lose, and one side that
    loses nothing on all requests but a share ``alone``. Of several other sides all are as good in truth.
    """
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        difficulty = rng.normal(0, 0.3, 5)
        one = np.exp(rng.normal(-0.7, 0.3, 5) + difficulty) * (rng.random(5) < alone)
        others = [np.exp(rng.normal(0, 0.3, 5) + difficulty).tolist() for _ in range(sides)]
        _, low, high = ratio_interval(one.tolist(), *others)
        hits += low <= alone * np.exp(-0.7) <= high
    return hits / 300


@pytest.mark.parametrize(("alone", "expected"), [(1.0, 0.83), (0.4, 0.83), (0.2, 0.71)])
def test_an_interval_of_five_requests_covers_what_the_docs_say(alone, expected):
    assert covered(alone) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("sides", "expected"), [(2, 0.83), (6, 0.78)])
def test_the_best_of_several_is_covered_as_the_docs_say(sides, expected):
    assert covered(1.0, sides=sides) == pytest.approx(expected, abs=0.01)


def values(known: float, kept: float) -> dict[str, float]:
    names = dict.fromkeys(("paraphrased_probability", "extraction_strength", "paraphrased_rougeL"), known)
    return {**names, "forget_probability": 0.1, "seen_probability": 0.2, "unseen_probability": kept, "text_nll": 3.0}


def lines_of(trials: list[list[tuple[float, float]]]) -> list[dict]:
    references = [
        {"kind": "reference", "task": "t", "request": "r", "which": w, "thin": v, "full": v}
        for w, v in (("before", values(1.0, 1.0)), ("gold", values(0.0, 1.0)))
    ]
    head = {"kind": "tune", "task": "t", "request": "r", "objective": "o", "optimizer": "x", "state": "done"}
    measures = [[{"step": 1, "share": 1.0, "values": values(1 - f, k)} for f, k in trial] for trial in trials]
    return references + [{**head, "point": i, "measures": m} for i, m in enumerate(measures)]


CELL = Cell("t", "o", "x")


def test_points_come_from_the_record():
    lines = lines_of([[(0.25, 1.0), (0.75, 0.5)]])
    found = points_of(lines, CELL, "tune", "r")
    # harmonic mean of .5 and 1 is 2/3; what is not to be kept has no part in it
    assert np.array(found) == pytest.approx(np.array([(0.25, 1.0), (0.75, 2 / 3)]))
    assert knowledge(values(0.3, 1), full=True) == pytest.approx(0.3)
    references = {"before": values(1.0, 1.0), "gold": values(0.0, 1.0)}
    broken = {**values(0.25, 0.5), "text_nll": None, "extraction_strength": None}  # a lost model's record
    assert point(broken, references, full=True) == (0.0, 0.0)
    assert point(values(0.25, 0.5), references, full=True) == pytest.approx((0.75, 2 / 3))


def test_the_pair_that_loses_least_together_is_chosen():
    rng = np.random.default_rng(3)
    trials = [[tuple(p) for p in rng.uniform([0, 0.5], [1, 1], size=(3, 2))] for _ in range(6)]
    lines = lines_of(trials)
    best = min(
        itertools.combinations(range(6), 2),
        key=lambda pair: lost_area([p for i in pair for p in points_of(lines, CELL, "tune", "r", [i])]),
    )
    assert choose(lines, CELL, ["r"], 6, 2) == list(best)
    assert choose(lines, CELL, ["r"], 7, 2) is None  # one is still to come


def test_a_further_setting_joins_only_where_it_gains_something():
    lines = lines_of([[(0.5, 0.9)], [(1.0, 1.0)], [(0.7, 0.9)]])
    assert choose(lines, CELL, ["r"], 3, 2) == [1]


def test_an_order_without_entries_has_no_best_cell():
    lines = lines_of([[(0.25, 1.0)], [(0.75, 1.0)]])
    reports = [{**x, "kind": "report"} for x in lines if x["kind"] == "tune"]
    found = sides([*lines, *reports], {CELL: [0, 1]}, {"x": "first", "y": "second"}, ["r"])
    assert found == {"first": (CELL, 1)}


def test_a_broken_record_is_told(tmp_path):
    file = tmp_path / "trials.jsonl"
    file.write_text('{"key": "a", "x": 1}\n{"key": "a", "x": 2}\n{"key": "b"')
    assert contest.read_lines(file) == [{"key": "a", "x": 1}]  # the first of a job; a torn last line is none
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1"):
        contest.read_lines(file)
