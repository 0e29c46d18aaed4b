"""Lion: the sign of a gradient blended with a longer momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from soul.optim._checks import check_common
from soul.optim._elementwise import ElementwiseRule, Kernel, host_scalar, move, moves, piece_size, sign
from soul.optim._fused import Call
from soul.optim._paths import ListKernel, Tensors, move_together, multi
from soul.optim._storage import Rounding, StateDtype, StoredSpec
from soul.optim.cost import RuleCost, elementwise_cost
from soul.registry import OPTIMIZERS


class Lion(ElementwiseRule):
    """Evolved sign momentum (arXiv 2302.06675, algorithm 2), a control without curvature.

    ``p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g)``, then ``m <- b2 m + (1 - b2) g``.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Size of the step of every coordinate.
        betas: ``b1``, the momentum's share in the step, and ``b2``, the decay of the momentum.
        weight_decay: Decoupled weight decay.
        state_dtype: Precision that averages are kept in between steps.
        rounding: How bf16 weights are written.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([5.0, -0.01])
        >>> Lion([p], lr=0.5).step()
        >>> p.data
        tensor([-0.5000,  0.5000])
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_dtype: StateDtype = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, state_dtype, rounding)

    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        del p
        b1, b2 = group["betas"]

        def kernel(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, u: torch.Tensor, *_: torch.Tensor) -> None:
            move(p, torch.lerp(m, g, 1 - b1, out=u).sign_(), group)
            m.lerp_(g, 1 - b2)

        return kernel

    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        del p
        (b1, b2), lr = group["betas"], host_scalar(group["lr"])

        def kernel(ps: Tensors, gs: Tensors, ms: Tensors) -> None:
            us = multi._foreach_lerp(ms, gs, 1 - b1)
            multi._foreach_sign_(us)
            move_together(ps, us, group, lr)
            multi._foreach_lerp_(ms, gs, 1 - b2)

        return kernel

    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        tensors, (b1, b2) = (p, p.grad, self.state[p]["exp_avg"]), group["betas"]
        return Call("lion", tensors, (1 - b1, 1 - b2, sign(group), *moves(group)), key=self._key(p))


@OPTIMIZERS.register("lion")
@dataclasses.dataclass(frozen=True)
class LionSpec(StoredSpec):
    """Sign of blended momentum (Lion, arXiv 2302.06675): a control without curvature.

    Attributes:
        betas: The momentum's share in the step, and the decay of the momentum.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self.lr, self.weight_decay, **{"betas[0]": self.betas[0], "betas[1]": self.betas[1]})

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> Lion:
        """Return :class:`Lion` over ``params``."""
        del model
        return Lion(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of one number a coordinate."""
        del model
        return elementwise_cost(
            params, slots=len(Lion.slots), written=1, piece=piece_size(device), dtype=self.slot_dtype
        )
