"""Intervals and tests: every number of a report carries how far it can be trusted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from soul.types import Score

Array = NDArray[np.float64]

LEVEL = 0.95
ANYWHERE, SHARE = (-math.inf, math.inf), (0.0, 1.0)
"""Where metrics can lie: see ``within`` of :func:`bootstrap_mean`."""
_DRAWS = 4_000_000  # indices drawn at once: 32 MB, whatever the number of items


def bootstrap_mean(
    values: ArrayLike,
    *,
    metric: str,
    split: str,
    seed: int = 0,
    resamples: int = 2000,
    better: str = "",
    groups: Sequence[Hashable] | None = None,
    within: tuple[float, float] = ANYWHERE,
) -> Score:
    """Return the mean of ``values`` with its percentile bootstrap interval (Efron 1979).

    ``[q(.025), q(.975)]`` of ``mean(values[i_1 .. i_n])``, with ``i`` drawn uniformly with replacement. Items count as
    independent: where several ask about one person, the interval speaks of these questions, not of new persons.

    With ``groups`` it speaks of new persons: whole groups are drawn, as many as there are, and the mean is that of all
    items in them (cluster bootstrap; Davison and Hinkley 1997, section 3.8). An item whose group is empty (``""`` or
    None) is a group of its own. Both ends move away from the mean by :func:`expansion`, since few groups resampled vary
    by too little: of 2, 5 and 20 groups a plain interval covers about 50, 85 and 91 % where it says 95.

    Where all values lie at one end of ``within``, resamples do too, and say nothing: none of 8 leaked would read
    "0, certainly". The interval is then Clopper and Pearson's (1934) for the share of items, or groups, that lie
    elsewhere, of which none was seen: it reaches ``1 - .025^(1/n)`` of the way to the other end. Values that are all
    alike elsewhere have no interval.

    Args:
        values: One number an item, shape ``(n,)``.
        metric: Name of the score.
        split: The set the items come from.
        seed: Seed of the resampling.
        resamples: How many means the quantiles are taken of.
        better: ``"higher"``, ``"lower"`` or ``""``.
        groups: The group of each item, e.g. ``[row["subject"] for row in rows]``; where none repeats, items are drawn.
        within: Where the metric can lie at all, which no interval leaves.

    Returns:
        The score, whose ``n`` counts items. One item or one group, or a value that is not a number, has a mean but no
        interval.

    Raises:
        ValueError: ``values`` is empty or not one-dimensional, ``groups`` has another length, or ``resamples`` is less
            than 1.

    Example:
        >>> str(bootstrap_mean([0.0, 1.0, 1.0, 1.0], metric="accuracy", split="test"))
        '0.750 [0.250, 1.000] (n=4)'
        >>> str(bootstrap_mean([0.0] * 8, metric="leaked", split="forget", within=SHARE))
        '0.000 [0.000, 0.369] (n=8)'
    """
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or items.size == 0:
        raise ValueError(f"{metric} on {split!r} needs a list of at least one number, got shape {items.shape}")
    _check(resamples)
    members = _members(groups, len(items), metric)
    mean, n = float(items.mean()), int(items.size)
    if n == 1 or math.isnan(mean) or (members and len(members) == 1):
        return Score(metric, split, mean, n, seed=seed, better=better)
    if members:
        sums = np.array([[items[picked].sum(), len(picked)] for picked in members])
        of = {"metric": metric, "split": split, "seed": seed, "better": better}
        score = dataclasses.replace(
            bootstrap_of(_ratio, [sums], resamples=resamples, within=within, **of), value=mean, n=n
        )
        if not score.method.startswith("bootstrap"):  # all groups are alike
            return score
        wide = _expanded(score, len(members), within)
        return dataclasses.replace(wide, method=f"bootstrap({resamples}, {len(members)} groups, widened)")
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS // n)
    means = [
        items[rng.integers(n, size=(min(block, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    score = _score(mean, np.concatenate(means), n, metric=metric, split=split, seed=seed, better=better)
    return _of_alike(score, n, within) if _all_alike(score) else score


def bootstrap_of(
    fn: Callable[[list[Array]], float],
    groups: Sequence[ArrayLike],
    *,
    metric: str,
    split: str = "",
    seed: int = 0,
    resamples: int = 2000,
    better: str = "",
    clusters: Sequence[Sequence[Hashable] | None] | None = None,
    within: tuple[float, float] = ANYWHERE,
) -> Score:
    """Return ``fn(groups)`` with the percentile bootstrap interval of an aggregate of several sets.

    Each group is resampled along its first axis, on its own, with replacement. The columns of a row stay together, so
    that metrics which hang together within an item still do so in the interval. With clusters the interval is expanded
    as that of :func:`bootstrap_mean` is, for the set that has the fewest; and likewise at an end of ``within``, where
    all of the smallest set might have come out so by chance.

    Args:
        fn: From a list of arrays, shaped as ``groups``, to the aggregate.
        groups: One array a set, the first axis of each being its items.
        metric: Name of the score.
        split: The set, empty for an aggregate of several.
        seed: Seed of the resampling.
        resamples: How many aggregates the quantiles are taken of.
        better: ``"higher"``, ``"lower"`` or ``""``.
        clusters: For each group the cluster (author, document) of each of its items, or None where items are drawn.
        within: Where the metric can lie at all.

    Returns:
        The score, whose ``n`` counts the items of all groups. No interval where every group is of one item or cluster.
        Resamples of which ``fn`` is not a number are left out.

    Raises:
        ValueError: There is no group, one is empty, ``clusters`` has other lengths, or ``resamples`` is less than 1.

    Example:
        >>> score = bootstrap_of(lambda g: float(g[0].max()), [np.array([1.0, 2.0])], metric="max")
        >>> (score.value, score.low, score.n)
        (2.0, 1.0, 2)
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.ndim == 0 or len(array) == 0 for array in arrays):
        raise ValueError(f"{metric} needs at least one group and at least one item in each")
    _check(resamples)
    named = clusters or [None] * len(arrays)
    if len(named) != len(arrays):
        raise ValueError(
            f"{metric} has {len(arrays)} groups and clusters of {len(named)}: give one list, or None, each"
        )
    members = [_members(names, len(array), metric) for names, array in zip(named, arrays, strict=True)]
    units = [len(picked) if picked else len(array) for picked, array in zip(members, arrays, strict=True)]
    value, n = float(fn(arrays)), sum(len(array) for array in arrays)
    if all(count == 1 for count in units) or math.isnan(value):
        return Score(metric, split, value, n, seed=seed, better=better)
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        drawn = [rng.integers(count, size=count) for count in units]
        picks = [np.concatenate([of[j] for j in d]) if of else d for d, of in zip(drawn, members, strict=True)]
        draws[i] = fn([array[pick] for array, pick in zip(arrays, picks, strict=True)])
    draws = draws[~np.isnan(draws)]  # of some resamples a metric says nothing, as of one side alone an AUC
    if not len(draws):
        return Score(metric, split, value, n, seed=seed, better=better)
    score = _score(value, draws, n, metric=metric, split=split, seed=seed, better=better)
    if _all_alike(score):
        return _of_alike(score, max(2, min(units)), within)
    if not any(members):
        return score
    fewest = min(count for count, picked in zip(units, members, strict=True) if picked)
    if fewest == 1:  # how clusters of that side differ is not known, and the interval would hold nothing of it
        return Score(metric, split, value, n, seed=seed, better=better)
    wide = _expanded(score, fewest, within)
    counts = "+".join(str(count) for count in units)
    return dataclasses.replace(wide, method=f"bootstrap({resamples}, {counts} groups, widened)")


