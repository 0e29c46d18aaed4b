"""The ways an elementwise step can be computed, the choice between them, and the multi-tensor way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from soul.optim import _fused
from soul.optim._storage import round_by_noise

StepPath = Literal["auto", "reference", "foreach", "fused"]
"""``reference`` steps tensor by tensor in plain torch, and the others are tested against it; ``foreach`` steps many
tensors by one call; ``fused`` makes one pass over memory by compiled kernels, on CPUs, where numba is there."""

Moving = list[tuple[dict[str, Any], torch.Tensor]]
Tensors = list[torch.Tensor]
# The multi-tensor functions that torch.optim is made of, which torch's list of public names leaves out.
multi: Any = torch
# An update in place on lists of flat pieces: (ps, gs, *slots); the gs must not be written to.
ListKernel = Callable[..., None]

VARIABLE = "SOUL_STEP"
# Mean size below which a CPU takes longer to make a call than to do the work.
SMALL = 1 << 16
# Below, compiling or loading a kernel takes longer than it saves.
FUSED_FROM = 1 << 20


def checked(path: str, where: str = "path") -> StepPath:
    """Return ``path``.

    Raises:
        ValueError: There is no such path.
    """
    if path not in get_args(StepPath):
        raise ValueError(f"{where} must be one of {', '.join(get_args(StepPath))}, not {path!r}")
    return path  # type: ignore[return-value]  # just checked


def wanted_path() -> StepPath:
    """Return what the environment asks for, ``auto`` where it says nothing."""
    return checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def fuses(path: StepPath, params: Sequence[torch.Tensor]) -> bool:
    """Say whether a rule over ``params`` takes the fused path with those of its tensors that fit it.

    Raises:
        ValueError: It must, and numba is not there.
    """
    if path == "fused":
        if not _fused.available():
            raise ValueError(f"the fused step needs numba: pip install numba, or leave {VARIABLE} out")
        return True
    large = sum(p.numel() for p in params if p.device.type == "cpu") >= FUSED_FROM
    return path == "auto" and large and _fused.available()


def together(path: StepPath, params: Tensors) -> bool:
    """Say whether ``params``, which are alike, are stepped by multi-tensor calls.

    These save the time that calls take, and so serve wherever a call starts a kernel on a device; on a CPU small
    tensors, while large ones are quicker in pieces that stay in the cache.
    """
    small = sum(p.numel() for p in params) < len(params) * SMALL
    return path == "foreach" or (path != "reference" and (params[0].device.type != "cpu" or small))


def move_together(ps: Tensors, us: Tensors, group: dict[str, Any], lr: Any) -> None:
    """Do ``p <- p (1 - lr wd) - lr u`` in place; ``us`` are used up."""
    if group["weight_decay"]:
        multi._foreach_mul_(ps, 1 - lr * group["weight_decay"])
    if isinstance(lr, torch.Tensor):
        multi._foreach_mul_(us, lr)
        multi._foreach_sub_(ps, us)
    else:
        multi._foreach_add_(ps, us, alpha=-lr)


def add_together(us: Tensors, value: torch.Tensor) -> None:
    """Add a 0-dim tensor to each in place, without waiting for the device that it lives on."""
    if value.device.type == "cpu":
        multi._foreach_add_(us, float(value))
    else:  # the call that takes a tensor reads it where shapes keep it from the fast way
        multi._foreach_add_(us, [value] * len(us))


def buckets(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield lists of pieces ``(tensor, start, stop)`` that have at most ``limit`` coordinates together.

    Example:
        >>> list(buckets([3, 5, 1], limit=4))
        [[(0, 0, 3)], [(1, 0, 4)], [(1, 4, 5), (2, 0, 1)]]
    """
    bucket: list[tuple[int, int, int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        for start in range(0, size, limit):
            stop = min(size, start + limit)
            if bucket and filled + stop - start > limit:
                yield bucket
                bucket, filled = [], 0
            bucket.append((index, start, stop))
            filled += stop - start
    if bucket:
        yield bucket


def sweep_together(
    params: Tensors,
    gradients: Tensors,
    slots: Sequence[Tensors],
    kernel: ListKernel,
    *,
    limit: int,
    dtype: torch.dtype,
    negate: bool,
    keys: Sequence[int],
    starts: Sequence[int],
) -> None:
    """Run ``kernel`` over all coordinates of ``params``, at most ``limit`` of them at a time.

    Args:
        params: Parameters of one dtype and device.
        gradients: Theirs.
        slots: For each slot of the state, that of each parameter, as a vector.
        kernel: The update.
        limit: Most coordinates at a time, which is what it takes of memory.
        dtype: What is computed in.
        negate: Take gradients with the opposite sign.
        keys: What the noise is drawn from that each parameter is rounded with; 0 rounds to nearest.
        starts: Where each begins in the whole that it is a part of.
    """
    flat = [p.reshape(-1) for p in params]  # views where p is contiguous, copies to write back where not
    gradients = [g.reshape(-1) for g in gradients]
    for pieces in buckets([p.numel() for p in params], limit):

        def cut(tensors: Tensors, pieces: list[tuple[int, int, int]] = pieces) -> list[torch.Tensor]:
            return [tensors[index][start:stop] for index, start, stop in pieces]

        ps, gs = cut(flat), exactly(cut(gradients), dtype)
        gs = list(multi._foreach_neg(gs)) if negate else gs
        work = exactly(ps, dtype)
        kept = [cut(slot) for slot in slots]
        states = [exactly(slot, dtype) for slot in kept]
        kernel(work, gs, *states)
        for old, new in [(ps, work), *zip(kept, states, strict=True)]:
            if old is ps and any(keys):
                for (index, start, _), piece, value in zip(pieces, ps, work, strict=True):
                    round_by_noise(value, piece, keys[index], starts[index] + start)
            elif new is not old:
                multi._foreach_copy_(old, new)
    for p, piece in zip(params, flat, strict=True):
        if not p.is_contiguous():
            p.copy_(piece.view(p.shape))


def exactly(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return ``tensors`` in ``dtype``: themselves, or copies."""
    if tensors[0].dtype == dtype:
        return tensors
    out = [torch.empty_like(t, dtype=dtype) for t in tensors]
    multi._foreach_copy_(out, tensors)
    return out
