"""The update rule of Kronecker-factored curvature; what divides by the factors is given to it."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from soul.curvature.inverses import EigenInverse, KroneckerInverse
from soul.curvature.kronecker import KroneckerFactors, Layer, pack, unpack
from soul.finite import all_finite
from soul.optim._checks import check_between, check_common, check_last_group
from soul.optim._metrics import systematic_views
from soul.optim._storage import NOTICEABLE, drops_updates, lost_updates, moved_share
from soul.optim.base import UpdateRule
from soul.types import LostModelError

Others = Literal["frozen", "diagonal"]
Preconditioner = KroneckerInverse | EigenInverse
log = logging.getLogger(__name__)

_LEVENBERG = 1.5  # factor by which damping follows the ratio of measured to predicted KL
_DAMPING_RANGE = 30.0  # and how far it may go from where it began


class _Move(NamedTuple):
    """What is to be done to a parameter, before all moves are scaled alike.

    ``u`` is of the average as it is kept; divided by ``share``, ``1 - b^steps``, of the debiased one. ``dot`` is
    ``<u, m_hat>``, debiased.
    """

    group: dict[str, Any]
    parameter: torch.Tensor
    u: torch.Tensor
    share: float
    dot: torch.Tensor


class KroneckerRule(UpdateRule):
    """Momentum times the inverse of Kronecker-factored curvature, as long a step as a budget in that metric allows.

    With ``P`` the preconditioner of a layer (:mod:`soul.curvature.inverses`), ``g`` the gradient ``[O, I]``::

        m <- b m + (1 - b) g                       m_hat = m / (1 - b^steps)
        u = P m_hat                                |u|^2 = sum over layers <u, m_hat>
        W <- W (1 - lr wd) - min(newton, lr / |u|) u          without newton, where that is 0

    ``|u|`` is the step's length in the damped curvature: where ``P`` divides by both factors, ``1/2 lr^2`` is the KL
    (nats a token of the curvature's source) that a step is predicted to cost, and ``newton = 1`` stops at the Newton
    step. Where only inputs are whitened, ``lr^2`` is the mean squared change of the layers' outputs, summed over
    outputs and layers. A direction whose length is 0 or no number is not taken.

    Parameters without factors (embeddings, head, norms, convolutions) are left as they are, or stepped by their
    diagonal curvature ``m_hat / (h + damping mean(h))`` in the same metric.

    Args:
        params: Parameters or parameter groups of ``model``.
        factors: The factors of the model's layers.
        preconditioner: What divides by them.
        lr: Longest step in the metric.
        momentum: Decay ``b`` of the average of gradients.
        decay: Decay of the factors a refresh, debiased.
        newton: Largest share of the full Newton step; 0 for no bound.
        others: What to do with parameters without factors.
        every: Calls of ``step`` from one move to the next; gradients in between go into the average only. The last call
            moves too, where :meth:`expect` told which it is.
        worth: Refreshes that the first one, a warm start, counts as.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: A hyper-parameter is out of range, or no parameter belongs to a layer with factors.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        factors: KroneckerFactors,
        preconditioner: Preconditioner,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        decay: float = 0.95,
        newton: float = 1.0,
        others: Others = "frozen",
        every: int = 1,
        worth: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        check_common(lr, weight_decay, momentum=momentum, decay=decay)
        check_between("newton", newton, 0.0, math.inf)
        if others not in ("frozen", "diagonal"):
            raise ValueError(f"others must be frozen or diagonal, not {others!r}")
        if every < 1:
            raise ValueError(f"every must be 1 or more, not {every}")
        self.factors, self.preconditioner = factors, preconditioner
        self._last_call = 0
        self._watching_is_over = False  # for moves that rounding drops
        self._damping = self._damping_begun = preconditioner.damping  # wanted from the next refresh on
        self._worth = worth
        self._layer_of = {id(p): name for name, layer in factors.layers.items() for p in _parameters(layer)}
        defaults = {"lr": lr, "momentum": momentum, "decay": decay, "newton": newton, "weight_decay": weight_decay}
        counts = {"every": every, "calls": 0, "refreshes": 0}
        super().__init__(params, {**defaults, **counts, "others": others, "maximize": False})
        if not any(id(p) in self._layer_of for group in self.param_groups for p in group["params"]):
            raise ValueError("none of the parameters belongs to a linear layer with Kronecker factors")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the rule's settings where it has none of its own.

        Raises:
            ValueError: Parameters that are not real floating-point, or ``differentiable`` or ``capturable``.
        """
        super().add_param_group(param_group)
        check_last_group(self, "differentiable", "capturable")

    def expect(self, steps: int) -> None:
        """Move at the last step too, so that no gradient is left in the average alone."""
        self._last_call = steps

    @property
    def needs_backward(self) -> bool:
        """Whether the factors' output sides or a diagonal are wanted."""
        return self.factors.watches_outputs or any(group["others"] == "diagonal" for group in self.param_groups)

    @property
    def needs_gradients(self) -> bool:
        """Whether EK-FAC's moments or a diagonal are wanted."""
        eigen = isinstance(self.preconditioner, EigenInverse)
        return eigen or any(group["others"] == "diagonal" for group in self.param_groups)

    @contextlib.contextmanager
    def observing(self, mask_BT: torch.Tensor | None = None) -> Iterator[None]:
        """Watch passes; see :meth:`KroneckerFactors.observing`. EK-FAC takes in the gradients that stand at the end."""
        with self.factors.observing(mask_BT):
            yield
        if isinstance(self.preconditioner, EigenInverse) and self.preconditioner.ready:
            for name, layer in self.factors.layers.items():
                if layer.weight.grad is not None and self.factors.knows(name):
                    bias = layer.bias.grad if layer.bias is not None else None
                    self.preconditioner.add(name, pack(layer, layer.weight.grad, bias))

    @torch.no_grad()
    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Take in what was watched, and the diagonal estimate for parameters without factors."""
        for group in self.param_groups:
            group["refreshes"] += 1
        first = self.param_groups[0]
        share = (1 - first["decay"]) / (1 - first["decay"] ** (first["refreshes"] + self._worth - 1))
        self.preconditioner.damping = self._damping
        if isinstance(self.preconditioner, EigenInverse):  # its moments began as what the first refresh says
            self.preconditioner.absorb(share)
        self.factors.absorb(share)
        if first["refreshes"] == 1:
            self._say_unknown()
        for _, p in self._others():
            if estimate is None and p.grad is None:
                continue
            new = p.grad.float().square() if estimate is None and p.grad is not None else (estimate or {})[p].float()
            state = self.state[p]
            state["curvature"] = state["curvature"].lerp_(new, share) if "curvature" in state else new.clone()

    def _say_unknown(self) -> None:
        unknown = [name for name in self.factors.layers if not self.factors.knows(name)]
        if unknown:
            log.warning(
                "%s: curvature passes showed nothing of %d of %d layers (the first is %s), which stay as they are",
                type(self).__name__, len(unknown), len(self.factors.layers), unknown[0],
            )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; parameters without a gradient stay as they are.

        Raises:
            ValueError: There is no curvature yet, or a gradient is sparse.
            LostModelError: A gradient is no number, which the average would keep for ever; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.param_groups[0]["refreshes"]:
            raise ValueError(
                f"{type(self).__name__} has no curvature yet: run a pass inside observing(), then update_curvature()"
            )
        self._last = None
        if not all_finite(p.grad for group in self.param_groups for p in group["params"] if p.grad is not None):
            raise LostModelError("a gradient is no finite number, and the step is not taken: lower the learning rate")
        for group in self.param_groups:
            group["calls"] += 1
        first = self.param_groups[0]
        if first["calls"] % first["every"] and first["calls"] != self._last_call:
            self._only_average()
            return loss
        moves = [*self._layer_moves(), *self._other_moves()]
        if moves:
            self._apply(moves)
        return loss

    def _only_average(self) -> None:
        """Take gradients into the averages of all parameters that a move would take them into."""
        for group in self.param_groups:
            for p in group["params"]:
                name = self._layer_of.get(id(p))
                known = "curvature" in self.state.get(p, {}) if name is None else self.factors.knows(name)
                if p.grad is not None and known:
                    self._momentum(group, p)

    def _layer_moves(self) -> Iterator[_Move]:
        """Yield the moves of the layers with factors."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for name, layer in self.factors.layers.items():
            group = group_of.get(id(layer.weight))
            if group is None or layer.weight.grad is None or not self.factors.knows(name):
                continue  # without curvature a weight stays, as those without factors do
            m_weight, share = self._momentum(group, layer.weight)
            bias, m_bias = layer.bias, None
            bias_group = group_of.get(id(bias)) if bias is not None and bias.grad is not None else None
            if bias is not None and bias_group is not None:
                m_bias, bias_share = self._momentum(bias_group, bias)
                m_bias = m_bias * (share / bias_share)  # in one average with the weight
            m = pack(layer, m_weight, m_bias)
            u = self.preconditioner(name, m)
            dot = torch.dot(u.reshape(-1), m.reshape(-1)) / share**2
            u_weight, u_bias = unpack(layer, u)
            yield _Move(group, layer.weight, u_weight, share, dot)
            if bias is not None and bias_group is not None and u_bias is not None:
                yield _Move(bias_group, bias, u_bias, share, torch.zeros_like(dot))

    def _other_moves(self) -> Iterator[_Move]:
        for group, p in self._others():
            h = self.state[p].get("curvature")
            if p.grad is None or h is None:
                continue
            m, share = self._momentum(group, p)
            floor = self.preconditioner.damping * h.mean()  # the one in use, as for the layers
            u = torch.where(h + floor > 0, m / (h + floor), 0)
            yield _Move(group, p, u, share, (u * m).sum() / share**2)

    def _apply(self, moves: list[_Move]) -> None:
        length = torch.stack([move.dot for move in moves]).sum().clamp(min=0).sqrt()
        first = self.param_groups[0]
        if not 0 < (size := float(length)) < math.inf:
            if size:
                warnings.warn(f"{type(self).__name__} skips a step whose direction has length {size}", stacklevel=4)
            return
        scale = (float(first["lr"]) / length).clamp(max=first["newton"] or math.inf)
        factor = float(scale)
        low = [] if self._watching_is_over else [move for move in moves if _rounds(move)]
        before = [x.clone() for x in _sample(move.parameter for move in low)]
        for group, p, u, share, _ in moves:
            if group["weight_decay"]:
                p.mul_(1 - float(group["lr"]) * group["weight_decay"])
            if u.dtype == p.dtype:  # in one pass
                p.sub_(u, alpha=factor / share)
            else:
                p.sub_((factor / share * u).to(p.dtype))
        self._last = {"newton_share": scale, "step_length": scale * length}
        if low:
            self._judge(low, before)

    def _judge(self, moves: list[_Move], before: list[torch.Tensor]) -> None:
        """Warn, once, where rounding dropped most of a move."""
        self._watching_is_over = True
        moved = moved_share(before, _sample(move.parameter for move in moves), _sample(move.u for move in moves))
        if moved is not None and moved < NOTICEABLE:
            said = lost_updates(moved, float(moves[0].group["lr"]), moves[0].parameter.dtype, stochastic=False)
            warnings.warn(said, stacklevel=5)

    def _momentum(self, group: dict[str, Any], p: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Update the average of a parameter's gradients; return it, in fp32 at least, and ``1 - b^steps``."""
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise ValueError(f"{type(self).__name__} needs dense gradients")
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if "exp_avg" not in state:
            state["step"], state["exp_avg"] = 0, torch.zeros_like(p, dtype=dtype)
        state["step"] += 1
        grad = p.grad.to(dtype)
        state["exp_avg"].lerp_(-grad if group["maximize"] else grad, 1 - group["momentum"])
        return state["exp_avg"], 1 - group["momentum"] ** state["step"]

    def _others(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            for p in group["params"] if group["others"] == "diagonal" else ():
                if id(p) not in self._layer_of:
                    yield group, p

    def predicted_kl(self) -> float | None:
        """Return ``1/2 |step|^2``, which bounds what the factors predict; None where inputs alone are whitened."""
        last = getattr(self, "_last", None)
        knows = isinstance(self.preconditioner, EigenInverse) or self.preconditioner.outputs
        return 0.5 * float(last["step_length"]) ** 2 if last and knows else None

    def feedback(self, scale: float, measured_kl: float) -> None:
        """Raise damping where a step cost more than predicted, lower it where it cost less (Levenberg, Marquardt).

        It takes effect at the next refresh, when the inverses are made anew.
        """
        predicted = self.predicted_kl()
        if not predicted:
            return
        ratio = measured_kl / (scale**2 * predicted)
        factor = _LEVENBERG if ratio > 2 else 1 / _LEVENBERG if ratio < 0.5 else 1.0
        begun = self._damping_begun
        self._damping = min(max(self._damping * factor, begun / _DAMPING_RANGE), begun * _DAMPING_RANGE)

    def metrics(self) -> dict[str, float]:
        """Return the length of the last step in the metric, its share of the Newton step, and the damping in use."""
        last = getattr(self, "_last", None)
        return {k: float(v) for k, v in last.items()} | {"damping": self.preconditioner.damping} if last else {}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and, under ``kronecker``, the factors and what was derived from them over time."""
        numbers = {"damping": self._damping, "damping_in_use": self.preconditioner.damping}
        kept = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        return super().state_dict() | {"kronecker": self.curvature_state() | kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over ``state_dict``, as copies and in the precision of the state.

        Raises:
            ValueError: It is of a rule over other parameters.
        """
        sizes = [[len(g["params"]) for g in groups] for groups in (self.param_groups, state_dict["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"this checkpoint's optimizer has {sum(sizes[1])} parameters and this run's {sum(sizes[0])}: it is of "
                "other settings, or of a version that had gradients of what stays; begin anew in another folder"
            )
        super().load_state_dict(state_dict)
        exact = [p for group in state_dict["param_groups"] for p in group["params"]]
        for key, p in zip(exact, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(p.device, copy=True)  # torch rounded it to the parameter's dtype
        kept = dict(state_dict["kronecker"])
        wanted = kept.pop("damping")
        self._damping = float(wanted)
        self.preconditioner.damping = float(kept.pop("damping_in_use", wanted))  # which older states do not have
        if kept:
            self._load_factors(kept)

    def curvature_state(self) -> dict[str, torch.Tensor]:
        """Return the factors, EK-FAC's bases and moments, and the diagonal of parameters without factors, by name."""
        own = self.preconditioner.state() if isinstance(self.preconditioner, EigenInverse) else {}
        parts = {f"factor.{k}": v for k, v in self.factors.state().items()} | {f"eigen.{k}": v for k, v in own.items()}
        for i, (_, p) in enumerate(self._others()):
            if "curvature" in self.state.get(p, {}):
                parts[f"other.{i}"] = self.state[p]["curvature"]
        return parts

    def load_curvature_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Begin with curvature found earlier: one refresh is behind it."""
        for group in self.param_groups:
            group["refreshes"] = 1
        self._load_factors(state, copy=False)
        self._say_unknown()

    def derivation(self) -> str:
        """Name what inverses depend on beside the factors; EK-FAC's bases are part of its curvature."""
        return self.preconditioner.derivation() if isinstance(self.preconditioner, KroneckerInverse) else ""

    def derived(self) -> dict[str, torch.Tensor]:
        """Return the inverses."""
        return self.preconditioner.derived() if isinstance(self.preconditioner, KroneckerInverse) else {}

    def load_derived(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over inverses found from the same factors."""
        assert isinstance(self.preconditioner, KroneckerInverse)
        self.preconditioner.load_derived(state)

    def scramble(self, seed: int) -> None:
        """Turn both factors of each layer to random bases.

        Raises:
            ValueError: EK-FAC, whose moments belong to its bases.
        """
        if isinstance(self.preconditioner, EigenInverse):
            raise ValueError("curvature.shuffled does not know ekfac: its moments belong to its bases; use kfac")
        self.factors.scramble(torch.Generator().manual_seed(seed))

    def _load_factors(self, state: Mapping[str, torch.Tensor], *, copy: bool = True) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"factor": {}, "eigen": {}, "other": {}}
        for key, value in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        others = [p for _, p in self._others()]
        for index, value in parts["other"].items():
            p = others[int(index)]
            self.state[p]["curvature"] = value.to(p.device, copy=True)
        self.factors.load_state(parts["factor"], copy=copy)
        if isinstance(self.preconditioner, EigenInverse):
            self.preconditioner.load_state(parts["eigen"])


def _rounds(move: _Move) -> bool:
    return drops_updates({**move.group, "rounding": "nearest"}, move.parameter)


def _sample(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return systematic_views([x.detach().reshape(-1) for x in tensors])


def _parameters(layer: Layer) -> list[torch.Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
