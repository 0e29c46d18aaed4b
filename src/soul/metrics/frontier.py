"""The unlearning frontier: how much can be forgotten at which cost, and the area that is lost of it.

A model is a point: *forgetting* ``f``, 0 for the model before and 1 for one retrained without the data, and *utility*
``u``, 1 for the model before. A method is the set of points it can offer, of which only the best count; its score is
the area above them that a perfect method would have covered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from soul.metrics.stats import harmonic_mean

_UNBOUNDED, _LARGEST = 1e300, 1e250  # what stands for infinity where quantiles interpolate, and what it leaves
Point = tuple[float, float]
"""Forgetting and utility."""
FLOOR = 0.5
"""Utility below which a model is of no use, and forgetting not counted."""


def forgetting(knowledge: float, before: float, gold: float) -> float:
    """Return ``f = clip((K0 - K) / (K0 - K_gold), 0, 1)``.

    Args:
        knowledge: What the model still knows of the forget set, ``K``.
        before: The same of the model before, ``K0``.
        gold: The same of a model that never learned the set.

    Raises:
        ValueError: The model before knew no more than the retrained one, so that there is nothing to forget.

    Example:
        >>> forgetting(0.5, before=0.75, gold=0.25)
        0.5
    """
    if not before > gold:
        raise ValueError(f"nothing to forget: knowledge is {before:.3f} before, {gold:.3f} in the retrained model")
    share = (before - knowledge) / (before - gold)
    return 0.0 if math.isnan(share) else min(1.0, max(0.0, share))


def utility(now: Mapping[str, float], before: Mapping[str, float], text_nll: str = "text_nll") -> float:
    """Return ``u = min(1, U / U0)``, ``U`` the harmonic mean of the measures and of the text's likelihood.

    Of the text it is ``min(1, exp(-increase of text NLL))``: text that became likelier buys nothing back.

    Args:
        now: Probabilities to be kept, by name, and the NLL of general text under ``text_nll``.
        before: The same of the model before.
        text_nll: Name of the NLL.

    Example:
        >>> utility({"kept": 0.4, "text_nll": 3.0}, {"kept": 0.8, "text_nll": 3.0})
        0.6428571428571429
    """
    names = [name for name in before if name != text_nll]

    def mean(of: Mapping[str, float]) -> float:
        gained = before[text_nll] - of[text_nll]
        text = 1.0 if gained >= 0 else math.exp(gained)  # nan stays nan, which min() would lose
        return harmonic_mean([*(of[name] for name in names), text])

    share = mean(now) / mean(before)
    return 0.0 if math.isnan(share) else min(1.0, share)


def relative_utility(now: Mapping[str, float], before: Mapping[str, float], text_nll: str = "text_nll") -> float:
    """Return the harmonic mean of what is left of each measure, ``min(1, now / before)``, and of the text's likelihood.

    In :func:`utility` a measure that was low before rules the harmonic mean: at probabilities of .89, .43 and .28, of
    retained answers and of two sets of facts, losing half of the retained answers costs a tenth, and a few better facts
    buy it back. Here every measure counts by its own share, and none can buy another's loss.

    Example:
        >>> relative_utility({"kept": 0.4, "facts": 0.3, "text_nll": 3.0}, {"kept": 0.8, "facts": 0.2, "text_nll": 3.0})
        0.75
    """
    # what was 0 before cannot be lost
    shares = [now[name] / before[name] if before[name] else 1.0 for name in before if name != text_nll]
    gained = min(0.0, before[text_nll] - now[text_nll]) if math.isfinite(now[text_nll]) else math.nan
    shares.append(math.exp(gained))
    if any(math.isnan(share) for share in shares):
        return 0.0
    return harmonic_mean([min(1.0, share) for share in shares])


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both, by rising forgetting.

    Example:
        >>> frontier([(0.2, 0.9), (0.5, 0.95), (0.8, 0.6)])
        [(0.5, 0.95), (0.8, 0.6)]
    """
    best: list[Point] = []
    for f, u in sorted(points, key=lambda p: (-p[0], -p[1])):
        if not best or u > best[-1][1]:
            best.append((f, u))
    return best[::-1]


