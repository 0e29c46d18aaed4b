"""Sophia: momentum divided by an estimate of the diagonal curvature, with a bound on the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from soul.optim._checks import check_above, check_between, check_common
from soul.optim._diagonal import DiagonalRule, Ratio, average
from soul.optim._elementwise import Direction, Kernel, host_scalar, move, moves, piece_size, sign
from soul.optim._fused import Call, run
from soul.optim._metrics import systematic_views
from soul.optim._paths import ListKernel, Moving, Tensors, move_together, multi
from soul.optim._shards import gathered, summed
from soul.optim._storage import Rounding, StateDtype, StoredSpec, exact_dtype
from soul.optim.base import CurvatureOptimizerSpec
from soul.optim.cost import RuleCost, elementwise_cost
from soul.registry import OPTIMIZERS

Clip = Literal["element", "block_rms", "kl"]
_CLIPS = ("element", "block_rms", "kl")
_HUGE = 1e30  # in place of an infinite rho, which times a curvature of 0 would not be a number


def _check(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    rho: float,
    win_rate: float | None,
    clip: str,
    kl_bound: float,
    damping: float,
    relative_damping: float,
) -> None:
    check_common(lr, weight_decay, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    check_above("rho", rho, 0.0)
    if clip not in _CLIPS:
        raise ValueError(f"clip must be one of {', '.join(_CLIPS)}, not {clip!r}")
    if win_rate is not None:
        if not 0 < win_rate < 1:
            raise ValueError(f"win_rate is a share of the coordinates above 0 and below 1, not {win_rate}")
        if clip != "element":
            raise ValueError(f"win_rate sets rho where coordinates are clipped (clip: element), not with clip: {clip}")
    check_above("kl_bound", kl_bound, 0.0)
    check_above("damping", damping, 0.0)  # 0 / 0 where a coordinate has neither gradient nor curvature
    check_between("relative_damping", relative_damping, 0.0, float("inf"))


class Sophia(DiagonalRule):
    """Clipped, diagonally preconditioned momentum (arXiv 2305.14342, algorithm 3), with both averages debiased.

    Each step, with the gradient ``g``, and each refresh, with an estimate (the square of the curvature gradient)::

        m <- b1 m + (1 - b1) g             m_hat = m / (1 - b1^steps)
        h <- b2 h + (1 - b2) estimate      h_hat = h / (1 - b2^refreshes)
        u = m_hat / (rho (max(h_hat, 0) + relative_damping mean(max(h_hat, 0))) + damping)
        p <- p (1 - lr wd) - lr clip(u)

    ``clip`` bounds one coordinate (``element``: to [-1, 1], as in the paper), one tensor (``block_rms``: scaled down to
    a root mean square of 1) or the whole step (``kl``: scaled down until the KL it is predicted to cost,
    ``1/2 sum(h_hat delta^2)`` with ``delta = lr u``, is at most ``kl_bound``). The mean is over the parameter group.

    Where it parts from the paper: debiasing, without which ``h`` would be several times too small over the few
    hundred steps of an unlearning run and nearly every coordinate at its bound; damping is added, not a maximum; and
    the squared gradient needs no factor of the batch size (see :mod:`soul.curvature.estimators`).

    Before the first :meth:`update_curvature` there is no curvature: with the default damping the step is then the
    sign of the momentum, and a warning says so once; ``clip="kl"``, which has nothing to measure by, refuses.

    Args:
        params: Parameters or parameter groups; of any shape.
        lr: Bound of one step of one coordinate (``element``), of its root mean square (``block_rms``); with ``kl``
            and ``rho=1`` the share of the damped Newton step.
        betas: Decay of the momentum a step, and of the curvature a refresh.
        rho: How much curvature counts: the trust region is ``|m_hat| < rho h_hat``. Larger means smaller, more
            Newton-like steps and a higher win rate. (Sophia's gamma.)
        weight_decay: Decoupled weight decay.
        win_rate: Share of the coordinates with momentum that should be inside their bound; ``rho`` is then not what is
            given, but set for each parameter group from the quantile of a sample of its coordinates at each of the
            first ``1 / (1 - b1)`` steps with curvature, while the momentum fills, and kept; afterwards the win rate
            moves with the size of the gradient.
        clip: What is bounded.
        kl_bound: Largest predicted KL of a step (nats a token of the curvature's source), with ``clip="kl"``.
        damping: Floor of the denominator, in units of the gradient.
        relative_damping: The same floor as a share of the group's mean ``rho h_hat``, so that it needs no knowledge of
            the scale. Without it coordinates whose estimate came out near 0 by chance, or is 0 by construction (all
            of A at LoRA's start), take full steps whatever their gradient.
        state_dtype: Precision that averages are kept in between steps.
        rounding: How bf16 weights are written.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Sophia([p], lr=0.1, rho=1.0, relative_damping=0.0)
        >>> p.grad = torch.tensor([2.0, 2.0])  # a curvature pass: h is 4
        >>> optimizer.update_curvature()
        >>> p.grad = torch.tensor([1.0, 9.0])
        >>> optimizer.step()
        >>> p.data
        tensor([0.9750, 0.9000])
        >>> optimizer.metrics()["win_rate"]
        0.5
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        weight_decay: float = 0.0,
        win_rate: float | None = None,
        clip: Clip = "element",
        kl_bound: float = 5e-4,
        damping: float = 1e-12,
        relative_damping: float = 0.1,
        state_dtype: StateDtype = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "win_rate": win_rate,
            "clip": clip,
            "kl_bound": kl_bound,
            "damping": damping,
            "relative_damping": relative_damping,
        }
        _check(**defaults)
        super().__init__(params, {**defaults, "calibrations": 0}, state_dtype, rounding)

    def _advance(self, moving: Moving) -> None:
        self._pools = {key: self._pool(group) for key, group in {id(group): group for group, _ in moving}.items()}
        self._ratios: dict[tuple[Any, ...], Ratio] = {}
        self._scales: dict[Any, torch.Tensor] = {}  # of a tensor (block_rms), or of all of them ("kl")
        # where the size of the step follows from all of the momentum, that is brought up to date in a sweep before
        early = [(group, p) for group, p in moving if group["clip"] != "element" or self._calibrates(group)]
        self._behind = {p for _, p in early}
        self._take_in(early)
        self._calibrate([(group, p) for group, p in early if self._calibrates(group)])
        self._scale(early)
        self._move(moving)

    def _take_in(self, early: Moving) -> None:
        """Bring the momentum up to date, and sum up what the size of the step follows from."""
        fused, rest = self._split(early)
        sums = run([self._fused_before(group, p) for group, p in fused])
        for (group, p), total in zip(fused, sums, strict=True):
            if group["clip"] != "element":
                self._scales[p] = torch.full_like(self._ratio(group, p).floor, total)
        for group, p in rest:
            self._sweep(p, p.grad, *self._before(group, p), negate=group["maximize"])

    def _kernels(self, group: dict[str, Any], p: torch.Tensor) -> list[Kernel]:
        return [self._kernel(group, p)] if p in self._behind else [average(group), self._kernel(group, p)]

    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        direction = self._direction(group, p)

        def kernel(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            del g, t
            move(p, direction(m, h, u), group)

        return kernel

    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        ratio, behind, lr = self._ratio(group, p), p in self._behind, host_scalar(group["lr"])
        scale = self._scale_of(group, p)

        def kernel(ps: Tensors, gs: Tensors, ms: Tensors, hs: Tensors) -> None:
            if not behind:
                multi._foreach_lerp_(ms, gs, 1 - group["betas"][0])
            us = ratio.together(ms, hs)
            if scale is None:
                multi._foreach_clamp_min_(us, -1)
                multi._foreach_clamp_max_(us, 1)
            else:
                multi._foreach_mul_(us, scale)
            move_together(ps, us, group, lr)

        return kernel

    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        ratio, m, h = self._ratio(group, p), *(self.state[p][name] for name in self.slots)
        if p not in self._behind:
            numbers = 1 - group["betas"][0], sign(group), ratio.slope, ratio.floor
            return Call("sophia", (p, p.grad, m, h), (*numbers, *moves(group)), key=self._key(p))
        scale = self._scale_of(group, p)
        bounds = (1.0, 1.0) if scale is None else (scale, float("inf"))
        return Call("sophia_behind", (p, m, h), (ratio.slope, ratio.floor, *bounds, *moves(group)), key=self._key(p))

    def _fused_before(self, group: dict[str, Any], p: torch.Tensor) -> Call:
        assert p.grad is not None
        m, h = (self.state[p][name] for name in self.slots)
        mean = 1 - group["betas"][0], sign(group)
        if group["clip"] == "element":
            return Call("average", (p.grad, m), mean)
        ratio, kernel = self._ratio(group, p), "sophia_cost" if group["clip"] == "kl" else "sophia_square"
        return Call(kernel, (p.grad, m, h), (*mean, ratio.slope, ratio.floor))

    def _scale_of(self, group: dict[str, Any], p: torch.Tensor) -> torch.Tensor | None:
        """Return what the ratio is multiplied by; None where it is clipped."""
        if group["clip"] == "element":
            return None
        return self._scales[p if group["clip"] == "block_rms" else "kl"].to(p.device)

    def _direction(self, group: dict[str, Any], p: torch.Tensor) -> Direction:
        ratio = self._ratio(group, p)
        scale = self._scale_of(group, p)
        if scale is None:
            return lambda m, h, out: ratio(m, h, out).clamp_(-1, 1)
        return lambda m, h, out: ratio(m, h, out).mul_(scale)

    def _before(self, group: dict[str, Any], p: torch.Tensor) -> list[Kernel]:
        """Return the kernels of a first sweep: the momentum, and the sum that the size of the step follows from."""
        if group["clip"] == "element":
            return [average(group)]
        ratio, whole = self._ratio(group, p), group["clip"] == "kl"
        total = self._scales[p] = torch.zeros_like(ratio.floor)

        def measure(
            p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, h: torch.Tensor, u: torch.Tensor, t: torch.Tensor
        ) -> None:
            del p, g
            ratio(m, h, u)
            total.add_(torch.dot(torch.clamp(h, min=0, out=t).mul_(u) if whole else u, u))

        return [average(group), measure]

    def _scale(self, moving: Moving) -> None:
        """Turn the sums of the first sweep into the factors that keep each tensor, or the whole step, in bounds."""
        costs, bounds = [], []
        for group, p in moving:
            if p in self._scales:
                summed(self._scales[p], p)
            if group["clip"] == "block_rms":
                self._scales[p] = (self._scales[p] / max(1, p.numel())).rsqrt_().clamp_(max=1)
            elif group["clip"] == "kl":
                factor = 0.5 * host_scalar(group["lr"]) ** 2 * self._share(group, p)
                costs.append((self._scales.pop(p) * factor).to(moving[0][1].device))
                bounds.append(group["kl_bound"])
        if costs:
            self._scales["kl"] = (min(bounds) / torch.stack(costs).sum()).sqrt_().clamp_(max=1)

    def _calibrates(self, group: dict[str, Any]) -> bool:
        steps = max(1, round(1 / (1 - group["betas"][0])))
        known = self._pools[id(group)].total is not None
        return group["win_rate"] is not None and known and group["calibrations"] < steps

    def _calibrate(self, moving: Moving) -> None:
        """Set ``rho`` of each group so that the share ``win_rate`` of its moving coordinates is inside its bound."""
        for group in {id(group): group for group, _ in moving}.values():
            members = [p for other, p in moving if other is group]
            device = members[0].device
            h_floor = group["relative_damping"] * self._pools[id(group)].mean(device)
            ms, hs = (systematic_views([self._slot(p, name) for p in members]) for name in self.slots)
            ms, hs = ([t.to(exact_dtype(p)) for t, p in zip(ts, members, strict=True)] for ts in (ms, hs))
            needed = []  # the least rho that puts a coordinate inside; infinite where there is no momentum
            for p, m, h in zip(members, ms, hs, strict=True):
                m_hat = m.abs() / (1 - group["betas"][0] ** self.state[p]["step"])
                h_hat = h.clamp(min=0) * self._share(group, p) + h_floor
                rho = (m_hat - group["damping"]).clamp_(min=0) / h_hat
                needed.append(rho.nan_to_num_(posinf=_HUGE).masked_fill_(m == 0, torch.inf).to(device))
            ordered = gathered(torch.cat(needed), members[0], torch.inf).sort().values
            moving_count = ordered.isfinite().sum()
            rho = ordered.gather(0, (moving_count * group["win_rate"]).long().clamp_(max=len(ordered) - 1)[None])[0]
            group["rho"] = torch.where(moving_count > 0, rho, group["rho"])
            group["calibrations"] += 1
        self._ratios.clear()

    def _ratio(self, group: dict[str, Any], p: torch.Tensor) -> Ratio:
        """Return the ratio of ``p`` at this step; parameters that are alike share one."""
        key = self._alike(group, p)
        if key not in self._ratios:
            state, rho, pool = self.state[p], host_scalar(group["rho"]), self._pools[id(group)]
            m_share = 1 - group["betas"][0] ** state["step"]
            if pool.total is None:
                self._lacks_curvature(group)
            floor = torch.zeros_like(state["curvature_sum"])
            floor += m_share * (group["damping"] + group["relative_damping"] * rho * pool.mean(p.device))
            self._ratios[key] = Ratio(m_share * rho * self._share(group, p), floor, state["signed"])
        return self._ratios[key]

    def _lacks_curvature(self, group: dict[str, Any]) -> None:
        if group["clip"] == "kl":
            raise ValueError(
                "Sophia with clip: kl has no curvature yet to predict the KL of a step by: run backward_curvature and "
                "update_curvature() before the first step"
            )
        self._warn_once(
            "Sophia has no curvature estimate yet, so it steps by clip(momentum / damping): by default the sign of "
            "the momentum. Run backward_curvature and update_curvature() before the first step, or use Signum."
        )

    def _alike(self, group: dict[str, Any], p: torch.Tensor) -> tuple[Any, ...]:
        own = p if group["clip"] == "block_rms" else None
        return *super()._alike(group, p), own

    @torch.no_grad()
    def predicted_kl(self) -> float | None:
        """Return ``1/2 sum(h_hat delta^2)`` of the last step (without weight decay), in nats a token.

        It comes from the state as it is, in a sweep of its own over momentum and curvature: ask before the next step
        or refresh. None where there is no curvature.
        """
        last = getattr(self, "_last", [])
        if not last or any(self._pools[id(group)].total is None for group, _, _ in last):
            return None
        total = 0.0
        for group, p, lr in last:
            direction, cost = self._direction(group, p), torch.zeros_like(self.state[p]["curvature_sum"])
            for m, h, u in self._pieces(p):
                direction(m, h, u)
                cost += torch.dot(u.square_(), h.clamp(min=0))
            total += 0.5 * float(lr) ** 2 * self._share(group, p) * float(summed(cost, p))
        return total

    def win_rates(self) -> dict[torch.Tensor, float]:
        """Return what :class:`ElementwiseRule` does; nothing where whole tensors or steps are bounded."""
        bounded = all(group["clip"] == "element" for group in self.param_groups)
        return super().win_rates() if bounded else {}

    def metrics(self) -> dict[str, float]:
        """Return what :class:`ElementwiseRule` does, and what the chosen bound and calibration did.

        ``rho`` of the largest group (and of embeddings) where ``win_rate`` sets it; ``kl_scale``, the factor that
        ``clip="kl"`` shortened the step by; ``blocks_scaled``, the share of the tensors that ``block_rms`` shortened
        (there is no win rate then).
        """
        out, last = super().metrics(), getattr(self, "_last", [])
        if last and last[0][0]["clip"] != "element":
            out = {name: value for name, value in out.items() if not name.startswith("win_rate")}
        groups = {id(group): group for group, _, _ in last}.values()
        by_size = sorted(groups, key=lambda group: sum(p.numel() for p in group["params"]))
        for group in by_size:  # the largest one's stays
            if group["win_rate"] is not None and group["calibrations"]:
                out["rho_embedding" if group["embedding"] else "rho"] = float(group["rho"])
        scales = getattr(self, "_scales", {}) if last else {}
        if "kl" in scales:
            out["kl_scale"] = float(scales["kl"])
        elif scales:
            out["blocks_scaled"] = sum(float(scale) < 1 for scale in scales.values()) / len(scales)
        return out


@OPTIMIZERS.register("sophia")
@dataclasses.dataclass(frozen=True)
class SophiaSpec(CurvatureOptimizerSpec, StoredSpec):
    """Momentum over diagonal curvature, clipped (Sophia, arXiv 2305.14342), with debiased averages.

    Attributes:
        betas: Decay of the momentum a step, and of the curvature a refresh.
        rho: Share of the curvature in the denominator; larger means smaller steps and a higher win rate.
        win_rate: Share of the coordinates to be inside their bound, which sets ``rho`` in the first steps.
        clip: What is bounded: each coordinate (``element``), each tensor (``block_rms``) or the whole step (``kl``).
        kl_bound: Largest KL a step may be predicted to cost (nats a token), with ``clip: kl``.
        damping: Floor of the denominator, in units of the gradient.
        relative_damping: Further floor, as a share of the parameter group's mean curvature term.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    rho: float = 0.04
    win_rate: float | None = None
    clip: Clip = "element"
    kl_bound: float = 5e-4
    damping: float = 1e-12
    relative_damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(**self.own_settings())

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> Sophia:
        """Return :class:`Sophia` over ``params``."""
        del model
        return Sophia(params, **self.settings())

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of two numbers a coordinate."""
        del model
        return elementwise_cost(
            params, slots=len(Sophia.slots), written=1, piece=piece_size(device), scalars=1, dtype=self.slot_dtype
        )
