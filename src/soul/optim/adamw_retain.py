"""AdamW whose second moment comes from retain gradients only: a control between AdamW and Sophia."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from soul.curvature.spec import CurvatureSpec
from soul.optim._checks import check_above, check_between, check_common
from soul.optim._diagonal import DiagonalRule
from soul.optim._elementwise import Kernel, host_scalar, move, moves, piece_size, sign
from soul.optim._fused import Call
from soul.optim._paths import ListKernel, Tensors, add_together, move_together, multi
from soul.optim._storage import Rounding, StateDtype, StoredSpec, exact_dtype
from soul.optim.base import CurvatureOptimizerSpec
from soul.optim.cost import RuleCost, elementwise_cost
from soul.registry import OPTIMIZERS


def _check(*, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, relative_damping: float) -> None:
    check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    check_above("eps", eps, 0.0)
    check_between("relative_damping", relative_damping, 0.0, float("inf"))


class AdamWRetain(DiagonalRule):
    """AdamW with ``v`` the average of squared mean gradients of the retain loss, which :meth:`update_curvature` brings.

    It asks how much of Sophia's effect is that the denominator knows what to keep, and how much that it is curvature:
    the squared gradient of known labels is no curvature, but large where a step would hurt the retain loss most. Each
    step, with the gradient ``g`` of the unlearning loss, and each refresh, with ``g_r`` of the retain loss::

        m <- b1 m + (1 - b1) g             m_hat = m / (1 - b1^steps)
        v <- b2 v + (1 - b2) g_r * g_r     v_hat = v / (1 - b2^refreshes)
        p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat + relative_damping mean(v_hat)) + eps)

    In AdamW (arXiv 1711.05101) the gradient is in its own average, which bounds a step by about ``lr``. Here nothing
    does, so the mean over the parameter group keeps coordinates that the retain loss does not know of from steps of
    ``lr m / eps``.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Learning rate; the step of a coordinate whose forget gradient is as large as its retain gradient.
        betas: Decay of the average of ``g`` a step, and of ``g_r * g_r`` a refresh.
        eps: Floor of the denominator.
        weight_decay: Decoupled weight decay.
        relative_damping: Share of the group's mean ``v_hat`` that is added to it.
        state_dtype: Precision that averages are kept in between steps.
        rounding: How bf16 weights are written.

    Raises:
        ValueError: A hyper-parameter is out of range; a step before the first refresh.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = AdamWRetain([p], lr=0.5, relative_damping=0.0)
        >>> p.grad = torch.tensor([2.0, 4.0])  # the retain loss
        >>> optimizer.update_curvature()
        >>> p.grad = torch.tensor([2.0, 2.0])  # the unlearning loss
        >>> optimizer.step()
        >>> p.data
        tensor([-0.5000, -0.2500])
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        relative_damping: float = 0.1,
        state_dtype: StateDtype = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "relative_damping": relative_damping,
        }
        _check(**defaults)
        super().__init__(params, defaults, state_dtype, rounding)

    def _advance(self, moving: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        self._floors = {}
        for group in {id(group): group for group, _ in moving}.values():
            pool = self._pool(group)
            if pool.total is None:
                raise ValueError(
                    "AdamWRetain has no retain gradient to divide by: run a backward pass of the retain loss and "
                    "update_curvature() before the first step"
                )
            self._floors[id(group)] = group["relative_damping"] * pool.total / pool.count
        super()._advance(moving)

    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        b1, eps = group["betas"][0], group["eps"]
        m_share, v_share = 1 - b1 ** self.state[p]["step"], self._share(group, p)
        floor = self._floors[id(group)].to(p.device, exact_dtype(p))
        signed = self.state[p]["signed"]

        def kernel(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            del t
            m.lerp_(g, 1 - b1)
            torch.add(floor, v, alpha=v_share, out=u)
            if signed:
                torch.maximum(u, floor, out=u)
            u.sqrt_().add_(eps).mul_(m_share)
            move(p, torch.div(m, u, out=u), group)

        return kernel

    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        (b1, _), eps, lr = group["betas"], group["eps"], host_scalar(group["lr"])
        m_share, v_share = 1 - b1 ** self.state[p]["step"], self._share(group, p)
        floor = self._floors[id(group)].to(p.device, exact_dtype(p))
        signed = self.state[p]["signed"]

        def kernel(ps: Tensors, gs: Tensors, ms: Tensors, vs: Tensors) -> None:
            multi._foreach_lerp_(ms, gs, 1 - b1)
            us = multi._foreach_mul(vs, v_share)
            if signed:
                multi._foreach_clamp_min_(us, 0)
            add_together(us, floor)
            multi._foreach_sqrt_(us)
            multi._foreach_add_(us, eps)
            multi._foreach_mul_(us, m_share)
            move_together(ps, multi._foreach_div(ms, us), group, lr)

        return kernel

    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        state, b1 = self.state[p], group["betas"][0]
        denominator = self._share(group, p), self._floors[id(group)], group["eps"], 1 - b1 ** state["step"]
        numbers = 1 - b1, sign(group), *denominator, *moves(group)
        return Call("adamw_retain", (p, p.grad, state["exp_avg"], state["curvature"]), numbers, key=self._key(p))


@OPTIMIZERS.register("adamw_retain")
@dataclasses.dataclass(frozen=True)
class AdamWRetainSpec(CurvatureOptimizerSpec, StoredSpec):
    """AdamW (arXiv 1711.05101) with its second moment from retain gradients only: a control for what curvature adds.

    Attributes:
        betas: Decay of the average of the gradient a step, and of the retain gradient's square a refresh.
        eps: Floor of the denominator.
        relative_damping: Further floor under the root, as a share of the parameter group's mean second moment.
    """

    curvature: CurvatureSpec = dataclasses.field(default_factory=lambda: CurvatureSpec(estimator="squared_gradient"))
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    relative_damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(**self.own_settings())

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> AdamWRetain:
        """Return :class:`AdamWRetain` over ``params``."""
        del model
        return AdamWRetain(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of two numbers a coordinate."""
        del model
        return elementwise_cost(
            params, slots=len(AdamWRetain.slots), written=1, piece=piece_size(device), scalars=1, dtype=self.slot_dtype
        )
