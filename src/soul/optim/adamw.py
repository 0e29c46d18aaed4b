"""AdamW: torch's own, fused where it can be, with the verbs the trainer asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from soul.optim._checks import check_above, check_common
from soul.optim._torch import TorchRule, fusable, tensors
from soul.optim.base import OptimizerSpec
from soul.optim.cost import RuleCost, plain_cost
from soul.registry import OPTIMIZERS


class AdamW(TorchRule, torch.optim.AdamW):
    """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2), the first-order baseline.

    ``p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps)`` with debiased averages of ``g`` and ``g * g``. One fused
    pass over memory where all parameters are contiguous and on CPU or CUDA. State has the parameters' dtype
    (:class:`soul.optim._torch.TorchRule`).

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Learning rate; about the size of the largest steps.
        betas: Decay of the averages of ``g`` and ``g * g``.
        eps: Floor of the denominator.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([5.0, -0.01])
        >>> AdamW([p], lr=0.5).step()
        >>> p.data
        tensor([-0.5000,  0.5000])
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
        check_above("eps", eps, 0.0)
        groups: list[Any] = list(params)
        fused = all(fusable(p) for group in groups for p in tensors(group))
        torch.optim.AdamW.__init__(
            self, groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused or None
        )


@OPTIMIZERS.register("adamw")
@dataclasses.dataclass(frozen=True)
class AdamWSpec(OptimizerSpec):
    """Adam with decoupled weight decay (AdamW, arXiv 1711.05101): the first-order baseline.

    Attributes:
        betas: Decay of the averages of the gradient and of its square.
        eps: Floor of the denominator.
    """

    lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self.lr, self.weight_decay, **{"betas[0]": self.betas[0], "betas[1]": self.betas[1]})
        check_above("eps", self.eps, 0.0)

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> AdamW:
        """Return :class:`AdamW` over ``params``."""
        del model
        return AdamW(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of two numbers a coordinate, in the parameters' dtype."""
        del model, device
        return plain_cost(params, slots=2, scalars=1)
