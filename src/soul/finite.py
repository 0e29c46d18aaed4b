"""Whether tensors hold numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Say whether every value is a number; of a sharded tensor, of this process's part. Sparse ones are not looked at.

    Devices are waited for once each.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])]), all_finite([])
        (False, True)
    """
    largest: dict[torch.device, list[torch.Tensor]] = {}
    for t in tensors:
        inside: Any = getattr(t, "to_local", None)
        part = t if inside is None else inside()
        if part.layout == torch.strided and part.numel():
            # of values themselves: no square that overflows
            largest.setdefault(part.device, []).append(torch.linalg.vector_norm(part, ord=math.inf).double())
    return all(math.isfinite(float(torch.stack(found).sum())) for found in largest.values())
