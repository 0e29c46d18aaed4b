"""Privacy leakage: does membership inference see a model as it would see one trained without the data?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from soul.metrics.membership import attack_values, auc, subjects
from soul.metrics.stats import bootstrap_of
from soul.types import Row, Score

Sign = Literal["published", "formula"]


def relative_difference(value: float, reference: float) -> float:
    """Return ``100 (value - reference) / |reference|`` in percent.

    0 where both are 0, and infinite where only the reference is (public code adds ``1e-10`` below).

    Example:
        >>> relative_difference(0.75, 0.5)
        50.0
    """
    if reference == 0:
        return 0.0 if value == 0 else value * math.inf
    return 100 * (value - reference) / abs(reference)


def privleak(unlearned: float, retrained: float = 0.5, *, sign: Sign = "published") -> float:
    """Return MUSE's privacy leakage in percent, 0 where the model looks like the retrained one.

    ``PrivLeak = (AUC(f_unlearn) - AUC(f_retrain)) / AUC(f_retrain)`` (arXiv 2407.06460). Both arguments are
    AUCs with members on the positive side, as :func:`soul.metrics.membership.auc` returns them: above 0.5 where members
    are recognised. MUSE's code, and all published numbers, put non-members there, so that their AUC is ``1 - auc``:

    * ``"published"``: ``100 (retrained - unlearned) / (1 - retrained)``. Negative: the data still shows
      (under-unlearning; -99.8 for MUSE's model before). Positive: its absence shows (over-unlearning).
    * ``"formula"``: the equation with our AUCs, ``100 (unlearned - retrained) / retrained``, of the opposite sign.

    Args:
        unlearned: AUC of the model that is judged.
        retrained: AUC of a model trained without the forget set, on the same data; 0.5 assumes that it would be blind.
        sign: Which of the two.

    Raises:
        ValueError: An AUC is out of [0, 1], or ``sign`` is unknown.

    Example:
        >>> privleak(1.0, 0.5), privleak(0.5, 0.5), privleak(1.0, 0.5, sign="formula")
        (-100.0, 0.0, 100.0)
    """
    if sign not in get_args(Sign):
        raise ValueError(f"unknown sign {sign!r}; known: {', '.join(get_args(Sign))}")
    for name, value in (("unlearned", unlearned), ("retrained", retrained)):
        if value < 0 or value > 1:
            raise ValueError(f"{name} must be an AUC between 0 and 1, not {value}")
    if sign == "published":
        return relative_difference(1 - unlearned, 1 - retrained)
    return relative_difference(unlearned, retrained)


def privleak_score(
    members: Sequence[Row],
    nonmembers: Sequence[Row],
    reference_members: Sequence[Row],
    reference_nonmembers: Sequence[Row],
    *,
    attack: str = "min_k",
    k: float = 0.4,
    sign: Sign = "published",
    split: str = "forget",
    seed: int = 0,
    resamples: int = 2000,
) -> Score:
    """Return ``privleak`` of a model against a retrained one, with a bootstrap interval.

    Both models are measured on the same resampled examples; members and non-members are resampled on their own, by
    whole subjects where rows have them.

    Args:
        members: The model's rows of the forget set.
        nonmembers: Its rows of a holdout set of the same kind.
        reference_members: The retrained model's rows of the forget set.
        reference_nonmembers: Its rows of the holdout set.
        attack: One of :data:`soul.metrics.membership.ATTACKS`, without a reference; MUSE takes Min-K.
        k: Share of the tokens for Min-K; MUSE takes 0.4.
        sign: See :func:`privleak`.
        split: The members' set.
        seed: Seed of the interval.
        resamples: Resamples behind the interval.

    Raises:
        ValueError: A side is empty, rows do not allow the attack, or the models' rows are of other examples.
    """
    arrays = []
    for rows, others in ((members, reference_members), (nonmembers, reference_nonmembers)):
        if [(r["prompt"], r["answer"]) for r in rows] != [(r["prompt"], r["answer"]) for r in others]:
            raise ValueError("privacy leakage needs both models' rows of the same examples in the same order")
        values = [attack_values(side, k=k) for side in (rows, others)]
        if not all(attack in found for found in values):
            known = ", ".join(values[0])
            raise ValueError(
                f"the rows do not allow the attack {attack!r}, only {known}: ask for tokens, or another one"
            )
        arrays.append(np.array([found[attack] for found in values]).T)

    def leak(sides: list[np.ndarray]) -> float:
        inside, outside = sides
        return privleak(auc(inside[:, 0], outside[:, 0]), auc(inside[:, 1], outside[:, 1]), sign=sign)

    return bootstrap_of(
        leak,
        arrays,
        metric="privleak",
        split=split,
        seed=seed,
        resamples=resamples,
        clusters=[subjects(members), subjects(nonmembers)],
    )
