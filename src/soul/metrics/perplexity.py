"""Perplexity of a set of texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from soul.metrics.stats import Array, bootstrap_of
from soul.types import Row, Score


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """Return ``exp(sum_i nll_i tokens_i / sum_i tokens_i)``, in which every token counts alike.

    Args:
        nll: Mean NLL of each text, in nats a token.
        tokens: Tokens of each text.

    Returns:
        The perplexity; infinite beyond 709 nats a token.

    Raises:
        ValueError: There are no tokens, or the sides differ in length.

    Example:
        >>> round(perplexity([0.0, math.log(4)], [1, 1]), 6)
        2.0
    """
    if len(nll) != len(tokens) or not sum(tokens):
        raise ValueError(f"perplexity needs the tokens of each text, got {len(nll)} texts and {sum(tokens)} tokens")
    mean = math.fsum(n * t for n, t in zip(nll, tokens, strict=True)) / sum(tokens)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def perplexity_score(
    rows: Sequence[Row], split: str, *, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Score:
    """Return the perplexity of rows with a bootstrap interval over rows, or over groups of them.

    Raises:
        ValueError: There are no rows, or no tokens in them.
    """
    sums = [(row["nll"], float(row["tokens"])) for row in rows]
    clusters = [groups] if groups is not None else None
    within = (1.0, math.inf)
    return bootstrap_of(
        _of, [sums], metric="perplexity", split=split, seed=seed, better="lower", clusters=clusters, within=within
    )


def _of(groups: list[Array]) -> float:
    nll, tokens = groups[0].T
    return perplexity(nll.tolist(), tokens.tolist())
