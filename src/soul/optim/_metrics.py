"""Numbers about a step: the share of coordinates inside the bound, and how near the step is to its sign."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from soul.optim._shards import summed_numbers

SAMPLE = 1 << 17
"""Coordinates looked at in each group: a share then has a standard error below 0.0014."""


def systematic_views(flat: Sequence[torch.Tensor], limit: int = SAMPLE) -> list[torch.Tensor]:
    """Return views of every k-th coordinate of the tensors laid end to end; all where there are at most ``limit``.

    ``k`` is prime, so that it walks through all columns of matrices whatever their width. The same sizes give the same
    coordinates, so what is compared was sampled alike.

    Example:
        >>> systematic_views([torch.arange(5), torch.arange(5, 10)], limit=4)
        [tensor([1, 4]), tensor([7])]
    """
    total = sum(t.numel() for t in flat)
    stride = _prime_from(-(-total // limit)) if total > limit else 1
    start, views = stride // 2, []
    for t in flat:
        views.append(t[start::stride])
        start = (start - t.numel()) % stride
    return views


def _prime_from(n: int) -> int:
    while any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
        n += 1
    return n


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Sampled coordinates of a step.

    Attributes:
        u: The step before the learning rate.
        m: The momentum it was made from, of the same sign.
        lr: The learning rate.
        weight: Coordinates that each sampled one stands for.
        embedding: Whether they are counted apart.
        of: A parameter they are of; where that is sharded, so are they.
    """

    u: torch.Tensor
    m: torch.Tensor
    lr: float
    weight: float
    embedding: bool
    of: torch.Tensor


def step_metrics(samples: Sequence[Sampled]) -> dict[str, float]:
    """Return ``win_rate``, ``win_rate_embedding``, ``cos_sign`` and ``cos_momentum``, those that are defined."""
    counts: dict[str, list[float]] = {}
    n = size = sign = momentum = norm = 0.0
    for s in samples:
        u, m = s.u, s.m
        length = u.abs()
        found = [(m != 0).sum(), (length >= 1).sum(), u.dot(u), length.sum(), u.dot(m), m.dot(m)]
        moving, clipped, uu, one, um, mm = summed_numbers([s.weight * float(v) for v in found], s.of)
        count = counts.setdefault("win_rate_embedding" if s.embedding else "win_rate", [0.0, 0.0])
        count[0] += moving
        count[1] += clipped
        n += moving
        size += s.lr**2 * uu
        sign += s.lr * one
        momentum += s.lr * um
        norm += mm
    out = {name: 1 - clipped / moving for name, (moving, clipped) in counts.items() if moving}
    if size and norm:
        out |= {"cos_sign": sign / math.sqrt(size * n), "cos_momentum": momentum / math.sqrt(size * norm)}
    return out
