"""Signum: the sign of the momentum; what Sophia becomes where every coordinate is at its bound."""

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


class Signum(ElementwiseRule):
    """Sign of an average of gradients (arXiv 1802.04434, algorithm 2), a control without curvature.

    ``m <- b m + (1 - b) g``, ``p <- p (1 - lr wd) - lr sign(m)``; debiasing ``m`` would not change its sign.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Size of the step of every coordinate.
        momentum: Decay ``b`` of the average; 0 gives signSGD.
        weight_decay: Decoupled weight decay.
        state_dtype: Precision that averages are kept in between steps.
        rounding: How bf16 weights are written.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(3))
        >>> p.grad = torch.tensor([5.0, -0.01, 0.0])
        >>> Signum([p], lr=0.5).step()
        >>> p.data
        tensor([-0.5000,  0.5000,  0.0000])
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        state_dtype: StateDtype = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        check_common(lr, weight_decay, momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, state_dtype, rounding)

    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        del p
        beta = group["momentum"]

        def kernel(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, u: torch.Tensor, *_: torch.Tensor) -> None:
            m.lerp_(g, 1 - beta)
            move(p, torch.sign(m, out=u), group)

        return kernel

    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        del p
        beta, lr = group["momentum"], host_scalar(group["lr"])

        def kernel(ps: Tensors, gs: Tensors, ms: Tensors) -> None:
            multi._foreach_lerp_(ms, gs, 1 - beta)
            move_together(ps, multi._foreach_sign(ms), group, lr)

        return kernel

    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        tensors = p, p.grad, self.state[p]["exp_avg"]
        return Call("signum", tensors, (1 - group["momentum"], sign(group), *moves(group)), key=self._key(p))


@OPTIMIZERS.register("signum")
@dataclasses.dataclass(frozen=True)
class SignumSpec(StoredSpec):
    """Sign of the momentum (Signum, arXiv 1802.04434): Sophia's control without curvature.

    Attributes:
        momentum: Decay of the average of gradients.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self.lr, self.weight_decay, momentum=self.momentum)

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> Signum:
        """Return :class:`Signum` over ``params``."""
        del model
        return Signum(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of one number a coordinate."""
        del model
        return elementwise_cost(
            params, slots=len(Signum.slots), written=1, piece=piece_size(device), dtype=self.slot_dtype
        )
