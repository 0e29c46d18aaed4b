"""Membership inference and privacy leakage against plain transcriptions and scikit-learn."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from soul.metrics import membership, privacy
from soul.metrics.membership import attack_values, auc, lowest_mean, membership_scores, tpr_at_fpr
from soul.metrics.privacy import privleak, privleak_score, relative_difference
from soul.types import Row


def make_rows(n: int, seed: int, shift: float = 0.0, subjects: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for i in range(n):
        logps = (-rng.exponential(size=rng.integers(1, 9)) + shift).tolist()
        rows.append(
            {
                "id": str(i),
                "subject": f"{seed}-{i % subjects}" if subjects else "",
                "prompt": f"question {i}",
                "answer": "word " * int(rng.integers(1, 9)),
                "nll": -float(np.mean(logps)),
                "tokens": len(logps),
                "token_logps": logps,
                "token_z": [x + 0.5 for x in logps],
                "gradient_norm": float(rng.exponential()) - shift,
            }
        )
    return rows


def plain_auc(members: list[float], others: list[float]) -> float:
    return sum((a > b) + 0.5 * (a == b) for a in members for b in others) / (len(members) * len(others))


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_all_pairs_and_the_rank_test(ties: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, size=37), rng.normal(size=53)
    if ties:
        a, b = np.round(a), np.round(b)
    assert auc(a, b) == pytest.approx(plain_auc(a.tolist(), b.tolist()), rel=1e-12)
    u = scipy_stats.mannwhitneyu(a, b).statistic
    assert auc(a, b) == pytest.approx(u / (37 * 53), rel=1e-12)
    assert auc(b, a) == pytest.approx(1 - auc(a, b), rel=1e-12)
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, values = np.repeat([1, 0], [37, 53]), np.concatenate([a, b])
    assert auc(a, b) == pytest.approx(sklearn.roc_auc_score(labels, values), rel=1e-12)
    fprs, tprs, _ = sklearn.roc_curve(labels, values, drop_intermediate=False)
    for rate in (0.0, 0.01, 0.1, 0.5, 1.0):
        assert tpr_at_fpr(a, b, rate) == pytest.approx(tprs[fprs <= rate + 1e-12].max(), rel=1e-12)


def test_auc_of_degenerate_sides() -> None:
    assert auc([1.0], [1.0]) == 0.5
    assert auc([2.0], [1.0]) == 1.0
    assert auc([math.inf, -math.inf], [0.0]) == 0.5
    assert math.isnan(auc([math.nan], [0.0]))
    assert math.isnan(tpr_at_fpr([1.0], [math.nan, 0.0]))
    for sides in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="members and non-members"):
            auc(*sides)


def test_true_positives_fall_with_equal_non_members() -> None:
    assert tpr_at_fpr([1.0, 1.0, 2.0], [1.0] + [0.0] * 99, fpr=0.01) == 1.0  # one of a hundred may
    assert tpr_at_fpr([1.0, 1.0, 2.0], [1.0, 1.0] + [0.0] * 98, fpr=0.01) == pytest.approx(1 / 3)
    assert tpr_at_fpr([1.0, 1.0, 2.0], [1.0] + [0.0] * 98, fpr=0.01) == pytest.approx(1 / 3)  # fewer than 100: none
    assert tpr_at_fpr([0.0], [1.0], fpr=1.0) == 1.0
    with pytest.raises(ValueError, match="fpr must be between"):
        tpr_at_fpr([0.0], [1.0], fpr=1.5)


@pytest.mark.parametrize("k", [0.05, 0.2, 0.7, 1.0])
def test_lowest_mean_equals_a_plain_loop(k: float) -> None:
    for n in (1, 2, 7, 10, 100):
        values = np.random.default_rng(n).normal(size=n).tolist()
        count = max(1, [i for i in range(n + 1) if i * 100 <= round(k * 100) * n][-1])
        assert lowest_mean(values, k) == pytest.approx(sum(sorted(values)[:count]) / count, rel=1e-12)


def test_lowest_mean_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        lowest_mean([], 0.2)
    with pytest.raises(ValueError, match="k must be above 0"):
        lowest_mean([1.0], 0)


def test_attacks_equal_their_formulas_and_need_what_they_need() -> None:
    rows = make_rows(6, 0)
    reference = [Row(**{**row, "nll": row["nll"] + i}) for i, row in enumerate(rows)]
    found = attack_values(rows, reference=reference, k=0.5)
    assert tuple(found) == membership.ATTACKS
    measured: Any = rows  # keys that a row need not have
    for i, row in enumerate(measured):
        count = max(1, len(row["token_logps"]) // 2)
        assert found["loss"][i] == -row["nll"]
        assert found["min_k"][i] == pytest.approx(sum(sorted(row["token_logps"])[:count]) / count)
        assert found["min_k_plus"][i] == pytest.approx(found["min_k"][i] + 0.5)
        assert found["zlib"][i] == -row["nll"] / len(zlib.compress(row["answer"].encode("utf-8")))
        assert found["reference"][i] == pytest.approx(i)
        assert found["gradient_norm"][i] == -row["gradient_norm"]
    del rows[3]["token_z"], rows[0]["gradient_norm"]
    assert set(attack_values(rows)) == {"loss", "min_k", "zlib"}
    with pytest.raises(ValueError, match="ask for tokens"):
        membership.min_k_plus_attack(rows[3])
    with pytest.raises(ValueError, match="ask for gradient_norm"):
        membership.gradient_norm_attack(rows[0])
    with pytest.raises(ValueError, match="same examples in the same order"):
        attack_values(rows, reference=reference[::-1])
    with pytest.raises(ValueError, match="at least one row"):
        attack_values([])


def test_scores_have_intervals_over_both_sides() -> None:
    members, others = make_rows(60, 1, shift=0.3, subjects=12), make_rows(50, 2)
    scores = {s.metric: s for s in membership_scores(members, others, resamples=200, fprs=(0.1,), seed=4)}
    assert set(scores) == {
        f"mia_{a}_{m}" for a in membership.ATTACKS if a != "reference" for m in ("auc", "tpr_at_fpr_0.1")
    }
    loss = scores["mia_loss_auc"]
    assert loss.value == plain_auc([-r["nll"] for r in members], [-r["nll"] for r in others])
    assert 0.5 < loss.low < loss.value < loss.high < 1
    assert (loss.n, loss.split, loss.seed) == (110, "forget", 4)
    assert loss.method == "bootstrap(200, 12+50 groups, widened)"  # 12 subjects and 50 rows that have none
    one = membership_scores(members[:1], others[:1], resamples=50)
    assert all(math.isnan(s.low) and s.method == "none" for s in one)


def test_an_interval_of_auc_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, hits = scipy_stats.norm.cdf(0.5 / math.sqrt(2)), 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        sides = [
            [Row(id="", subject="", prompt="", answer="a", nll=float(x), tokens=1) for x in values]
            for values in (rng.normal(-0.5, size=60), rng.normal(size=60))
        ]
        score = membership_scores(sides[0], sides[1], resamples=200, fprs=(), seed=trial)[0]
        hits += score.low <= truth <= score.high
    assert hits >= 34


def test_privacy_leakage_is_that_of_the_paper_and_its_code() -> None:
    unlearned, retrained = 0.9, 0.4
    # MUSE's code puts non-members on the positive side: its AUC is one minus ours
    assert privleak(unlearned, retrained) == pytest.approx(100 * ((1 - 0.9) - (1 - 0.4)) / (1 - 0.4))
    assert privleak(unlearned, retrained, sign="formula") == pytest.approx(100 * (0.9 - 0.4) / 0.4)
    assert privleak(0.999) == pytest.approx(-99.8)  # a model before unlearning
    assert privleak(1.0, 1.0) == 0.0
    assert privleak(0.5, 1.0) == math.inf
    assert math.isnan(privleak(math.nan))
    with pytest.raises(ValueError, match="unknown sign"):
        privleak(0.5, 0.5, sign="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        privleak(-20.0)


def test_relative_difference() -> None:
    assert relative_difference(3.0, 2.0) == 50.0
    assert relative_difference(-3.0, -2.0) == -50.0  # what is lower than its reference is below 0, whatever the sign
    assert relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(1.0, 0.0) == math.inf
    assert relative_difference(-1.0, 0.0) == -math.inf


def test_privacy_leakage_of_rows_compares_the_same_examples() -> None:
    members, others = make_rows(40, 1, shift=0.5), make_rows(40, 2)
    blind = make_rows(40, 1), make_rows(40, 2)
    score = privleak_score(members, others, *blind, k=0.4, resamples=200)

    def area(inside: list[Row], outside: list[Row]) -> float:
        return plain_auc(attack_values(inside)["min_k"], attack_values(outside)["min_k"])

    assert score.value == pytest.approx(privleak(area(members, others), area(*blind)))
    assert score.low < score.value < score.high < 0
    same = privleak_score(members, others, members, others, resamples=50)
    assert same.value == 0.0
    assert math.isnan(same.low)  # 0 in each resample, which is no certainty
    assert privleak_score(members, others, *blind, sign="formula", resamples=50).value > 0
    with pytest.raises(ValueError, match="same examples"):
        privleak_score(members, others, members[::-1], others)
    with pytest.raises(ValueError, match="only loss, "):
        privleak_score(members, others, *blind, attack="reference")
    assert privacy.privleak_score(members, others, *blind, attack="loss", resamples=50).metric == "privleak"
