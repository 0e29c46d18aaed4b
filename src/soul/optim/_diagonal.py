"""What rules that divide by a diagonal curvature share: its average, and a damping that knows the scale."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from soul.optim import _fused
from soul.optim._elementwise import ElementwiseRule, Kernel
from soul.optim._paths import Moving, Tensors, add_together, multi
from soul.optim._shards import size_of, summed
from soul.optim._storage import exact_dtype


@dataclasses.dataclass
class Pool:
    """The curvature of a parameter group as a whole.

    Attributes:
        total: Sum of the positive parts of the debiased curvature.
        count: Coordinates that have had a refresh.
    """

    total: torch.Tensor | None = None
    count: int = 0

    def mean(self, device: torch.device) -> torch.Tensor | float:
        """Return the mean curvature of a coordinate, as a 0-dim tensor on ``device``; 0 where nothing is known."""
        return 0.0 if self.total is None else self.total.to(device) / max(1, self.count)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """``m_hat / (rho max(h_hat, 0) + floor)``, written ``m / (slope h + floor)``: debiasing costs no further pass.

    Slope and floor are 0-dim tensors where they come from the device, so that nothing waits for it.
    """

    slope: float | torch.Tensor
    floor: torch.Tensor
    signed: bool

    def __call__(self, m: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if isinstance(self.slope, torch.Tensor):
            torch.addcmul(self.floor, h, self.slope, out=out)
        else:
            torch.add(self.floor, h, alpha=self.slope, out=out)
        if self.signed:
            torch.maximum(out, self.floor, out=out)
        return torch.div(m, out, out=out)

    def together(self, ms: Tensors, hs: Tensors) -> Tensors:
        """Return the ratio of many tensors."""
        us = multi._foreach_mul(hs, self.slope)
        if self.signed:
            multi._foreach_clamp_min_(us, 0)
        add_together(us, self.floor)
        return multi._foreach_div(ms, us)


class DiagonalRule(ElementwiseRule, abc.ABC):
    """An elementwise rule with a debiased average ``h`` of estimates of a diagonal curvature.

    ``h <- b2 h + (1 - b2) estimate`` at each refresh, ``h_hat = h / (1 - b2^refreshes)``, with ``b2 = betas[1]`` of the
    parameter group. Estimates may have negative entries (Hutchinson's do): the average is signed, so that they can
    cancel what others overestimate, and its positive part is what a step divides by.
    """

    slots = ("exp_avg", "curvature")

    @torch.no_grad()
    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Average an estimate into ``h``: the one given, or the square of each ``p.grad``.

        Gradients stay, for the caller to clear. They must not be clipped, and their square must be an unbiased estimate
        of the diagonal curvature of the mean loss, as :func:`soul.curvature.estimators.backward_curvature` leaves it.

        Args:
            estimate: Parameter -> its estimate; parameters it does not hold keep their average.

        Raises:
            ValueError: An estimate that is sparse or has another shape than its parameter.
        """
        told: Moving = []
        sources: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                source = p.grad if estimate is None else estimate.get(p)
                if source is None:
                    continue
                if source.layout != torch.strided or source.shape != p.shape:
                    raise ValueError(
                        f"{type(self).__name__} needs a dense curvature estimate of its parameter's shape "
                        f"{list(p.shape)}, not {source.layout} {list(source.shape)}"
                    )
                told.append((group, p))
                sources[p] = source
        signed = estimate is not None
        self._keys = {}  # no weight is written
        for group, p in told:
            state = self._state_of(group, p)
            state["refreshes"] += 1
            state["signed"] = state["signed"] or signed
        fused, rest = self._split(told, sources)
        sums = _fused.run([self._fused_refresh(p, sources[p], group["betas"][1], signed) for group, p in fused])
        for (_, p), total in zip(fused, sums, strict=True):
            self.state[p]["curvature_sum"] = torch.full_like(self.state[p]["curvature_sum"], total)
        for group, p in rest:
            self._refresh(p, sources[p], group["betas"][1], signed=signed)
        for _, p in told:  # in the same order in all processes, whatever way each of them took
            summed(self.state[p]["curvature_sum"], p)

    def _fused_refresh(self, p: torch.Tensor, source: torch.Tensor, b2: float, signed: bool) -> _fused.Call:
        h = self.state[p]["curvature"]
        if signed:
            return _fused.Call("refresh_by_estimate", (source, h), (1 - b2,))
        return _fused.Call("refresh", (source, h), (b2, 1 - b2))

    def _refresh(self, p: torch.Tensor, source: torch.Tensor, b2: float, *, signed: bool) -> None:
        state = self.state[p]
        any_sign = state["signed"]
        total = torch.zeros_like(state["curvature_sum"])

        def kernel(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            del p, m, t
            if signed:
                h.lerp_(g, 1 - b2)
            else:
                h.mul_(b2).addcmul_(g, g, value=1 - b2)
            # the sum is taken while the piece is in the cache, so that damping needs no pass of its own
            total.add_((torch.clamp(h, min=0, out=u) if any_sign else h).sum())

        self._sweep(p, source, kernel)
        state["curvature_sum"] = total

    def _state_of(self, group: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
        state = super()._state_of(group, p)
        if "refreshes" not in state:
            state["refreshes"], state["signed"] = 0, False
            state["curvature_sum"] = torch.zeros((), dtype=exact_dtype(p), device=p.device)
        return state

    def _pool(self, group: dict[str, Any]) -> Pool:
        """Return what is known of the group's curvature, without a pass over memory and without waiting for a device.

        One mean for all tensors of a group, because a tensor alone may know nothing: at LoRA's start, with B = 0, the
        curvature of all of A is 0, and divided by that any gradient is a full step.
        """
        pool, alike = Pool(), {}
        for p in group["params"]:
            state = self.state.get(p)  # no default: asking must not make a state
            if state and state["refreshes"]:
                alike.setdefault((state["refreshes"], p.device), []).append(state["curvature_sum"])
                pool.count += size_of(p)
        for (refreshes, _), sums in alike.items():
            part = torch.stack(sums).sum() / (1 - group["betas"][1] ** refreshes)
            pool.total = part if pool.total is None else pool.total + part.to(pool.total.device)
        return pool

    def _alike(self, group: dict[str, Any], p: torch.Tensor) -> tuple[Any, ...]:
        state = self.state[p]
        return *super()._alike(group, p), state["refreshes"], state["signed"]

    def _share(self, group: dict[str, Any], p: torch.Tensor) -> float:
        """Return what debiasing multiplies ``h`` by; 0 before the first refresh of ``p``."""
        refreshes = self.state[p]["refreshes"]
        return 1 / (1 - group["betas"][1] ** refreshes) if refreshes else 0.0

    def _warn_once(self, text: str) -> None:
        if not getattr(self, "_warned", False):
            self._warned = True
            warnings.warn(text, stacklevel=3)


def average(group: dict[str, Any]) -> Kernel:
    """Return the update of the momentum."""
    b1 = group["betas"][0]

    def kernel(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, *_: torch.Tensor) -> None:
        del p
        m.lerp_(g, 1 - b1)

    return kernel
