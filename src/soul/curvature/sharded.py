"""Curvature passes over weights that are sharded (FSDP2): squares are summed where gradients would be averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from soul import processes
from soul.curvature.estimators import ESTIMATORS
from soul.curvature.spec import CurvatureSpec


def is_sharded(model: nn.Module) -> bool:
    """Say whether ``torch.distributed.fsdp.fully_shard`` was called on ``model``."""
    return isinstance(model, FSDPModule)


def is_engine(model: nn.Module) -> bool:
    """Say whether ``model`` is DeepSpeed's wrapper: its hooks take what arrives at parameters for loss gradients."""
    return type(model).__name__ == "DeepSpeedEngine" and type(model).__module__.startswith("deepspeed.")


def reshard(model: nn.Module) -> None:
    """Give back whole weights that a forward pass has gathered and no backward pass is to come for.

    Units that FSDP2 keeps gathered after a forward pass (the root, final norm and head) are resharded by the backward
    pass alone. Left as they are, ``model.parameters()`` are not those that the optimizer steps: their gradients are not
    emptied, and the next pass sees the weights before the step. Where nothing is sharded there is nothing to do.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check(spec: CurvatureSpec, *, watches: bool) -> None:
    """Make sure that passes of this kind are possible over sharded weights.

    Raises:
        ValueError: They are not.
    """
    fit = ", ".join(name for name, kind in ESTIMATORS.items() if kind.cotangent)
    if watches:
        raise ValueError("an optimizer that watches whole layers does not work on sharded weights (FSDP2): use DDP")
    if ESTIMATORS[spec.estimator].diagonal is not None:
        raise ValueError(
            f"curvature.estimator {spec.estimator} differentiates twice, which sharded weights (FSDP2) cannot be: "
            f"choose one of {fit}, or use DDP"
        )
    if spec.shuffled:
        raise ValueError("curvature.shuffled permutes whole tensors, and weights are sharded (FSDP2): use DDP")


class _Sum:
    """Sums over processes, of gradients or of their squares, in place of FSDP2's reduce-scatter."""

    def __init__(self) -> None:
        self.squares = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return space, as torch's own does."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Reduce and scatter; ``op``, torch's, averages gradients."""
        if self.squares:
            input_tensor.square_()
            op = dist.ReduceOp.SUM
        scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its older name
        return scatter(output=output_tensor, input=input_tensor, op=op, group=group, async_op=async_op)


@contextlib.contextmanager
def squares(model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass adds to each shard's ``grad`` the sum over processes of their gradients' squares.

    A process's gradient is whole for a moment, in the buffer that FSDP2 reduces and scatters: there it is squared, so
    nothing is kept besides. ``M`` backward passes in each of ``R`` processes leave what the squares of ``R * M``
    micro-batches add up to.

    Raises:
        ValueError: This version of torch has no such seam.
    """
    parts: list[Any] = [module for module in model.modules() if is_sharded(module)]
    if not all(hasattr(part, "set_custom_reduce_scatter") for part in parts):
        raise ValueError(
            f"curvature of sharded weights needs torch 2.8 or later, not {torch.__version__}: upgrade torch, or use DDP"
        )
    comm = getattr(model, "_soul_reduce_scatter", None)
    if comm is None:
        comm = _Sum()
        object.__setattr__(model, "_soul_reduce_scatter", comm)  # no submodule, and in no checkpoint
        for part in parts:
            part.set_custom_reduce_scatter(comm)
    try:
        comm.squares = True
        for part in parts:
            part.set_gradient_divide_factor(1.0)
        yield
    finally:
        comm.squares = False
        for part in parts:
            part.set_gradient_divide_factor(float(processes.count()))  # the mean, as ever


def taken(p: torch.Tensor) -> torch.Tensor:
    """Return what stands in ``p.grad``, in fp32 at least, and empty it; zero where nothing does."""
    wide = torch.promote_types(p.dtype, torch.float32)
    found = torch.zeros_like(p, dtype=wide) if p.grad is None else p.grad.to(wide)
    p.grad = None
    return found