def expansion(groups: int) -> float:
    """Return by how much the interval of so many resampled groups is too narrow: ``sqrt(G / (G - 1)) t / z``.

    ``t`` and ``z`` are the .975 quantiles of Student's distribution with ``G - 1`` degrees of freedom and of the normal
    one (Hesterberg 2015, "What teachers should know about the bootstrap", arXiv 1411.5279, on the narrowness bias of
    percentile intervals). The paper moves the quantiles outward; of few groups there are none to move to, so the ends
    move.

    Example:
        >>> round(expansion(2), 2), round(expansion(20), 2)
        (9.17, 1.1)
    """
    upper = (1 + LEVEL) / 2
    return math.sqrt(groups / (groups - 1)) * float(stats.t.ppf(upper, groups - 1) / stats.norm.ppf(upper))


def _expanded(score: Score, groups: int, within: tuple[float, float]) -> Score:
    if groups < 2:
        return score
    ends = (score.value + expansion(groups) * (end - score.value) for end in (score.low, score.high))
    low, high = (min(max(end, within[0]), within[1]) for end in ends)
    return dataclasses.replace(score, low=low, high=high)


def _all_alike(score: Score) -> bool:
    """Say whether all resamples are as the value is, which is less than certain whatever they seem to say."""
    return score.value == score.low == score.high


def _of_alike(score: Score, n: int, within: tuple[float, float]) -> Score:
    """Return the interval where all resamples are alike.

    At an end of where the metric can lie, Clopper and Pearson's for none of ``n`` elsewhere; between the ends none.
    """
    if score.value not in within or not math.isfinite(within[1] - within[0]):
        return Score(score.metric, score.split, score.value, score.n, seed=score.seed, better=score.better)
    reach = (1 - ((1 - LEVEL) / 2) ** (1 / n)) * (within[1] - within[0])
    low, high = (within[0], within[0] + reach) if score.value == within[0] else (within[1] - reach, within[1])
    return dataclasses.replace(score, low=low, high=high, method=f"clopper-pearson({n})")


