import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.stats import binomtest

from soul.metrics import tofu
from soul.metrics.membership import auc
from soul.metrics.stats import (
    SHARE,
    bootstrap_mean,
    bootstrap_of,
    expansion,
    expected_best,
    harmonic_mean,
    ks_margin,
    ks_two_sided,
)
from soul.metrics.text import rouge_l_recall
from soul.types import Row


def test_bootstrap_mean_is_deterministic_and_names_its_method():
    values = np.random.default_rng(0).normal(size=50)
    score = bootstrap_mean(values, metric="m", split="s", seed=3, better="lower")
    assert score == bootstrap_mean(values, metric="m", split="s", seed=3, better="lower")
    assert score.value == pytest.approx(values.mean())
    assert (score.n, score.method, score.seed, score.better) == (50, "bootstrap(2000)", 3, "lower")
    other = bootstrap_mean(values, metric="m", split="s", seed=4)
    assert (other.low, other.high) != (score.low, score.high)


def test_bootstrap_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    score = bootstrap_mean(values, metric="m", split="s", resamples=8000)
    half = 1.96 * values.std() / 20
    assert score.low == pytest.approx(values.mean() - half, abs=0.01)
    assert score.high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_mean_in_blocks_gives_the_same_interval(monkeypatch):
    values = np.random.default_rng(1).normal(size=30)
    whole = bootstrap_mean(values, metric="m", split="s", resamples=100)
    monkeypatch.setattr("soul.metrics.stats._DRAWS", 70)
    assert bootstrap_mean(values, metric="m", split="s", resamples=100) == whole


def test_bootstrap_mean_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        score = bootstrap_mean(rng.exponential(size=60), metric="m", split="s", seed=trial, resamples=400)
        hits += score.low <= 1.0 <= score.high
    assert 0.88 <= hits / 300 <= 0.98


def test_one_value_or_nan_has_no_interval():
    for values in ([0.5], [0.5, math.nan]):
        score = bootstrap_mean(values, metric="m", split="s")
        assert math.isnan(score.low)
        assert math.isnan(score.high)
        assert score.method == "none"
    assert math.isnan(bootstrap_of(lambda g: g[0].mean(), [[1.0]], metric="m").low)


def test_bad_input_is_a_value_error():
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_mean([], metric="m", split="s")
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_mean([[1.0, 2.0]], metric="m", split="s")
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean([1.0, 2.0], metric="m", split="s", resamples=0)
    with pytest.raises(ValueError, match="at least one group"):
        bootstrap_of(lambda g: 0.0, [], metric="m")
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_of(lambda g: 0.0, [[1.0], []], metric="m")
    with pytest.raises(ValueError, match="at least one value"):
        ks_two_sided([], [1.0])
    with pytest.raises(ValueError, match="level"):
        ks_margin(3, 3, level=1.0)


def test_bootstrap_of_a_mean_is_bootstrap_mean_in_law():
    values = np.random.default_rng(5).normal(size=80)
    a = bootstrap_mean(values, metric="m", split="s", resamples=5000)
    b = bootstrap_of(lambda groups: groups[0].mean(), [values], metric="m", split="s", resamples=5000)
    assert b.value == pytest.approx(a.value)
    assert b.low == pytest.approx(a.low, abs=0.015)
    assert b.high == pytest.approx(a.high, abs=0.015)


def test_bootstrap_of_keeps_the_columns_of_a_row_together():
    values = np.random.default_rng(6).normal(size=40)
    score = bootstrap_of(
        lambda g: float(np.abs(g[0][:, 0] + g[0][:, 1]).max()), [np.stack([values, -values], axis=1)], metric="m"
    )
    assert (score.value, score.n) == (0.0, 40)
    assert math.isnan(score.high)  # 0 in each resample, too, so that there is no interval


def test_harmonic_mean():
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.3] * 9) == pytest.approx(0.3)
    assert harmonic_mean([0.9, 0.0]) == 0.0
    assert math.isnan(harmonic_mean([0.9, math.nan]))
    values = np.random.default_rng(0).uniform(0.01, 1, size=9)
    assert harmonic_mean(values) == pytest.approx(scipy_stats.hmean(values))
    assert values.min() <= harmonic_mean(values) <= values.mean()
    for bad in ([], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="harmonic"):
            harmonic_mean(bad)


def test_ks_against_a_count_by_hand():
    # a = {1, 2}, b = {3, 4}: 2 of the 6 ways to mix them reach D = 1
    assert ks_two_sided([1, 2], [3, 4]) == pytest.approx((1.0, 2 / 6))
    # a = {1, 3}, b = {2, 4}: D = 1/2, which every mix reaches
    assert ks_two_sided([1, 3], [2, 4]) == pytest.approx((0.5, 1.0))
    # complete separation of 3 and 3: 2 of 20
    assert ks_two_sided([1, 2, 3], [4, 5, 6]) == pytest.approx((1.0, 2 / 20))


