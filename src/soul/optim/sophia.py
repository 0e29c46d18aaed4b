"""Sophia: momentum divided by an estimate of the diagonal curvature, with a bound on every coordinate's step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from soul.optim._elementwise import ElementwiseRule, Kernel, check_above, check_between, check_common
from soul.optim.base import OptimizerSpec
from soul.registry import OPTIMIZERS


def _check(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    rho: float,
    damping: float,
    relative_damping: float,
    interval: int,
) -> None:
    check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    check_above("rho", rho, 0.0)
    check_above("damping", damping, 0.0)  # 0 / 0 where a coordinate has neither gradient nor curvature
    check_between("relative_damping", relative_damping, 0.0, float("inf"))
    if interval < 1:
        raise ValueError(f"interval must be 1 step or more, not {interval}")


class Sophia(ElementwiseRule):
    """Clipped, diagonally preconditioned momentum (arXiv 2305.14342, algorithm 3), with both averages debiased.

    Each step, with the gradient ``g``, and each refresh, with the curvature gradient ``g_c``::

        m <- b1 m + (1 - b1) g             m_hat = m / (1 - b1^steps)
        h <- b2 h + (1 - b2) g_c * g_c     h_hat = h / (1 - b2^refreshes)
        p <- p (1 - lr wd) - lr clip(m_hat / (rho h_hat + damping'), -1, 1)
        damping' = damping + relative_damping * rho * mean(h_hat)

    Where it parts from the paper: debiasing, without which ``h`` would be several times too small over the few
    hundred steps of an unlearning run and nearly every coordinate at its bound; damping is added, not a maximum; and
    ``g_c * g_c`` needs no factor of the batch size (see :mod:`soul.optim.curvature`).

    Before the first :meth:`update_curvature` there is no curvature: with the default damping the step is then the
    sign of the momentum, and a warning says so once.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Bound of one step of one coordinate.
        betas: Decay of the momentum a step, and of the curvature a refresh.
        rho: How much curvature counts: the trust region is ``|m_hat| < rho h_hat``. Larger means smaller, more
            Newton-like steps and a higher win rate; 0.1 to 0.5 of the coordinates is usual for Sophia.
        weight_decay: Decoupled weight decay.
        damping: Floor of the denominator, in units of the gradient: a coordinate without curvature takes the
            gradient step ``lr m_hat / damping`` while ``|m_hat| < damping``, and a step of full length beyond. A
            typical gradient entry is near ``norm / sqrt(parameters)``, 1e-4 for 1e8 parameters and a norm of 1.
        relative_damping: The same floor as a share of the tensor's mean ``rho h_hat``, so that it needs no knowledge of
            the scale; 0.1 keeps coordinates whose estimate came out near 0 by chance from full steps.
        interval: Steps from one refresh to the next, for :meth:`curvature_due`.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Sophia([p], lr=0.1, rho=1.0)
        >>> p.grad = torch.tensor([2.0, 2.0])  # a curvature pass: h is 4
        >>> optimizer.update_curvature()
        >>> p.grad = torch.tensor([1.0, 9.0])
        >>> optimizer.step()
        >>> p.data
        tensor([0.9750, 0.9000])
        >>> optimizer.metrics()
        {'win_rate': 0.5}
    """

    slots = ("exp_avg", "curvature")

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        weight_decay: float = 0.0,
        damping: float = 1e-12,
        relative_damping: float = 0.0,
        interval: int = 10,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "damping": damping,
            "relative_damping": relative_damping,
            "interval": interval,
        }
        _check(**defaults)
        super().__init__(params, defaults)

    def curvature_due(self, step: int) -> bool:
        """Say whether ``step``, counted from 0, is a multiple of the interval; the first step is."""
        return step % self.param_groups[0]["interval"] == 0

    @torch.no_grad()
    def update_curvature(self) -> None:
        """Average the squared ``p.grad`` into ``h``; gradients stay, for the caller to clear.

        The gradient must not be clipped, and its square must be an unbiased estimate of the diagonal curvature of the
        mean loss, as :func:`soul.optim.curvature.backward_curvature` leaves it.
        """
        for group, p in self._with_gradient():
            state = self._state_of(p)
            state["refreshes"] += 1
            self._sweep(p, state, _refresh(group["betas"][1]))

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        state = super()._state_of(p)
        state.setdefault("refreshes", 0)
        return state

    def _kernel(self, group: dict[str, Any], state: dict[str, Any]) -> Kernel:
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * group["weight_decay"]
        # m_hat / (rho h_hat + damping') = m / (slope h + floor): the debiasing costs no pass over memory
        m_share = 1 - b1 ** state["step"]
        if state["refreshes"]:
            slope = m_share * group["rho"] / (1 - b2 ** state["refreshes"])
        else:
            slope = 0.0
            self._warn_without_curvature()
        h = state["curvature"]
        floor = torch.tensor(m_share * group["damping"], dtype=h.dtype)
        if group["relative_damping"]:
            floor = group["relative_damping"] * slope * h.mean() + floor
        win = self._win

        def kernel(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            m.lerp_(g, 1 - b1)
            torch.add(floor, h, alpha=slope, out=u)
            torch.div(m, u, out=u).clamp_(-1, 1)
            if decay != 1:
                p.mul_(decay)
            p.add_(u, alpha=-lr)
            win.add(u, t)

        return kernel

    def _warn_without_curvature(self) -> None:
        if not getattr(self, "_warned", False):
            self._warned = True
            warnings.warn(
                "Sophia has no curvature estimate yet, so it steps by clip(momentum / damping): by default the sign of "
                "the momentum. Run backward_curvature and update_curvature() before the first step, or use Signum.",
                stacklevel=2,
            )


def _refresh(b2: float) -> Kernel:
    def kernel(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, *_: torch.Tensor) -> None:
        del p, m
        h.mul_(b2).addcmul_(g, g, value=1 - b2)

    return kernel


@OPTIMIZERS.register("sophia")
@dataclasses.dataclass(frozen=True)
class SophiaSpec(OptimizerSpec):
    """Momentum over diagonal curvature, clipped (Sophia, arXiv 2305.14342), with debiased averages.

    Attributes:
        betas: Decay of the momentum a step, and of the curvature a refresh.
        rho: Share of the curvature in the denominator; larger means smaller steps and a higher win rate.
        damping: Floor of the denominator, in units of the gradient.
        relative_damping: Further floor, as a share of each tensor's mean curvature term.
        interval: Steps from one curvature pass to the next.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    rho: float = 0.04
    damping: float = 1e-12
    relative_damping: float = 0.0
    interval: int = 10

    needs_curvature: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(**dataclasses.asdict(self))

    def build(self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]) -> Sophia:
        """Return :class:`Sophia` over ``params``."""
        return Sophia(params, **dataclasses.asdict(self))
