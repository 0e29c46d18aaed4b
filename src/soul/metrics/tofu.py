"""TOFU's probability, truth ratio, model utility and forget quality (arXiv 2401.06121), as functions of measured rows.

TOFU's repository (locuslab/tofu) holds two definitions of model utility, which differ in how the truth ratio averages
over wrong answers:

* ``"leaderboard"``, in ``aggregate_eval_stat.py``: the geometric mean of their probabilities. The published table is
  made by this one.
* ``"eval_code"``, in ``utils.py:get_model_utility``: the arithmetic mean, as in the paper's equation 1.

Both files compare truth ratios by the geometric mean in forget quality; the paper's equation is the arithmetic one.
Probabilities are length-normalised throughout: ``p(a) = P(a | q)^(1/tokens) = exp(-nll)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from soul.metrics.stats import Array, harmonic_mean, ks_two_sided
from soul.types import Row

Mean = Literal["geometric", "arithmetic"]
Definition = Literal["leaderboard", "eval_code"]

#: Which mean over wrong answers each definition takes in model utility.
MEAN_OF: dict[Definition, Mean] = {"leaderboard": "geometric", "eval_code": "arithmetic"}
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
#: Where TOFU divides the answer's probability by that of all answers offered.
NORMALISED_SPLITS = ("real_authors", "world_facts")

_LOG_FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
_MARKS = ("[INST]", "[/INST]", "Question:", "Answer:")  # what TOFU's logs leave of its two prompt templates


def answer_probability(row: Row) -> float:
    """Return ``exp(-nll)``, the length-normalised probability of the true answer.

    Example:
        >>> answer_probability({"id": "", "subject": "", "prompt": "", "answer": "", "nll": 0.0, "tokens": 1})
        1.0
    """
    return math.exp(-row["nll"])


def normalised_probability(row: Row) -> float:
    """Return ``p(answer) / (p(answer) + sum_j p(wrong_j))``, TOFU's probability for real authors and world facts.

    Computed as a softmax of log-probabilities, so that a model that finds every answer impossible gives no 0/0.

    Raises:
        ValueError: The row has no wrong answers.
    """
    logs = -np.array([row["nll"], *_wrong(row)], dtype=np.float64)
    return float(np.exp(logs[0] - np.logaddexp.reduce(logs)))


def log_truth_ratio(row: Row, mean: Mean = "geometric") -> float:
    """Return ``log R``, see :func:`truth_ratio`; finite where ``R`` itself would overflow.

    Raises:
        ValueError: The row has no wrong answers, or ``mean`` is unknown.
    """
    wrong = -np.array(_wrong(row), dtype=np.float64)
    if mean == "geometric":
        log_wrong = float(wrong.mean())
    elif mean == "arithmetic":
        log_wrong = float(np.logaddexp.reduce(wrong)) - math.log(len(wrong))
    else:
        raise ValueError(f"unknown mean {mean!r}; known: {', '.join(get_args(Mean))}")
    return log_wrong + row.get("paraphrased_nll", row["nll"])


def truth_ratio(row: Row, mean: Mean = "geometric") -> float:
    """Return ``R = mean_j p(wrong_j) / p(true)``: below 1 where the model prefers the truth.

    ``p(true)`` is that of the paraphrased answer, or of the answer itself where there is no paraphrase (real authors
    and world facts). Geometric: ``R = exp(nll_true - mean_j nll_j)`` (``aggregate_eval_stat.py``, which calls ``1/R``
    the ratio). Arithmetic: ``R = mean_j exp(-nll_j) / exp(-nll_true)`` (paper, equation 1; ``utils.py``).

    Raises:
        ValueError: The row has no wrong answers, or ``mean`` is unknown.

    Example:
        >>> row = {"id": "", "subject": "", "prompt": "", "answer": "", "nll": 1.0, "tokens": 1, "wrong_nll": [1.0]}
        >>> truth_ratio(row)
        1.0
    """
    with np.errstate(over="ignore"):
        return float(np.exp(log_truth_ratio(row, mean)))


def truth_ratio_utility(ratio: float) -> float:
    """Return ``max(0, 1 - R)``: 1 where only the truth is likely, 0 from where wrong answers are as likely.

    Example:
        >>> truth_ratio_utility(0.25)
        0.75
    """
    return float(np.maximum(0.0, 1.0 - ratio))  # numpy's maximum keeps nan, the built-in one may not


def truth_ratio_forget(ratio: float) -> float:
    """Return ``min(R, 1/R)``: 1 where true and wrong answers are equally likely, TOFU's number for the forget set.

    Example:
        >>> truth_ratio_forget(4.0)
        0.25
    """
    return 0.0 if ratio == 0 else float(np.minimum(ratio, 1.0 / ratio))


def truth_ratio_share(ratio: float) -> float:
    """Return ``1 / (1 + R)``, the true answer's share ``p(true) / (p(true) + mean_j p(wrong_j))``.

    A third aggregation, which OpenUnlearning calls ``prob_mean``: unlike the other two it never saturates.

    Example:
        >>> truth_ratio_share(3.0)
        0.25
    """
    return 1.0 / (1.0 + ratio)


def utility_groups(rows_by_split: Mapping[str, Sequence[Row]], definition: Definition = "leaderboard") -> list[Array]:
    """Return, for each utility split, probability, ROUGE-L recall and ``max(0, 1-R)`` of each row.

    The probability is the normalised one on ``real_authors`` and ``world_facts``.

    Returns:
        Three arrays of shape ``(rows of the split, 3)``, in the order of :data:`UTILITY_SPLITS`.

    Raises:
        ValueError: A split is missing or empty, or a row lacks ROUGE-L recall or wrong answers.
    """
    if definition not in MEAN_OF:
        raise ValueError(f"unknown definition {definition!r}; known: {', '.join(MEAN_OF)}")
    missing = [split for split in UTILITY_SPLITS if not rows_by_split.get(split)]
    if missing:
        raise ValueError(f"model utility needs rows of {', '.join(UTILITY_SPLITS)}; missing: {', '.join(missing)}")
    groups = []
    for split in UTILITY_SPLITS:
        probability = normalised_probability if split in NORMALISED_SPLITS else answer_probability
        rows = rows_by_split[split]
        ratios = [truth_ratio_utility(truth_ratio(row, MEAN_OF[definition])) for row in rows]
        groups.append(np.array([[probability(row) for row in rows], [rouge(row) for row in rows], ratios]).T)
    return groups


def utility_of(groups: Sequence[Array]) -> float:
    """Return the harmonic mean of the column means of all groups."""
    return harmonic_mean(np.concatenate([group.mean(axis=0) for group in groups]))


def model_utility(rows_by_split: Mapping[str, Sequence[Row]], definition: Definition = "leaderboard") -> float:
    """Return TOFU's model utility: the harmonic mean of nine means.

    ``H({mean of probability, ROUGE-L recall, max(0, 1-R)} x {retain, real_authors, world_facts})``, from 0 to 1. The
    definitions part in ``R``: geometric mean over wrong answers for ``"leaderboard"``, arithmetic for ``"eval_code"``.

    Args:
        rows_by_split: Rows of (at least) the three utility splits.
        definition: Whose truth ratio.

    Raises:
        ValueError: A split is missing or empty, or a row lacks what a metric needs.

    Example:
        >>> model_utility(rows_from_tofu_log(log))  # doctest: +SKIP
        0.6226773...
    """
    return utility_of(utility_groups(rows_by_split, definition))


def forget_quality(rows: Sequence[Row], reference: Sequence[Row], mean: Mean = "geometric") -> tuple[float, float]:
    """Return the KS statistic and TOFU's forget quality, the p-value of the same test.

    Two-sided two-sample Kolmogorov-Smirnov test between the truth ratios of the model and of one trained without the
    forget set, both on the forget set. A p-value near 1 says that the test cannot tell them apart; small ones that it
    can. TOFU tests ``1/R`` (geometric); the test knows only ranks, so that ``log R``, which cannot overflow, gives the
    same. ``mean="arithmetic"`` tests the paper's equation 1, which neither of TOFU's two files does.

    Args:
        rows: The model's rows of the forget set.
        reference: The retained model's rows of the same set.
        mean: Mean over wrong answers in ``R``.

    Returns:
        ``(statistic, p-value)``.

    Raises:
        ValueError: One side is empty, or a row has no wrong answers.
    """
    return ks_two_sided(*([log_truth_ratio(row, mean) for row in side] for side in (rows, reference)))


def rows_from_tofu_log(log: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, list[Row]]:
    """Return the rows in an aggregated evaluation log of TOFU's own code (``eval_log_aggregated.json``).

    Likelihoods, generations and ROUGE are taken as logged; TOFU logs at most 300 rows a split (``ds_size``).

    Args:
        log: The parsed JSON: file name, then metric, then row number.

    Returns:
        Rows by split, for each split in the log.

    Raises:
        ValueError: The log holds none of TOFU's files, or one lacks a metric.

    Example:
        >>> rows = rows_from_tofu_log(json.loads(path.read_text()))  # doctest: +SKIP
        >>> model_utility(rows)  # doctest: +SKIP
    """
    splits = {split: log[name] for split, name in _LOG_FILES.items() if name in log}
    if not splits:
        raise ValueError(f"not a TOFU log: it has none of {', '.join(_LOG_FILES.values())}")
    try:
        return {split: [_row(part, key, split) for key in part["avg_gt_loss"]] for split, part in splits.items()}
    except KeyError as error:
        raise ValueError(f"the TOFU log lacks the entry {error}") from None


def _row(part: Mapping[str, Mapping[str, Any]], key: str, split: str) -> Row:
    prompt, generated, answer = part["generated_text"][key]
    for mark in _MARKS:
        prompt = prompt.replace(mark, "")
    return Row(
        id=f"{split}:{key}",
        subject="",
        prompt=prompt.strip(),
        answer=answer.strip(),
        nll=part["avg_gt_loss"][key],
        tokens=part["num_token_gt"][key],
        paraphrased_nll=part["avg_paraphrased_loss"][key],
        wrong_nll=list(part["average_perturb_loss"][key]),
        generated=generated,
        rougeL_recall=part["rougeL_recall"][key],
    )


def _wrong(row: Row) -> list[float]:
    wrong = row.get("wrong_nll")
    if not wrong:
        raise ValueError(f"row {row['id']!r} has no wrong answers, which truth ratio and normalised probability need")
    return wrong


def rouge(row: Row) -> float:
    """Return the row's ROUGE-L recall, or say what is missing (ValueError)."""
    if "rougeL_recall" not in row:
        raise ValueError(f"row {row['id']!r} has no ROUGE-L recall: evaluate with generation switched on")
    return row["rougeL_recall"]