def test_ks_is_symmetric_and_knows_only_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=37), rng.normal(0.4, size=52)
    expected = pytest.approx(ks_two_sided(a, b), rel=1e-9)
    assert ks_two_sided(b, a) == expected
    assert ks_two_sided(np.exp(a), np.exp(b)) == expected
    assert ks_two_sided(np.exp(-a), np.exp(-b)) == expected
    assert ks_two_sided(a, a) == (0.0, 1.0)
    assert all(math.isnan(x) for x in ks_two_sided([1.0, math.nan], b))


def test_ks_margin_shrinks_as_the_root_of_n():
    assert ks_margin(400, 400) == pytest.approx(ks_margin(100, 100) / 2)
    assert ks_margin(100, 100) == pytest.approx(2 * math.sqrt(math.log(2 / 0.025) / 200))


def test_rouge_by_hand():
    # stems: she paint a boat / she paint boat -> 3 of 4 in order
    assert rouge_l_recall("She paints boats.", "She painted a boat") == 0.75
    assert rouge_l_recall("the true answer and much more", "The true answer!") == 1.0
    assert rouge_l_recall("answer true the", "the true answer") == pytest.approx(1 / 3)
    assert rouge_l_recall("", "the true answer") == 0.0
    assert rouge_l_recall("anything", "") == 0.0


def plain_cluster_means(values, names, draws):
    """Return the mean of all items in each draw of groups, by loops."""
    order = list(dict.fromkeys(names))
    items = [[v for v, n in zip(values, names, strict=True) if n == name] for name in order]
    means = []
    for picks in draws:
        chosen = [v for g in picks for v in items[g]]
        means.append(sum(chosen) / len(chosen))
    return means


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(5)
    values = rng.normal(size=47)
    names = [f"author {i}" for i in rng.integers(9, size=47)]
    score = bootstrap_mean(values, metric="m", split="s", seed=3, resamples=500, groups=names)
    generator = np.random.default_rng(3)
    draws = [generator.integers(9, size=9) for _ in range(500)]
    means = plain_cluster_means(values.tolist(), names, draws)
    plain = np.quantile(means, [0.025, 0.975]) - values.mean()
    assert (score.low, score.high) == pytest.approx(tuple(values.mean() + expansion(9) * plain))
    assert (score.value, score.n, score.method) == (
        pytest.approx(values.mean()),
        47,
        "bootstrap(500, 9 groups, widened)",
    )


def test_items_that_hang_together_make_wider_intervals():
    rng = np.random.default_rng(6)
    values, names = np.repeat(rng.normal(size=20), 20), np.repeat(np.arange(20), 20).tolist()
    loose, grouped = (bootstrap_mean(values, metric="m", split="s", groups=g) for g in (None, names))
    # twenty independent values, each seen twenty times: the interval is that of the twenty
    assert (grouped.high - grouped.low) / (loose.high - loose.low) == pytest.approx(
        expansion(20) * math.sqrt(20), rel=0.1
    )


def test_names_that_do_not_repeat_or_are_empty_are_items():
    values = [0.1, 0.5, 0.9, 0.3]
    plain = bootstrap_mean(values, metric="m", split="s")
    assert bootstrap_mean(values, metric="m", split="s", groups=["a", "b", "c", "d"]) == plain
    assert bootstrap_mean(values, metric="m", split="s", groups=["", "", "", None]) == plain
    mixed = bootstrap_mean(values, metric="m", split="s", groups=["a", "", "a", ""])
    assert mixed.method == "bootstrap(2000, 3 groups, widened)"
    alone = bootstrap_mean(values, metric="m", split="s", groups=["a"] * 4)
    assert (alone.method, math.isnan(alone.low), alone.n) == ("none", True, 4)
    with pytest.raises(ValueError, match="4 items, but the groups of 3"):
        bootstrap_mean(values, metric="m", split="s", groups=["a"] * 3)


def test_bootstrap_of_draws_clusters_whole():
    seen = []

    def total(groups):
        seen.append([group.tolist() for group in groups])
        return float(groups[0].mean() - groups[1].mean())

    left, right = [1.0, 1.0, 2.0, 3.0], [5.0, 6.0]
    score = bootstrap_of(total, [left, right], metric="m", resamples=50, clusters=[["a", "a", "b", "c"], None])
    assert score.method == "bootstrap(50, 3+2 groups, widened)"
    assert all(drawn.count(1.0) % 2 == 0 and len(other) == 2 for drawn, other in seen)
    assert len({len(drawn) for drawn, _ in seen}) > 1
    flat = bootstrap_of(total, [left, right], metric="m", resamples=50)
    assert flat == bootstrap_of(total, [left, right], metric="m", resamples=50, clusters=[None, ["", ""]])
    assert flat.method == "bootstrap(50)"
    with pytest.raises(ValueError, match="one list, or None, each"):
        bootstrap_of(total, [left, right], metric="m", clusters=[None])


