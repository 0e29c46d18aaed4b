import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from soul.metrics.stats import bootstrap_mean, bootstrap_of, harmonic_mean, ks_margin, ks_two_sided
from soul.metrics.text import rouge_l_recall


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
    assert (score.low, score.high, score.n) == (0.0, 0.0, 40)


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
