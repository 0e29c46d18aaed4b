"""Calibration of multiple choice: does a model's confidence say how often it is right?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from soul.metrics.stats import Array
from soul.types import Row

BINS = 15


def option_probabilities(row: Row) -> Array:
    """Return the probabilities of the options, the true one first: a softmax of ``-nll`` over all answers offered.

    Raises:
        ValueError: The row has no wrong answers.

    Example:
        >>> row = {"id": "", "subject": "", "prompt": "", "answer": "", "nll": 1.0, "tokens": 1, "wrong_nll": [1.0]}
        >>> option_probabilities(row).tolist()
        [0.5, 0.5]
    """
    wrong = row.get("wrong_nll")
    if not wrong:
        raise ValueError(f"row {row['id']!r} has no wrong answers, which calibration needs")
    logs = -np.array([row["nll"], *wrong], dtype=np.float64)
    return np.exp(logs - np.logaddexp.reduce(logs))


def correctness(probabilities: ArrayLike, truth: int = 0) -> float:
    """Return 1 where the true option is the likeliest, 0 where it is not, and ``1/m`` where ``m`` options share that.

    Example:
        >>> correctness([0.4, 0.4, 0.2])
        0.5
    """
    options = np.asarray(probabilities, dtype=np.float64)
    top = options == options.max()
    return float(top[truth] / max(1, top.sum()))


def brier(probabilities: ArrayLike, truth: int = 0) -> float:
    """Return ``sum_k (p_k - [k is true])^2``, from 0 to 2 (Brier 1950): lower is better.

    Example:
        >>> brier([0.5, 0.5])
        0.5
    """
    errors = np.array(probabilities, dtype=np.float64)
    errors[truth] -= 1
    return float(np.square(errors).sum())


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Return ``ECE = sum_b n_b/n |accuracy_b - confidence_b|`` over bins of equal width (arXiv 1706.04599, equation 3).

    Bins are ``((b-1)/B, b/B]``, the first with 0. The estimate is biased upwards, the more so with few items a bin:
    compare only sets of the same size.

    Args:
        confidence: Probability of the option chosen, shape ``(n,)``.
        correct: Whether it was right, shape ``(n,)``; fractions for ties.
        bins: ``B``.

    Raises:
        ValueError: There is no item, the sides differ in length, or ``bins`` is less than 1.

    Example:
        >>> expected_calibration_error([1.0, 1.0, 0.5, 0.5], [1, 1, 1, 1])
        0.25
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != right.shape or sure.size == 0 or bins < 1:
        raise ValueError(f"calibration needs as many answers as confidences, got {right.shape} and {sure.shape}")
    # rounding must not lift 0.2 into the bin above it
    place = np.clip(np.ceil(np.round(sure * bins, 9)).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / sure.size)


def calibration_columns(rows: Sequence[Row]) -> Array:
    """Return confidence, correctness and Brier score of each row, shape ``(n, 3)``.

    Raises:
        ValueError: A row has no wrong answers.
    """
    options = [option_probabilities(row) for row in rows]
    return np.array([[p.max(), correctness(p), brier(p)] for p in options])