@pytest.mark.parametrize("true", [0.0, 0.5, 3.0, 800.0])
def test_the_three_aggregations_of_a_truth_ratio(true):
    row = Row(id="", subject="", prompt="", answer="", nll=true, tokens=1, wrong_nll=[1.0, 2.0])
    right, wrong = math.exp(-true), math.exp(-1.5)
    ratio = tofu.truth_ratio(row)
    plain = math.inf if right == 0 else wrong / right
    assert ratio == pytest.approx(plain)
    assert tofu.truth_ratio_forget(ratio) == pytest.approx(min(plain, 1 / plain))
    assert tofu.truth_ratio_utility(ratio) == pytest.approx(max(0.0, 1 - plain))
    assert tofu.truth_ratio_share(ratio) == pytest.approx(right / (right + wrong))


@pytest.mark.parametrize("n", range(1, 7))
def test_the_best_of_fewer_trials_is_the_mean_over_all_sets_of_them(n):
    losses = [0.4, 0.1, 0.7, 0.1, 0.3, math.inf if n == 6 else 0.9]
    every = [min(some) for some in itertools.combinations(losses, n)]
    assert expected_best(losses, n) == pytest.approx(sum(every) / len(every))
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="cannot be expected of 6 trials"):
            expected_best(losses, wrong)


@pytest.mark.parametrize("groups", [2, 3, 5, 20, 40])
def test_intervals_over_groups_cover_as_often_as_they_say(groups):
    """New persons, twenty questions each: without the expansion 2 groups cover half of the time."""
    rng = np.random.default_rng(groups)
    names = np.repeat(np.arange(groups), 20).tolist()
    covered = plainly = 0
    for _ in range(300):
        values = rng.normal(size=(groups, 1)) + rng.normal(size=(groups, 20))
        score = bootstrap_mean(values.ravel(), metric="m", split="s", groups=names, resamples=400)
        covered += score.low <= 0 <= score.high
        low, high = (score.value + (end - score.value) / expansion(groups) for end in (score.low, score.high))
        plainly += low <= 0 <= high
    assert plainly / 300 == pytest.approx({2: 0.5, 3: 0.73, 5: 0.85, 20: 0.91, 40: 0.93}[groups], abs=0.06)
    assert 0.88 <= covered / 300 <= 0.99
    shares = bootstrap_mean([0.9] * 20 + [0.8] * 20, metric="m", split="s", groups=names[:40], within=SHARE)
    assert (shares.low, shares.high) == (pytest.approx(0.85 - 0.05 * expansion(2)), 1.0)


@pytest.mark.parametrize("groups", [None, [i // 2 for i in range(8)]])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_seen_is_no_certainty(value: float, groups: list[int] | None) -> None:
    n = 4 if groups else 8
    score = bootstrap_mean([value] * 8, metric="leaked", split="s", groups=groups, within=SHARE)
    exact = binomtest(round(value) * n, n).proportion_ci(0.95, "exact")
    assert (score.low, score.high) == pytest.approx((exact.low, exact.high))
    assert score.method == f"clopper-pearson({n})"


def test_values_that_are_equal_elsewhere_have_no_interval_and_a_scale_is_respected():
    for flat in (
        bootstrap_mean([0.5] * 8, metric="m", split="s", within=SHARE),
        bootstrap_mean([0.0] * 8, metric="m", split="s"),
        bootstrap_mean([0.0] * 8, metric="m", split="s", groups=list("aabbccdd")),
        bootstrap_of(lambda g: float(g[0].mean()), [np.full(8, 0.5)], metric="m", split="s", within=SHARE),
    ):
        assert (flat.value in (0.0, 0.5), flat.n) == (True, 8)
        assert math.isnan(flat.low) and math.isnan(flat.high)  # noqa: PT018 - one statement
    bleu = bootstrap_mean([0.0] * 8, metric="bleu", split="s", within=(0.0, 100.0))
    assert bleu.high == pytest.approx(100 * (1 - 0.025 ** (1 / 8)))


def test_one_cluster_on_a_side_says_nothing_of_others_there():
    groups = [np.linspace(0, 1, 12), np.linspace(0.2, 1.2, 20)]
    clusters = [["one"] * 12, [str(i // 2) for i in range(20)]]
    score = bootstrap_of(lambda g: auc(*g), groups, metric="auc", clusters=clusters, within=SHARE)
    assert math.isnan(score.low) and math.isnan(score.high)  # noqa: PT018 - one statement
    clusters[0] = ["one"] * 6 + ["other"] * 6
    assert bootstrap_of(lambda g: auc(*g), groups, metric="auc", clusters=clusters, within=SHARE).low < score.value


def test_sides_that_do_not_overlap_are_no_certainty_either():
    score = bootstrap_of(lambda g: auc(*g), [np.arange(5.0, 12.0), np.arange(4.0)], metric="auc", within=SHARE)
    assert (score.value, score.high) == (1.0, 1.0)
    assert score.low == pytest.approx(0.025 ** (1 / 4))  # by the smaller side
    assert score.method == "clopper-pearson(4)"


def test_resamples_that_say_nothing_are_left_out():
    def share(groups):
        values = groups[0]
        return float("nan") if (values == 0).all() else float(values.mean())

    score = bootstrap_of(share, [np.array([0.0, 0.0, 1.0])], metric="m")
    assert 0 < score.low < score.high <= 1
