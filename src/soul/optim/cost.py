"""What an update rule takes in memory and arithmetic, told from shapes alone, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from soul.machine import has_bf16

_PRIMES = (11, 13, 17, 19, 23)


@dataclasses.dataclass(frozen=True)
class RuleCost:
    """What a rule keeps and does for given parameters; bytes, and floating-point operations.

    Attributes:
        state: Kept between steps, coordinate by coordinate or row by row: it is sharded as the parameters are.
        whole: Kept between steps by every process: Kronecker factors and what is derived from them.
        step: Taken by a step for its duration, beside parameters, gradients and what is kept.
        refresh: Taken by a curvature pass for its duration, beside gradients and an explicit estimate where it makes
            them.
        traffic: Read and written by a step, in place.
        products: Operations of a step's matrix products.
        per_position: Operations that watching a pass adds for each position that goes through the layers.
        derivation: Operations from one refresh to the first step after it (inverses, eigenbases).
        backward: Whether its curvature passes go backward.
        gradients: Whether they make gradients of layers' weights; in shards they do in any case.
    """

    state: int = 0
    whole: int = 0
    step: int = 0
    refresh: int = 0
    traffic: int = 0
    products: int = 0
    per_position: int = 0
    derivation: int = 0
    backward: bool = True
    gradients: bool = True

    @property
    def kept(self) -> int:
        """Bytes kept between steps by a single process."""
        return self.state + self.whole


def wide_size(p: torch.Tensor) -> int:
    """Return the bytes of a number kept for a coordinate of ``p`` in fp32 at least."""
    return torch.promote_types(p.dtype, torch.float32).itemsize


def multiplies_bf16(device: str) -> bool:
    """Say whether ``device`` multiplies bf16 in hardware; of a GPU that is not there it is believed."""
    return has_bf16(device) or (device.startswith("cuda") and not torch.cuda.is_available())


def elementwise_cost(
    params: Iterable[torch.Tensor],
    *,
    slots: int,
    written: int,
    piece: int,
    scalars: int = 0,
    dtype: torch.dtype | None = None,
) -> RuleCost:
    """Return the cost of a rule that keeps ``slots`` numbers for each coordinate.

    Args:
        params: The parameters.
        slots: Numbers kept for a coordinate.
        written: How many of them a step writes (it reads all).
        piece: Most coordinates that a step works on at a time, in four scratch vectors.
        scalars: Numbers of fp32 at least kept for each tensor.
        dtype: What the slots are kept in; None for fp32 at least. A step copies a piece of them to that.

    Example:
        >>> elementwise_cost([torch.empty(10, 3, device="meta")], slots=2, written=2, piece=8).state
        240
    """
    tensors = list(params)

    def size(p: torch.Tensor) -> int:
        return dtype.itemsize if dtype else wide_size(p)

    return RuleCost(
        state=sum(p.numel() * slots * size(p) + scalars * wide_size(p) for p in tensors),
        step=max(((4 + (slots if dtype else 0)) * wide_size(p) * min(piece, p.numel()) for p in tensors), default=0),
        traffic=sum(p.numel() * (3 * p.itemsize + (slots + written) * size(p)) for p in tensors),
    )


def plain_cost(params: Iterable[torch.Tensor], *, slots: int, scalars: int = 0) -> RuleCost:
    """Return the cost of one of torch's own rules, which keep state in the parameters' dtype and step in place.

    Args:
        params: The parameters.
        slots: Numbers kept for a coordinate.
        scalars: fp32 numbers kept for each tensor (torch counts steps in one).
    """
    tensors = list(params)
    return RuleCost(
        state=sum(p.numel() * slots * p.itemsize + 4 * scalars for p in tensors),
        traffic=sum(p.numel() * p.itemsize * (3 + 2 * slots) for p in tensors),
    )


def probed_cost(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], params: Iterable[torch.Tensor]
) -> RuleCost:
    """Return the cost of a rule that declares none, found from a step on a tiny tensor of each kind.

    Tensors stand in whose axes have lengths by which they are known again in the rule's state, so that a state with a
    number for each row, or each column, is scaled as it should be. What a step takes for its duration is unknown and
    taken to be a copy of the largest tensor for each one kept.

    Raises:
        ValueError: The rule cannot make a step on a tensor alone.
    """
    kinds: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
    for p in params:
        key = tuple(p.shape), p.dtype
        kinds[key] = kinds.get(key, 0) + 1
    state = step = traffic = 0
    for (shape, dtype), count in kinds.items():
        kept = _bytes_of_state(build, shape, dtype)
        numel = math.prod(shape)
        state += count * kept
        step = max(step, kept + numel * dtype.itemsize)
        traffic += count * (2 * kept + 3 * numel * dtype.itemsize)
    return RuleCost(state=state, step=step, traffic=traffic)


def _bytes_of_state(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], shape: Sequence[int], dtype: torch.dtype
) -> int:
    small = _PRIMES[: len(shape)]
    known = dict(zip(small, shape, strict=False)) | {math.prod(small): math.prod(shape)}
    p = torch.nn.Parameter(torch.ones(small, dtype=dtype))
    p.grad = torch.full_like(p, 1e-3)
    try:
        rule = build([p])
        rule.step()
    except Exception as error:  # whatever a class from elsewhere raises where it lacks a closure or a model
        raise ValueError(
            f"the memory of this optimizer is not known: it declares no cost(), and a step on a tensor fails ({error})"
        ) from error
    values = [value for value in rule.state[p].values() if isinstance(value, torch.Tensor)]
    return sum(math.prod(known.get(n, n) for n in value.shape) * value.itemsize for value in values)
