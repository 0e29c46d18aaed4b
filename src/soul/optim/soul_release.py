"""The optimizer that SOUL's released code runs, which is not the one its paper describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from soul.optim._checks import check_above, check_common
from soul.optim._elementwise import Direction, ElementwiseRule, Kernel, host_scalar, move, moves, piece_size, sign
from soul.optim._fused import Call
from soul.optim._paths import ListKernel, Tensors, move_together, multi
from soul.optim._storage import Rounding, StateDtype, StoredSpec, exact_dtype
from soul.optim.cost import RuleCost, elementwise_cost
from soul.registry import OPTIMIZERS

FLOOR = 1e-15  # of the denominator


def _check(*, lr: float, weight_decay: float, betas: tuple[float, float], rho: float, curvature_batch: float) -> None:
    check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    check_above("rho", rho, 0.0)
    check_above("curvature_batch", curvature_batch, 0.0)


class SoulRelease(ElementwiseRule):
    """SOUL's step as released, faults included (arXiv 2404.18239; OPTML-Group/SOUL 30f7a41, ``src/optim/sophia.py``).

    Each step, with the gradient ``g`` of the whole unlearning loss, clipped to norm 1 by the trainer::

        h <- b2 h + (1 - b2) g * g
        m <- b1 m + (1 - b1) g
        p <- p (1 - lr wd)
        m <- b1 m + (1 - b1) g
        p <- p - lr sign(m) min(1, |m| / (rho curvature_batch h + 1e-15))

    The faults: ``h`` is the square of the training gradient, renewed at every step, and so no curvature; the momentum
    is updated twice, an effective ``b1^2``; ``curvature_batch`` stays 5120 whatever the batch, so that in models of
    billions of parameters nearly every step is a sign step. The released code keeps its state in the parameters'
    dtype; here it is fp32, as in a released run with fp32 weights. Use :class:`soul.optim.Sophia` to unlearn and this
    to reproduce or to compare.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Bound of one step of one coordinate.
        betas: Decay of the momentum (applied twice a step) and of the squared gradient.
        rho: Factor of the denominator.
        curvature_batch: The constant that the released code calls ``bs``.
        weight_decay: Decoupled weight decay.
        state_dtype: Precision that averages are kept in between steps.
        rounding: How bf16 weights are written.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SoulRelease([p], lr=0.1, weight_decay=0.0)
        >>> p.grad = torch.tensor([1.0, 0.001])
        >>> optimizer.step()
        >>> p.data
        tensor([0.9981, 0.9000])
    """

    slots = ("exp_avg", "grad_sq")

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 5e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        curvature_batch: float = 5120,
        weight_decay: float = 0.1,
        state_dtype: StateDtype = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "curvature_batch": curvature_batch,
            "weight_decay": weight_decay,
        }
        _check(**defaults)
        super().__init__(params, defaults, state_dtype, rounding)

    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        b1, b2 = group["betas"]
        direction = self._direction(group, p)

        def kernel(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            del t
            h.mul_(b2).addcmul_(g, g, value=1 - b2)
            m.mul_(b1).add_(g, alpha=1 - b1)
            m.mul_(b1).add_(g, alpha=1 - b1)
            move(p, direction(m, h, u), group)

        return kernel

    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        del p
        (b1, b2), lr = group["betas"], host_scalar(group["lr"])
        slope = group["rho"] * group["curvature_batch"]

        def kernel(ps: Tensors, gs: Tensors, ms: Tensors, hs: Tensors) -> None:
            multi._foreach_mul_(hs, b2)
            multi._foreach_addcmul_(hs, gs, gs, value=1 - b2)
            for _ in range(2):
                multi._foreach_mul_(ms, b1)
                multi._foreach_add_(ms, gs, alpha=1 - b1)
            us = multi._foreach_mul(hs, slope)
            multi._foreach_add_(us, FLOOR)
            us = multi._foreach_div(ms, us)
            multi._foreach_clamp_min_(us, -1)
            multi._foreach_clamp_max_(us, 1)
            move_together(ps, us, group, lr)

        return kernel

    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        state, (b1, b2) = self.state[p], group["betas"]
        numbers = b1, 1 - b1, b2, 1 - b2, sign(group), group["rho"] * group["curvature_batch"], FLOOR
        return Call(
            "soul_release", (p, p.grad, state["exp_avg"], state["grad_sq"]), (*numbers, *moves(group)), key=self._key(p)
        )

    def _direction(self, group: dict[str, Any], p: torch.Tensor) -> Direction:
        slope = group["rho"] * group["curvature_batch"]
        floor = torch.full((), FLOOR, dtype=exact_dtype(p), device=p.device)

        def direction(m: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            torch.add(floor, h, alpha=slope, out=out)
            return torch.div(m, out, out=out).clamp_(-1, 1)

        return direction


@OPTIMIZERS.register("soul_release")
@dataclasses.dataclass(frozen=True)
class SoulReleaseSpec(StoredSpec):
    """SOUL's optimizer exactly as its released code runs it, faults included; to reproduce and to compare.

    Attributes:
        betas: Decay of the momentum (applied twice a step) and of the squared gradient.
        rho: Factor of the denominator.
        curvature_batch: The constant that the released code calls ``bs``.
    """

    lr: float = 5e-6
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    rho: float = 0.04
    curvature_batch: float = 5120

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(**self.own_settings())

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> SoulRelease:
        """Return :class:`SoulRelease` over ``params``."""
        del model
        return SoulRelease(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of two numbers a coordinate."""
        del model
        return elementwise_cost(
            params, slots=len(SoulRelease.slots), written=2, piece=piece_size(device), dtype=self.slot_dtype
        )