def harmonic_mean(values: ArrayLike) -> float:
    """Return ``n / sum(1 / x)``, and 0 as soon as one value is 0 (its limit, and what ``scipy.stats.hmean`` returns).

    Raises:
        ValueError: ``values`` is empty or holds a negative number.

    Example:
        >>> harmonic_mean([1.0, 0.5])
        0.6666666666666666
    """
    items = np.asarray(values, dtype=np.float64)
    if items.size == 0 or bool((items < 0).any()):
        raise ValueError("the harmonic mean needs at least one number, and none below 0")
    if bool(np.isnan(items).any()):
        return math.nan
    if bool((items == 0).any()):
        return 0.0
    return float(items.size / np.sum(1.0 / items))


def expected_best(losses: Sequence[float], n: int) -> float:
    """Return what the best of ``n`` trials loses on average, out of all that were made ("Show your work", 1909.03004).

    With losses ``x_(1) <= ... <= x_(N)``, over all sets of ``n`` trials, without replacement (where the paper's eq. 1
    draws with it)::

        E[min] = sum_i x_(i) C(N - i, n - 1) / C(N, n)

    Args:
        losses: Of each trial alone.
        n: Trials that a smaller budget would have had.

    Raises:
        ValueError: There are fewer than ``n`` trials, or ``n`` is not 1 or more.

    Example:
        >>> expected_best([0.3, 0.1, 0.2], 3), round(expected_best([0.3, 0.1, 0.2], 1), 3)
        (0.1, 0.2)
    """
    whole = len(losses)
    if not 1 <= n <= whole:
        raise ValueError(f"the best of {n} cannot be expected of {whole} trials")
    ways = (math.comb(whole - i, n - 1) for i in range(1, whole + 1))
    return sum(x * w for x, w in zip(sorted(losses), ways, strict=True) if w) / math.comb(whole, n)


def ks_two_sided(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Return statistic and p-value of the two-sided two-sample Kolmogorov-Smirnov test.

    ``D = max_x |F_a(x) - F_b(x)|``; the p-value is exact up to 10,000 values a side (``scipy.stats.ks_2samp`` with its
    default ``method="auto"``, as TOFU calls it) and asymptotic beyond. It depends on ranks alone: any strictly
    monotone function of both samples leaves it as it is. Exactness assumes samples without ties.

    Args:
        a: First sample.
        b: Second sample.

    Returns:
        ``(D, p)``; both nan where a sample holds nan.

    Raises:
        ValueError: A sample is empty.

    Example:
        >>> ks_two_sided([1.0, 2.0], [3.0, 4.0])
        (1.0, 0.3333333333333333)
    """
    first, second = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
    if first.size == 0 or second.size == 0:
        raise ValueError("the Kolmogorov-Smirnov test needs at least one value on each side")
    if bool(np.isnan(first).any()) or bool(np.isnan(second).any()):
        return math.nan, math.nan
    # ks_2samp's return type is not declared by scipy; it is a named tuple whose first two fields are D and p
    statistic, pvalue = tuple(stats.ks_2samp(first, second, alternative="two-sided", method="auto"))[:2]
    return float(statistic), float(pvalue)


def ks_margin(n: int, m: int, level: float = LEVEL) -> float:
    """Return how far ``D`` of samples of ``n`` and ``m`` can be from the ``D`` of their distributions.

    ``sqrt(log(2/h)/(2n)) + sqrt(log(2/h)/(2m))``, ``h = (1-level)/2``: the Dvoretzky-Kiefer-Wolfowitz inequality with
    Massart's constant (1990) for each side, joined by the union bound. Conservative, and valid also where both samples
    answer the same questions. A bootstrap is no choice here: ``D`` of resamples is biased upwards.

    Example:
        >>> round(ks_margin(400, 400), 3)
        0.148
    """
    if n < 1 or m < 1 or not 0 < level < 1:
        raise ValueError(f"a margin needs items on both sides and a level in (0, 1), got {n}, {m}, {level}")
    root = math.sqrt(math.log(4 / (1 - level)) / 2)
    return root / math.sqrt(n) + root / math.sqrt(m)


def _members(names: Sequence[Hashable] | None, n: int, metric: str) -> list[NDArray[np.intp]] | None:
    """Return the positions of each group's items, in order of first appearance; None where every item is its own."""
    if names is None:
        return None
    if len(names) != n:
        raise ValueError(f"{metric} has {n} items, but the groups of {len(names)}")
    found: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault((i,) if name is None or name == "" else ("", name), []).append(i)
    return None if len(found) == n else [np.array(picked, dtype=np.intp) for picked in found.values()]


def _ratio(groups: list[Array]) -> float:
    total, count = groups[0].sum(axis=0)
    return float(total / count)


def _check(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


def _score(value: float, draws: Array, n: int, *, metric: str, split: str, seed: int, better: str) -> Score:
    with np.errstate(invalid="ignore"):  # between two infinite draws numpy interpolates to nan, which is meant
        ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = float(ends[0]), float(ends[1])
    method = f"bootstrap({len(draws)})"
    return Score(metric, split, value, n, low, high, method=method, level=LEVEL, seed=seed, better=better)
