"""Membership inference: can an attacker tell what a model was trained on from what it says of it?

An attack gives each example a number, higher where it looks more like training data; AUC and the true positive rate
at a low false positive rate say how well members (the forget set) and non-members (a holdout set of the same kind) are
told apart. AUC is 0.5 where they are not. After unlearning neither end is good: above what a retrained model gives, the
data still shows; below, its absence does. Members and non-members that differ by more than membership (other authors'
style, real facts beside invented ones) are told apart without any of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from soul.metrics.stats import SHARE, Array, bootstrap_of
from soul.types import Row, Score

ATTACKS = ("loss", "min_k", "min_k_plus", "zlib", "reference", "gradient_norm")


def lowest_mean(values: ArrayLike, k: float) -> float:
    """Return the mean of the lowest ``max(1, floor(k n))`` of ``n`` values.

    Min-K% Prob where they are the tokens' log-probabilities (arXiv 2310.16789), Min-K%++ where they are
    standardised ones (arXiv 2404.02936). Never fewer than one token, where SOUL's code takes the mean of
    none (nan).

    Args:
        values: One number a token, shape ``(n,)``.
        k: Share of the tokens.

    Raises:
        ValueError: There is no value, or ``k`` is out of (0, 1].

    Example:
        >>> lowest_mean([-4.0, -1.0, -2.0, -3.0], 0.5)
        -3.5
    """
    items = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if not 0 < k <= 1:
        raise ValueError(f"k must be above 0 and at most 1, not {k}")
    if items.size == 0:
        raise ValueError("min-k needs at least one token")
    count = max(1, math.floor(k * items.size + 1e-9))  # 0.7 * 10 is 7, whatever binary fractions say
    return float(items[:count].mean())


def loss_attack(row: Row) -> float:
    """Return ``-NLL``: what was learned is likely (Yeom et al., arXiv 1709.01604)."""
    return -row["nll"]


def zlib_attack(row: Row) -> float:
    """Return ``-NLL / bytes of zlib(answer)``: likely beyond what its repetitiveness explains (arXiv 2012.07805).

    The bytes are those of the UTF-8 answer compressed on its own, zlib's 8 bytes of frame included, as in public code.
    """
    return -row["nll"] / len(zlib.compress(row["answer"].encode()))


def gradient_norm_attack(row: Row) -> float:
    """Return ``-|| d NLL / d theta ||_2``: what was learned asks for little change (arXiv 2402.17012).

    Raises:
        ValueError: The row has no gradient norm.
    """
    if "gradient_norm" not in row:
        raise ValueError(f"row {row['id']!r} has no gradient norm: ask for gradient_norm")
    return -row["gradient_norm"]


def min_k_attack(row: Row, k: float = 0.4) -> float:
    """Return the mean of the lowest share ``k`` of the answer's log-probabilities (:func:`lowest_mean`).

    Raises:
        ValueError: The row has no token log-probabilities.
    """
    return lowest_mean(_tokens(row, "token_logps"), k)


def min_k_plus_attack(row: Row, k: float = 0.4) -> float:
    """Return the mean of the lowest share ``k`` of the answer's standardised log-probabilities (:func:`lowest_mean`).

    Raises:
        ValueError: The row has no token values.
    """
    return lowest_mean(_tokens(row, "token_z"), k)


def reference_attacks(rows: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """Return ``NLL_reference - NLL`` of each row: likelier than under a model that never saw it (arXiv 2012.07805).

    Raises:
        ValueError: The reference's rows are not of the same examples in the same order.
    """
    if [(r["prompt"], r["answer"]) for r in rows] != [(r["prompt"], r["answer"]) for r in reference]:
        raise ValueError("the reference attack needs the reference model's rows of the same examples in the same order")
    return [known["nll"] - row["nll"] for row, known in zip(rows, reference, strict=True)]


def attack_values(
    rows: Sequence[Row], *, reference: Sequence[Row] | None = None, k: float = 0.4
) -> dict[str, list[float]]:
    """Return each attack's number of each row, for the attacks (of :data:`ATTACKS`) that all rows allow.

    Args:
        rows: Rows measured with ``Ask(tokens=True)``, for reference-free attacks beyond loss and zlib.
        reference: Rows of the same examples by a model that never saw them.
        k: Share of the tokens for both kinds of Min-K: 0.4 as in MUSE and OpenUnlearning; the papers look at 0.1 to 0.6
            and report mostly 0.2.

    Raises:
        ValueError: ``rows`` is empty, or the reference's rows are of other examples.
    """
    if not rows:
        raise ValueError("membership inference needs at least one row")
    attacks: dict[str, tuple[str, Callable[[Row], float]]] = {
        "loss": ("nll", loss_attack),
        "min_k": ("token_logps", lambda row: min_k_attack(row, k)),
        "min_k_plus": ("token_z", lambda row: min_k_plus_attack(row, k)),
        "zlib": ("nll", zlib_attack),
        "gradient_norm": ("gradient_norm", gradient_norm_attack),
    }
    found = {
        name: [attack(row) for row in rows]
        for name, (needed, attack) in attacks.items()
        if all(needed in row for row in rows)
    }
    if reference is not None:
        found["reference"] = reference_attacks(rows, reference)
    return {name: found[name] for name in ATTACKS if name in found}


def auc(members: ArrayLike, nonmembers: ArrayLike) -> float:
    """Return the area under the ROC curve, ``P(member > nonmember) + P(equal) / 2``.

    ``U / (n m)``, ``U`` Mann and Whitney's statistic (1947): half the non-members below a member and half those not
    above it, summed over members. nan where a value is.

    Args:
        members: Values of the ``n`` members.
        nonmembers: Values of the ``m`` others.

    Raises:
        ValueError: A side is empty.

    Example:
        >>> auc([2.0, 1.0], [1.0, 0.0])
        0.875
    """
    a, b = _sides(members, nonmembers)
    if bool(np.isnan(a).any()) or bool(np.isnan(b).any()):
        return math.nan
    ranked = np.sort(b)
    below, not_above = (int(np.searchsorted(ranked, a, side).sum()) for side in ("left", "right"))
    return (below + not_above) / (2 * len(a) * len(b))


def tpr_at_fpr(members: ArrayLike, nonmembers: ArrayLike, fpr: float = 0.01) -> float:
    """Return the largest true positive rate of a threshold whose false positive rate is at most ``fpr``.

    Not interpolated (arXiv 2112.03570): with fewer than ``1 / fpr`` non-members none may be taken for a
    member. A value equal to a non-member's falls with it.

    Args:
        members: Values of the members.
        nonmembers: Values of the others.
        fpr: Share of non-members that may be taken for members.

    Raises:
        ValueError: A side is empty, or ``fpr`` is out of [0, 1].

    Example:
        >>> tpr_at_fpr([3.0, 2.0, 0.0], [2.0, 1.0, 0.5, 0.1], fpr=0.25)
        0.6666666666666666
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be between 0 and 1, not {fpr}")
    a, b = _sides(members, nonmembers)
    if bool(np.isnan(a).any()) or bool(np.isnan(b).any()):
        return math.nan
    allowed = math.floor(fpr * len(b) + 1e-9)
    if allowed >= len(b):
        return 1.0
    return float(np.mean(a > np.sort(b)[::-1][allowed]))


