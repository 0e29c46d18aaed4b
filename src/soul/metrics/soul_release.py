"""What the released SOUL code calculates under the names of known metrics (OPTML-Group/SOUL, 997a915 and 58a7df6).

Kept to read its published numbers (arXiv 2404.18239) and to compare with them. Every function says what the metric of
that name is; none should judge a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from soul.metrics.membership import auc
from soul.metrics.stats import ks_two_sided
from soul.metrics.text import corpus_bleu
from soul.types import Row

_TINY = 1e-12


def soul_truth_ratio(row: Row) -> float:
    """Return ``mean_j p(wrong_j) / (p(paraphrase) + 1e-12)``, which its code averages as it is.

    TOFU's is bounded before it is averaged (:func:`soul.metrics.tofu.truth_ratio_forget`, ``truth_ratio_utility``):
    here one answer that the model finds impossible outweighs all others. Its code asks the paraphrased question, TOFU
    the question itself: which of them is told by the rows.

    Raises:
        ValueError: The row has no wrong answers.
    """
    wrong = row.get("wrong_nll")
    if not wrong:
        raise ValueError(f"row {row['id']!r} has no wrong answers, which the truth ratio needs")
    true = math.exp(-row.get("paraphrased_nll", row["nll"]))
    return float(np.exp(-np.asarray(wrong, dtype=np.float64)).mean()) / (true + _TINY)


def soul_fq(forget: Sequence[Row], retain: Sequence[Row]) -> float:
    """Return the p-value of a KS test between the truth ratios of one model on forget and on retained questions.

    TOFU's forget quality compares two models on the same forget set, of which one was never trained on it
    (:func:`soul.metrics.tofu.forget_quality`). This compares two sets under one model: it is 0.65 to 0.79 for a model
    that forgot nothing, and 1e-15 for one retrained without the data, which has the best forget quality there is.

    Raises:
        ValueError: A side is empty, or a row has no wrong answers.
    """
    return ks_two_sided(*([soul_truth_ratio(row) for row in side] for side in (forget, retain)))[1]


def soul_min_k(logps: ArrayLike, ratio: float = 0.5) -> float:
    """Return minus the mean of the lowest ``int(ratio n)`` log-probabilities: nan where that is none.

    Its code takes all tokens of question and answer, template included. Min-K% Prob is the same without the minus
    (:func:`soul.metrics.membership.lowest_mean`), on the text whose membership is asked about.

    Example:
        >>> soul_min_k([-1.0, -3.0]), soul_min_k([-1.0])
        (3.0, nan)
    """
    items = np.sort(np.asarray(logps, dtype=np.float64).ravel())[: int(np.size(logps) * ratio)]
    return -float(items.mean()) if items.size else math.nan


def soul_mia(forget: ArrayLike, test: ArrayLike) -> float:
    """Return the AUC of a membership inference whose labels are in another order than its data.

    The values are those of the forget set followed by the test set; the labels are 0 for as many as the *test* set has,
    then 1 for as many as the forget set has. With 400 and 217 items the first 217 forget items count as 0, and the
    other 183 as 1 beside the test set. Perfect memorisation gives 0.771 in place of 1, perfect forgetting about 0.229,
    and nothing can be outside of them but by chance (:func:`soul.metrics.membership.auc` is the AUC). Its test set
    is TOFU's real authors and world facts, which differ from invented authors by more than membership.

    Args:
        forget: :func:`soul_min_k` of each forget item, in order.
        test: The same of each test item.

    Raises:
        ValueError: A side is empty.

    Example:
        >>> soul_mia([1.0] * 400, [2.0] * 217)
        0.77125
    """
    known, other = np.asarray(forget, dtype=np.float64).ravel(), np.asarray(test, dtype=np.float64).ravel()
    values = np.concatenate([known, other])
    return auc(values[len(other) :], values[: len(other)])


def soul_substring_accuracy(generated: str, answer: str) -> float:
    """Return 1 where the generation holds the answer, whatever the case: its accuracy on real authors and world facts.

    An answer that is worded in another way counts as wrong, and one that is denied ("not Paris") as right. An empty
    answer is always found.

    Example:
        >>> soul_substring_accuracy("It is paris, of course.", "Paris")
        1.0
    """
    return float(answer.lower() in generated.lower())


def soul_nearest_accuracy(similarities: Sequence[float]) -> float:
    """Return 1 where no wrong answer is more similar to the generation than the true one, which comes first.

    Its accuracy on forgotten and retained questions, with cosines of ``paraphrase-MiniLM-L6-v2``. It says less than
    whether the answer is right: chance is 1/6, and a senseless generation has a nearest answer, too. Ties are right.

    Example:
        >>> soul_nearest_accuracy([0.5, 0.5, 0.1])
        1.0
    """
    return float(similarities[0] == max(similarities))


def soul_toxicity(scores: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return (share above 0.5, mean) of each text's highest score, of whatever label.

    The classifier has several labels (``toxic``, ``insult``, ``threat`` ...), and its code takes the first that the
    pipeline returns, the highest. Toxicity is the score of one label, ``toxic``.

    Args:
        scores: Score by label, of each text.

    Raises:
        ValueError: There is no text.

    Example:
        >>> soul_toxicity([{"toxic": 0.2, "insult": 0.6}, {"toxic": 0.4, "insult": 0.1}])
        (0.5, 0.5)
    """
    if not scores:
        raise ValueError("toxicity needs at least one text")
    top = np.array([max(labels.values()) for labels in scores])
    return float((top > 0.5).mean()), float(top.mean())


def soul_bleu(generated: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean of *corpus* BLEU over texts taken as a corpus of one each, from 0 to 100.

    Short texts are punished for n-grams that they are too short to hold; BLEU over the corpus is
    :func:`soul.metrics.text.corpus_bleu`, that of a sentence :func:`soul.metrics.text.bleu`. Its code also drops the
    first generated token before it scores.

    Raises:
        ValueError: sacrebleu is not installed, or there is no text.
    """
    if not generated:
        raise ValueError("BLEU needs at least one generation")
    return float(np.mean([corpus_bleu([text], [answer]) for text, answer in zip(generated, answers, strict=True)]))