def lost_area(points: Sequence[Point], floor: float = FLOOR) -> float:
    """Return ``E = 1 - HV / HV_max``: the share of ``[0, 1] x [floor, 1]`` that no point dominates.

    0 says that everything can be forgotten at no cost, 1 that nothing can be. The model before, ``(0, 1)``, is
    everyone's and dominates nothing.

    Example:
        >>> lost_area([(1.0, 1.0)]), lost_area([]), lost_area([(0.5, 1.0), (1.0, 0.75)])
        (0.0, 1.0, 0.25)
    """
    area, reached = 0.0, 0.0
    for f, u in frontier([p for p in points if p[1] > floor]):
        area += (f - reached) * (u - floor)
        reached = f
    return 1.0 - area / (1.0 - floor)


def forgetting_at(points: Sequence[Point], least: float) -> float:
    """Return the most forgetting among points whose utility is at least ``least``; 0 where there is none.

    Example:
        >>> forgetting_at([(0.6, 0.96), (0.9, 0.9)], 0.95)
        0.6
    """
    return max((f for f, u in points if u >= least), default=0.0)


def ratio_interval(
    numerator: Sequence[float], *denominators: Sequence[float], level: float = 0.95, resamples: int = 20_000
) -> tuple[float, float, float]:
    """Return the ratio of two means over the same requests, with a paired bootstrap interval over requests.

    Of several denominators the one of the least mean counts, and for the upper end the least in every resample anew:
    which side is best is not known either. (The least of several noisy means is too low, so that it would lift the
    lower end as well, above what is true.)

    All ``n^n`` resamples are taken where they are no more than ``resamples`` (up to five requests), else that many with
    a fixed seed; of a single request there is no interval, and its ends are nan. A resample in which both sides lose
    nothing says nothing about their ratio: it counts as 0 for the lower end and as unbounded for the upper one. With
    few requests such intervals are short of their level: five cover about 83 % of log-normal losses, and 71 % where
    a side loses nothing on four requests of five on average, nearly all of the misses where it lost nothing on any;
    against the best of six equal others, 78 % (tests measure all three), so read them so.

    Args:
        numerator: A side's value on each request.
        denominators: The same of the other side, or of several.
        level: Of the interval.
        resamples: Most that are taken.

    Raises:
        ValueError: The sides differ in length or are empty.

    Example:
        >>> ratio_interval([1.0, 1.0], [2.0, 2.0])
        (0.5, 0.5, 0.5)
    """
    n, lengths = len(numerator), sorted({len(side) for side in denominators})
    if lengths != [n] or n == 0:
        given = " and ".join(map(str, lengths)) or "none"
        raise ValueError(f"a paired ratio needs the same requests on both sides, got {n} and {given}")
    a, others = np.asarray(numerator, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if n == 1:
        least = float(others.min())
        return float(a[0] / least) if least else math.nan if not a[0] else math.inf, math.nan, math.nan
    if n**n <= resamples:
        picks = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        picks = np.random.default_rng(0).integers(n, size=(resamples, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        best = others[others.mean(axis=1).argmin()]
        draws = a[picks].mean(axis=1) / best[picks].mean(axis=1)
        anew = a[picks].mean(axis=1) / others[:, picks].mean(axis=2).min(axis=0)
        value = float(a.mean() / best.mean())
    ends = (1 - level) / 2, (1 + level) / 2
    low = np.quantile(np.nan_to_num(draws, nan=0.0, posinf=_UNBOUNDED), ends[0])
    high = np.quantile(np.nan_to_num(anew, nan=_UNBOUNDED, posinf=_UNBOUNDED), ends[1])
    low, high = (math.inf if end > _LARGEST else float(end) for end in (low, high))
    return value, low, high
