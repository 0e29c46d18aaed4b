"""What SOUL's released code calculates: rebuilt from its description, and how far it is from the metrics' names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from soul.metrics import soul_release as released
from soul.metrics.membership import auc, lowest_mean
from soul.metrics.tofu import forget_quality, truth_ratio
from soul.types import Row


def make_rows(n: int, seed: int, shift: float = 0.0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        {
            "id": str(i), "subject": "", "prompt": "", "answer": "", "nll": 9.0, "tokens": 3,
            "paraphrased_nll": float(rng.exponential()) + shift, "wrong_nll": rng.exponential(size=5).tolist(),
        }
        for i in range(n)
    ]  # fmt: skip


def test_truth_ratio_is_the_unbounded_arithmetic_one() -> None:
    for row in make_rows(20, 0):
        wrong = row.get("wrong_nll", [])
        plain = sum(math.exp(-x) for x in wrong) / len(wrong) / (math.exp(-row.get("paraphrased_nll", 0.0)) + 1e-12)
        assert released.soul_truth_ratio(row) == pytest.approx(plain, rel=1e-12)
        assert released.soul_truth_ratio(row) == pytest.approx(truth_ratio(row, "arithmetic"), rel=1e-10)
    lost = make_rows(1, 0, shift=1000.0)[0]  # the true answer is impossible: one item of 1e11 or so in a mean
    assert 1e11 < released.soul_truth_ratio(lost) < 1e12
    with pytest.raises(ValueError, match="no wrong answers"):
        released.soul_truth_ratio(Row(id="", subject="", prompt="", answer="", nll=1.0, tokens=1))


def test_forget_quality_compares_two_sets_of_one_model() -> None:
    forget, retain, gold = make_rows(40, 1), make_rows(50, 2), make_rows(40, 3, shift=2.0)
    sides = [[released.soul_truth_ratio(row) for row in side] for side in (forget, retain)]
    expected: Any = scipy_stats.ks_2samp(sides[0], sides[1])
    assert released.soul_fq(forget, retain) == pytest.approx(expected.pvalue)
    # a model that forgot nothing passes, and the retrained one fails its test
    assert released.soul_fq(forget, retain) > 0.05 > released.soul_fq(gold, retain)
    assert forget_quality(forget, gold)[1] < 0.05 < forget_quality(gold, gold)[1]


def test_min_k_and_its_empty_mean() -> None:
    logps = [-3.0, -1.0, -2.0, -4.0, -5.0]
    assert released.soul_min_k(logps, 0.4) == 4.5 == -lowest_mean(logps, 0.4)
    assert math.isnan(released.soul_min_k([-1.0], 0.6))
    assert lowest_mean([-1.0], 0.6) == -1.0


@pytest.mark.parametrize(("forget", "test"), [(400, 217), (40, 217), (5, 5)])
def test_mia_has_labels_in_another_order_than_data(forget: int, test: int) -> None:
    rng = np.random.default_rng(forget)
    values = [*rng.normal(size=forget).tolist(), *rng.normal(1, size=test).tolist()]
    labels = [0] * test + [1] * forget
    pairs = [(a > b) + 0.5 * (a == b) for a, x in zip(values, labels, strict=True) if x
             for b, y in zip(values, labels, strict=True) if not y]  # fmt: skip
    assert released.soul_mia(values[:forget], values[forget:]) == pytest.approx(sum(pairs) / len(pairs))


def test_mia_cannot_tell_perfect_memorisation() -> None:
    known, other = np.random.default_rng(0).uniform(0, 1, 400), np.random.default_rng(1).uniform(2, 3, 217)
    assert auc(-known, -other) == 1.0
    assert released.soul_mia(known, other) == pytest.approx(0.771, abs=0.03)
    assert released.soul_mia(other.max() + 1 + known, other) == pytest.approx(0.229, abs=0.03)


def test_accuracies() -> None:
    assert released.soul_substring_accuracy("The CAPITAL is Paris.", "paris") == 1
    assert released.soul_substring_accuracy("Not Paris!", "Paris") == 1
    assert released.soul_substring_accuracy("The city of light", "Paris") == 0
    assert released.soul_substring_accuracy("anything", "") == 1
    assert released.soul_nearest_accuracy([0.1, 0.2]) == 0
    assert released.soul_nearest_accuracy([0.2, 0.2, 0.1]) == 1


def test_toxicity_takes_the_highest_of_all_labels() -> None:
    scores = [{"toxic": 0.1, "insult": 0.9}, {"toxic": 0.5, "insult": 0.2}]
    assert released.soul_toxicity(scores) == (0.5, pytest.approx(0.7))
    with pytest.raises(ValueError, match="at least one text"):
        released.soul_toxicity([])


def test_bleu_is_a_mean_of_corpora_of_one() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, answers = ["a small boat on the river", "paris"], ["a boat on the river bank", "paris"]
    each = [sacrebleu.corpus_bleu([t], [[a]]).score for t, a in zip(texts, answers, strict=True)]
    assert released.soul_bleu(texts, answers) == pytest.approx(sum(each) / 2)
    assert each[1] == 0  # one word has no pairs of words
    with pytest.raises(ValueError, match="at least one generation"):
        released.soul_bleu([], [])
