"""What rules without coupling between coordinates share: fp32 state, one sweep through memory, the win rate."""

from __future__ import annotations

import abc
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch

from soul.optim.base import UpdateRule

# An update in place on flat pieces: (p, g, *slots, u, t), with u and t scratch space; g must not be written to.
Kernel = Callable[..., None]

# A step is bound by memory: a piece that stays in the cache between a kernel's operations is read from memory once.
CPU_CHUNK_PER_THREAD = 131_072
# Elsewhere whole tensors are fastest; the bound keeps the scratch space of a large embedding small.
DEVICE_CHUNK = 1 << 26


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless ``low <= value < high``."""
    if not low <= value < high:
        raise ValueError(f"{name} must be at least {low} and below {high}, not {value}")


def check_above(name: str, value: float, bound: float) -> None:
    """Raise ValueError unless ``value > bound``."""
    if not value > bound:
        raise ValueError(f"{name} must be above {bound}, not {value}")


def check_common(lr: float, weight_decay: float, **betas: float) -> None:
    """Raise ValueError where a learning rate, a weight decay or a decay rate of an average makes no sense."""
    check_above("lr", lr, 0.0)
    check_between("weight_decay", weight_decay, 0.0, float("inf"))
    for name, beta in betas.items():
        check_between(name, beta, 0.0, 1.0)


class WinRate:
    """Counts, over one step, the share of moving coordinates whose step was not cut down to the bound of 1.

    The counts stay on their device until :meth:`value` is called, so that a step never waits for them.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, u: torch.Tensor, t: torch.Tensor) -> None:
        """Count the clipped steps ``u`` in [-1, 1]; ``u`` is overwritten, ``t`` is scratch space of its shape."""
        if u.device not in self._counts:
            zero = torch.zeros((), dtype=torch.float64, device=u.device)
            self._counts[u.device] = (zero, zero.clone())
        moving, clipped = self._counts[u.device]
        # ceil|u| is 1 unless u is 0, floor|u| is 1 only at the bound: several times faster than comparing and counting
        u.abs_()
        moving += torch.ceil(u, out=t).sum()
        clipped += u.floor_().sum()

    def value(self) -> dict[str, float]:
        """Return ``{"win_rate": share}``, or nothing where no coordinate moved."""
        moving = sum(float(m) for m, _ in self._counts.values())
        clipped = sum(float(c) for _, c in self._counts.values())
        return {"win_rate": 1.0 - clipped / moving} if moving else {}


class ElementwiseRule(UpdateRule, abc.ABC):
    """An update rule without coupling between coordinates; subclasses give the arithmetic as a kernel.

    State is kept, and all arithmetic done, in fp32 for parameters of lower precision (float64 for float64), also
    through ``load_state_dict``. The result is rounded to the parameter's dtype: bf16 weights without an fp32 master
    lose most updates far below 0.4 % of the weight, whatever the rule.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    _win: WinRate

    @abc.abstractmethod
    def _kernel(self, group: dict[str, Any], state: dict[str, Any]) -> Kernel:
        """Return the update of one parameter, with its coefficients for the step that begins."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; parameters without a gradient stay as they are.

        Args:
            closure: Optional function that clears the gradients, computes the loss again, calls ``backward`` and
                returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: A parameter is not real floating-point, or its gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._win = WinRate()
        for group, p in self._with_gradient():
            state = self._state_of(p)
            state["step"] += 1
            self._sweep(p, state, self._kernel(group, state))
        return loss

    def metrics(self) -> dict[str, float]:
        """Return ``{"win_rate": ...}`` of the last step where the rule clips, else nothing."""
        win: WinRate | None = getattr(self, "_win", None)  # absent before the first step and after unpickling
        return win.value() if win else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over ``state_dict``, as copies and in the precision of the state."""
        super().load_state_dict(state_dict)
        # torch has just rounded the state to the dtype of the parameters; take it from its source again
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name in self.slots:
                    exact = torch.empty(p.shape, dtype=_state_dtype(p), device=p.device)
                    self.state[p][name] = exact.copy_(value)

    def _with_gradient(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        """Return the state of ``p``, made on first use so that it follows parameters moved or sharded before."""
        state = self.state[p]
        if not state:
            if not p.is_floating_point():
                raise ValueError(f"{type(self).__name__} needs real floating-point parameters, not {p.dtype}")
            state["step"] = 0
            for name in self.slots:
                state[name] = torch.zeros(p.shape, dtype=_state_dtype(p), device=p.device)
        return state

    def _sweep(self, p: torch.Tensor, state: dict[str, Any], kernel: Kernel) -> None:
        """Run ``kernel`` once over all coordinates of ``p``, piece by piece."""
        if p.grad is None or p.grad.layout != torch.strided:
            raise ValueError(f"{type(self).__name__} needs dense gradients")
        size = CPU_CHUNK_PER_THREAD * torch.get_num_threads() if p.device.type == "cpu" else DEVICE_CHUNK
        size = min(size, max(1, p.numel()))
        flat = p.detach().reshape(-1)  # a view where p is contiguous, a copy to write back where it is not
        pieces = [flat, p.grad.detach().reshape(-1), *(state[name].view(-1) for name in self.slots)]
        dtype = _state_dtype(p)
        scratch = torch.empty(4, size, dtype=dtype, device=p.device)
        for p_piece, g_piece, *slots in zip(*(piece.split(size) for piece in pieces), strict=True):
            u, t, p_work, g_work = scratch[:, : p_piece.numel()].unbind()
            p_exact = p_piece if p_piece.dtype == dtype else p_work.copy_(p_piece)
            g_exact = g_piece if g_piece.dtype == dtype else g_work.copy_(g_piece)
            kernel(p_exact, g_exact, *slots, u, t)
            if p_exact is not p_piece:
                p_piece.copy_(p_exact)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))


def _state_dtype(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