def membership_scores(
    members: Sequence[Row],
    nonmembers: Sequence[Row],
    *,
    split: str = "forget",
    reference: tuple[Sequence[Row], Sequence[Row]] | None = None,
    k: float = 0.4,
    fprs: Sequence[float] = (0.01,),
    seed: int = 0,
    resamples: int = 2000,
) -> list[Score]:
    """Return ``mia_<attack>_auc`` and ``mia_<attack>_tpr_at_fpr_<rate>`` of all attacks that the rows allow.

    Intervals are bootstrapped over members and non-members, each on their own, by whole subjects where rows have them.

    Args:
        members: The model's rows of what it was trained on.
        nonmembers: Its rows of data of the same kind that it was not.
        split: The members' set.
        reference: A reference model's rows of both, for the reference attack.
        k: Share of the tokens for both kinds of Min-K.
        fprs: False positive rates.
        seed: Seed of the intervals.
        resamples: Resamples behind an interval.

    Raises:
        ValueError: A side is empty, or the reference's rows are of other examples.
    """
    left, right = reference or (None, None)
    inside, outside = (
        attack_values(rows, reference=known, k=k) for rows, known in ((members, left), (nonmembers, right))
    )
    clusters = [subjects(members), subjects(nonmembers)]
    measures: Mapping[str, Callable[[list[Array]], float]] = {
        "auc": lambda sides: auc(*sides),
        **{f"tpr_at_fpr_{rate:g}": lambda sides, rate=rate: tpr_at_fpr(*sides, fpr=rate) for rate in fprs},
    }
    return [
        bootstrap_of(
            measure,
            [inside[attack], outside[attack]],
            metric=f"mia_{attack}_{name}",
            split=split,
            seed=seed,
            resamples=resamples,
            clusters=clusters,
            within=SHARE,
        )
        for attack in inside
        if attack in outside
        for name, measure in measures.items()
    ]


def subjects(rows: Sequence[Row]) -> list[Hashable]:
    """Return whom or what each row is about, the groups of a cluster bootstrap."""
    return [row["subject"] for row in rows]


def _tokens(row: Row, name: str) -> list[float]:
    if name not in row:
        raise ValueError(f"row {row['id']!r} has no {name}: ask for tokens")
    return row[name]


def _sides(members: ArrayLike, nonmembers: ArrayLike) -> tuple[Array, Array]:
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (members, nonmembers))
    if a.size == 0 or b.size == 0:
        raise ValueError(f"membership needs members and non-members, got {a.size} and {b.size}")
    return a, b
