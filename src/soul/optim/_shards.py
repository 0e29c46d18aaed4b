"""Parameters of which a process has a shard: its numbers, and sums over all shards.

Shards are ``DTensor`` (FSDP2), or plain tensors that :func:`mark_part` was told of (ZeRO). For any other tensor
everything here is the tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist


def is_sharded(t: torch.Tensor) -> bool:
    """Say whether a process has only a part of ``t``."""
    return any(True for _ in _groups(t))


def mark_part(t: torch.Tensor, group: dist.ProcessGroup, size: int) -> None:
    """Remember that a plain tensor is a part of one with ``size`` coordinates, that ``group`` divides among it."""
    t.soul_part = (group, size)  # type: ignore[attr-defined]  # an attribute of ours


def size_of(t: torch.Tensor) -> int:
    """Return how many coordinates all parts of ``t`` have together."""
    part = getattr(t, "soul_part", None)
    return t.numel() if part is None else part[1]


def local(t: torch.Tensor) -> torch.Tensor:
    """Return this process's part of ``t``, sharing its memory."""
    inside: Any = getattr(t, "to_local", None)
    return t if inside is None else inside()


def start_of(t: torch.Tensor) -> int:
    """Return where this process's part of ``t`` begins in the whole, of parts laid end to end as rows of it are."""
    whole: Any = t
    if not hasattr(whole, "placements"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    return sum(at * math.prod(sizes[:dim]) * math.prod(whole.shape[dim + 1 :]) for dim, at in enumerate(offsets))


def summed(value: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """Return ``value``, of this process's part of ``over``, added up in place over all parts of it."""
    for group in _groups(over):
        dist.all_reduce(value, group=group)
    return value


def summed_numbers(values: Sequence[float], over: torch.Tensor) -> list[float]:
    """Return what :func:`summed` does, of plain numbers."""
    if not is_sharded(over):
        return list(values)
    return summed(torch.tensor(values, dtype=torch.float64, device=over.device), over).tolist()


def gathered(values: torch.Tensor, over: torch.Tensor, fill: float) -> torch.Tensor:
    """Return the values ``[n]`` of all parts of ``over``, end to end, with ``fill`` where a part has fewer."""
    for group in _groups(over):
        longest = torch.tensor(len(values), device=values.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
        mine = values.new_full((int(longest),), fill)
        mine[: len(values)] = values
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        values = torch.cat(parts)
    return values


def _groups(t: torch.Tensor) -> Iterator[Any]:
    """Yield the groups of processes that divide ``t`` among them; those that hold copies of it are no such groups."""
    whole: Any = t
    if hasattr(whole, "soul_part"):
        yield whole.soul_part[0]
    for dim, placement in enumerate(getattr(t, "placements", ())):
        if placement.is_shard():
            yield whole.device_mesh.get_group(dim)
