"""What rules made of torch's own optimizers share: the refusals that every rule of this library has, in its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from soul.optim._checks import check_gradient, check_last_group
from soul.optim._shards import is_sharded
from soul.optim._state import exact_state
from soul.optim.base import UpdateRule


class TorchRule(UpdateRule):
    """Comes before a class of ``torch.optim`` in a rule's bases; the arithmetic and the state are torch's.

    State has the parameters' dtype, as always in torch: in bf16 an average with a decay of .999 cannot decay, so keep
    an fp32 master of such weights.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the rule's settings where it has none of its own.

        Raises:
            ValueError: Parameters that are not real floating-point, or ``differentiable``.
        """
        super().add_param_group(param_group)
        check_last_group(self, "differentiable")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; parameters without a gradient stay as they are.

        Args:
            closure: Optional function that clears the gradients, computes the loss again, calls ``backward`` and
                returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._advance()
        return loss

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                check_gradient(self, p.grad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over ``state_dict`` in the precision it has."""
        with exact_state(self):
            super().load_state_dict(state_dict)

    def _advance(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if group.get("fused") and any(is_sharded(p) for p in group["params"]):
                group["fused"] = None  # not every fused kernel knows shards
        step: Any = super().step
        # torch wraps the step of a class at its first instance, to call the instance's hooks; ours has called them
        step = step.__wrapped__.__get__(self) if getattr(step, "hooked", False) else step
        return step(closure)


def tensors(entry: Any) -> Iterable[torch.Tensor]:
    """Return the parameters in ``entry``: a tensor, ``(name, tensor)`` or a parameter group holding either."""
    if isinstance(entry, dict):
        members = entry["params"]
        entry["params"] = members = [members] if isinstance(members, torch.Tensor) else list(members)
        return [tensor for member in members for tensor in tensors(member)]
    return [entry[1] if isinstance(entry, tuple) else entry]


def fusable(p: torch.Tensor) -> bool:
    """Say whether torch's fused kernels may step ``p``."""
    # the fused CPU kernel walks raw memory: where a parameter's layout is not its gradient's, it pairs wrong elements
    return p.is_floating_point() and p.is_contiguous() and p.device.type in ("cpu", "cuda")
