"""The fused path on CPUs: each rule's arithmetic in one pass over memory, compiled by numba, without a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from soul.optim._shards import local, start_of

# Large enough that calling a kernel costs next to nothing, small enough that threads end together.
TILE = 1 << 19


Tile = tuple[Callable[..., float], tuple[Any, ...]]
"""A kernel and its arguments."""


class Call(NamedTuple):
    """A kernel on whole tensors, to be cut into tiles.

    Attributes:
        kernel: Its name in :mod:`soul.optim._kernels`.
        tensors: fp32 or bf16, contiguous, on the CPU, of one size; or sharded, and this process's parts are that.
        scalars: Its coefficients.
        key: What the noise is drawn from that a weight is rounded with; 0 rounds to nearest; None where the kernel
            writes no weight.
    """

    kernel: str
    tensors: tuple[torch.Tensor, ...]
    scalars: tuple[Any, ...]
    key: int | None = None


@functools.cache
def available() -> bool:
    """Say whether numba is there and compiles."""
    try:
        import numba

        from soul.optim import _kernels
    except Exception:  # noqa: BLE001 - a numba that does not fit this Python or numpy fails in its own ways
        return False
    return bool(_kernels) and not numba.config.DISABLE_JIT  # type: ignore[attr-defined]  # set as it is imported


def fits(*tensors: torch.Tensor) -> bool:
    """Say whether kernels can work on these tensors."""
    for t in map(local, tensors):
        if t.dtype not in (torch.float32, torch.bfloat16) or not t.is_cpu or not t.is_contiguous():
            return False
    return True


def run(calls: Sequence[Call]) -> list[float]:
    """Make the calls, in as many threads as torch has, and return the sum of each.

    Tiles do not depend on the number of threads, and their sums are added in order: neither do results.
    """
    tiles: list[Tile] = []
    owners: list[int] = []
    known: dict[Any, tuple[Any, ...]] = {}  # parameters of a group share their coefficients
    for index, call in enumerate(calls):
        arrays = [array(t) for t in call.tensors]
        kernel = _ready(call.kernel, tuple(a.dtype for a in arrays))
        scalars = known.get(call[2:])
        if scalars is None:
            scalars = known[call[2:]] = _scalars(call)
        begin = start_of(call.tensors[0]) if call.key else 0
        for start in range(0, arrays[0].size, TILE):
            place = () if call.key is None else (np.uint32((begin + start) & 0xFFFFFFFF),)
            tiles.append((kernel, (*(a[start : start + TILE] for a in arrays), *scalars, *place)))
            owners.append(index)
    out = [0.0] * len(calls)
    for index, value in zip(owners, run_tiles(tiles), strict=True):
        out[index] += value
    return out


def run_tiles(tiles: Sequence[Tile]) -> list[float]:
    """Call kernels, in as many threads as torch has, and return what each returned."""
    out = [0.0] * len(tiles)
    todo = iter(enumerate(tiles))  # threads take turns with it

    def work() -> None:
        for at, (kernel, args) in todo:
            out[at] = kernel(*args)

    threads = min(torch.get_num_threads(), len(tiles))
    if threads <= 1:
        work()
        return out
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return out


def array(t: torch.Tensor) -> np.ndarray:
    """Return the memory of a tensor that :func:`fits`, as a vector."""
    t = local(t.detach() if t.requires_grad else t)
    whole = t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()
    return whole.reshape(-1)


def _scalars(call: Call) -> tuple[Any, ...]:
    numbers = tuple(np.float32(float(value)) for value in call.scalars)
    return numbers if call.key is None else (*numbers, np.uint32(call.key))


@functools.cache
def _ready(name: str, dtypes: tuple[np.dtype, ...]) -> Any:
    """Return a kernel that is compiled for arrays of these types."""
    from numba import njit

    from soul.optim import _kernels

    kernel = getattr(_kernels, name)
    code = kernel.py_func.__code__
    names = code.co_varnames[len(dtypes) : code.co_argcount]
    scalars = [np.uint32(0) if n in ("key", "start") else np.float32(0) for n in names]
    arguments = [*(np.empty(0, dtype) for dtype in dtypes), *scalars]
    try:
        kernel(*arguments)
    except OSError:  # it is compiled, but cannot be kept: a full disk
        kernel = njit(**kernel.targetoptions)(kernel.py_func)
        kernel(*arguments)
    return kernel
