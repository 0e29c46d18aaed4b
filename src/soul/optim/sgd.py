"""SGD: torch's own, with decoupled weight decay; the plainest control."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from soul.optim._checks import check_common
from soul.optim._elementwise import host_scalar
from soul.optim._torch import TorchRule, fusable, tensors
from soul.optim.base import OptimizerSpec
from soul.optim.cost import RuleCost, plain_cost
from soul.registry import OPTIMIZERS


class SGD(TorchRule, torch.optim.SGD):
    """Gradient descent with heavy-ball momentum, a control without curvature or scale.

    ``m <- b m + g``, ``p <- p (1 - lr wd) - lr m``; with Nesterov's momentum ``g + b m`` in place of ``m``. A constant
    gradient moves ``lr / (1 - b)`` a step. Decay is decoupled, where torch's own adds it to the gradient.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Learning rate, in units of parameters over gradients.
        momentum: Decay ``b`` of the sum of gradients.
        nesterov: Look ahead.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([5.0, -0.01])
        >>> SGD([p], lr=0.5).step()
        >>> p.data
        tensor([-2.5000,  0.0050])
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        check_common(lr, weight_decay, momentum=momentum)
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0")
        groups: list[Any] = list(params)
        fused = all(fusable(p) for group in groups for p in tensors(group))
        torch.optim.SGD.__init__(
            self,
            groups,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fused=fused or None,
        )

    def _advance(self, closure: Callable[[], Any] | None = None) -> None:
        del closure  # it has been called
        decays = [group["weight_decay"] for group in self.param_groups]
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.mul_(1 - host_scalar(group["lr"]) * decay)
                group["weight_decay"] = 0.0  # else torch would add it to the gradient too
            super()._advance()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


@OPTIMIZERS.register("sgd")
@dataclasses.dataclass(frozen=True)
class SGDSpec(OptimizerSpec):
    """Gradient descent with momentum: a control without curvature or scale.

    Attributes:
        momentum: Decay of the sum of gradients.
        nesterov: Look ahead.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self.lr, self.weight_decay, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> SGD:
        """Return :class:`SGD` over ``params``."""
        del model
        return SGD(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of one number a coordinate, in the parameters' dtype; of none without momentum."""
        del model, device
        return plain_cost(params, slots=1 if self.momentum else 0)
