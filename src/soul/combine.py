"""How the gradient of what to forget and the gradient of what to keep become a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from soul.optim.base import OptimizerSpec, UpdateRule
from soul.types import LossOut

Combine = Literal["sum", "projected", "dual"]
Gradients = dict[torch.Tensor, torch.Tensor]
_NOISE = 1e-3  # length of a retain gradient, as a share of the forget gradient's, that may be rounding alone


class Combination:
    """The gradients are added, ``g = f + r``: one backward pass, one optimizer state."""

    name = "sum"

    def loss(self, out: LossOut, counts: Mapping[str, int], params: list[nn.Parameter]) -> torch.Tensor:
        """Return what a micro-batch goes backward from, having kept what it needs besides.

        Args:
            out: The terms of the loss.
            counts: Items of each term in the whole window.
            params: What is trained.
        """
        del params
        return out.loss(dict(counts))

    def finish(self, rule: UpdateRule, max_norm: float) -> None:
        """Finish the gradients after the last micro-batch of a window, before they are clipped to ``max_norm``."""

    def build(self, make: Callable[[], UpdateRule]) -> UpdateRule:
        """Return the update rule that steps on these gradients."""
        return make()


class _Apart(Combination):
    """Keeps the retain gradient apart, added up over a window: a backward pass more."""

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.kept: Gradients = {}

    def keep(self, out: LossOut, counts: Mapping[str, int], params: list[nn.Parameter]) -> None:
        """Add the gradient of the retain term to what is kept."""
        term = out.terms.get("retain")
        if term is None:
            raise ValueError(
                f"training.combine={self.name} needs a retain term, and {self.objective} as set has none: "
                "set training.combine to sum, or give the objective one"
            )
        if not term.weight:  # as a schedule may have it at first
            return
        loss = term.weight * term.total / max(1, counts["retain"])
        for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), strict=True):
            if g is not None:
                self.kept[p] = self.kept[p].add_(g) if p in self.kept else g

    def taken(self) -> Gradients:
        """Return what was kept, and begin anew."""
        kept, self.kept = self.kept, {}
        return kept


class Projected(_Apart):
    """The part along the retain gradient is taken out: ``g = r + f - (f.r / r.r) r``, products over all parameters.

    A control that protects one direction where curvature protects all. Where ``|r| <= .001 |f|`` nothing is taken out:
    a KL from the model before has no gradient at the first step, and what rounding leaves of it points anywhere.
    """

    name = "projected"

    def loss(self, out: LossOut, counts: Mapping[str, int], params: list[nn.Parameter]) -> torch.Tensor:
        """Keep the retain gradient, and return the sum."""
        self.keep(out, counts, params)
        return out.loss(dict(counts))

    @torch.no_grad()
    def finish(self, rule: UpdateRule, max_norm: float) -> None:
        """Replace each gradient ``r + f`` by its projection."""
        del rule, max_norm
        pairs = [(p.grad, r) for p, r in self.taken().items() if p.grad is not None]
        along = sum(float(((g - r) * r).sum()) for g, r in pairs)
        length = sum(float(r.square().sum()) for _, r in pairs)
        forget = sum(float((g - r).square().sum()) for g, r in pairs)
        for g, r in pairs if length > _NOISE**2 * forget else ():
            g.sub_(r, alpha=along / length)


class Dual(_Apart):
    """Each gradient has an optimizer state of its own, and each is clipped by itself (see :class:`DualRule`).

    Args:
        objective: Name of the objective, for messages.
        ratio: Learning rate of the retain step as a multiple of that of the forget step.
    """

    name = "dual"

    def __init__(self, objective: str, ratio: float) -> None:
        super().__init__(objective)
        self.ratio = ratio

    def loss(self, out: LossOut, counts: Mapping[str, int], params: list[nn.Parameter]) -> torch.Tensor:
        """Keep the retain gradient, and return the rest of the loss."""
        self.keep(out, counts, params)
        rest = LossOut({name: term for name, term in out.terms.items() if name != "retain"})
        if not rest.terms:
            raise ValueError(
                f"training.combine=dual needs a forget and a retain term, and {self.objective} has nothing to forget: "
                "set training.combine to sum"
            )
        return rest.loss(dict(counts))

    @torch.no_grad()
    def finish(self, rule: UpdateRule, max_norm: float) -> None:
        """Hand the retain gradient to the rule, clipped as the trainer will clip the forget gradient."""
        kept = self.taken()
        if max_norm > 0 and kept:
            total = nn.utils.get_total_norm(kept.values())
            share = (max_norm / (total + 1e-6)).clamp(max=1.0)
            for g in kept.values():
                g.mul_(share.to(g.device))
        assert isinstance(rule, DualRule)
        rule.retain_gradients = kept

    def build(self, make: Callable[[], UpdateRule]) -> UpdateRule:
        """Return two rules of the kind ``make`` returns, in one."""
        return DualRule(make(), make(), self.ratio)


class DualRule(UpdateRule):
    """Two instances of an update rule, each with its own state, stepped in turn (DualOptim, arXiv 2504.15827).

    With ``A`` the rule and ``s_f``, ``s_r`` its two states (momentum, second moments, factors)::

        s_f, u_f = A(s_f, f)          theta <- theta - lr u_f
        s_r, u_r = A(s_r, r)          theta <- theta - ratio lr u_r

    so that the momentum of either gradient never mixes with the other's. Both gradients are taken at the weights before
    the first of the two steps, from one forward pass; the paper alternates batches, so that there ``r`` is taken after
    the step on ``f``. Decoupled weight decay is applied by both. A rule that does not depend on the length of gradients
    (AdamW, signs) does not feel ``retain_weight`` here: ``ratio`` weighs the two instead.

    Both hear the same curvature, and rules with Kronecker factors keep two sets of them.

    Args:
        forget: Steps on the gradients in ``grad``; its learning rate is the schedule's.
        retain: Steps on :attr:`retain_gradients`, which are set before each step.
        ratio: Learning rate of ``retain`` as a multiple of that of ``forget``.

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> from soul.optim.sgd import SGDSpec
        >>> rule = DualRule(*(SGDSpec(lr=1.0, momentum=0.0).build([p]) for _ in range(2)), ratio=0.5)
        >>> p.grad, rule.retain_gradients = torch.ones(1), {p: -torch.ones(1)}
        >>> rule.step()
        >>> float(p.detach())
        -0.5
    """

    def __init__(self, forget: UpdateRule, retain: UpdateRule, ratio: float = 1.0) -> None:
        self.forget, self.retain, self.ratio = forget, retain, ratio
        self.retain_gradients: Gradients | None = None  # outside a step; empty where the retain weight is 0
        super().__init__(forget.param_groups, forget.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        """Show the forget rule's groups and state as one's own: a schedule sets its learning rates."""
        self.param_groups, self.state = self.forget.param_groups, self.forget.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # there is no one loss
        """Step on the forget gradients, then on the retain gradients.

        Raises:
            ValueError: A closure was given.
        """
        if closure is not None:
            raise ValueError("two steps on two gradients cannot share a closure: set training.combine to sum")
        self.forget.step()
        for ours, theirs in zip(self.retain.param_groups, self.forget.param_groups, strict=True):
            ours |= {name: self.ratio * theirs[name] for name in ("lr", "initial_lr") if name in theirs}
        if self.retain_gradients:
            with self._on_retain_gradients():
                self.retain.step()
        self.retain_gradients = None

    @contextlib.contextmanager
    def _on_retain_gradients(self) -> Iterator[None]:
        """Put the retain gradients where a rule looks for gradients, inside a step."""
        if self.retain_gradients is None:
            yield
            return
        params = [p for group in self.param_groups for p in group["params"]]
        forget = [p.grad for p in params]
        for p in params:
            p.grad = self.retain_gradients.get(p)
        try:
            yield
        finally:
            for p, g in zip(params, forget, strict=True):
                p.grad = g

    def train(self) -> None:
        """Tell rules that keep two sets of weights (schedule-free ones) that training goes on."""
        self._tell("train")

    def eval(self) -> None:
        """Tell them that it does not."""
        self._tell("eval")

    def _tell(self, what: str) -> None:
        for rule in (self.forget, self.retain):
            if callable(getattr(rule, what, None)):
                getattr(rule, what)()

    @property
    def needs_backward(self) -> bool:
        """As the rule has it."""
        return self.forget.needs_backward

    @property
    def needs_gradients(self) -> bool:
        """As the rule has it."""
        return self.forget.needs_gradients

    @contextlib.contextmanager
    def observing(self, mask_BT: torch.Tensor | None = None) -> Iterator[None]:
        """Let both watch."""
        with self.forget.observing(mask_BT), self.retain.observing(mask_BT):
            yield

    def expect(self, steps: int) -> None:
        """Tell both."""
        self.forget.expect(steps)
        self.retain.expect(steps)

    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Tell both; where the gradients of a step stand for curvature, each of its own."""
        self.forget.update_curvature(estimate)
        with self._on_retain_gradients():
            self.retain.update_curvature(estimate)

    def curvature_state(self) -> dict[str, torch.Tensor] | None:
        """Return what passes told, which is the same for both."""
        return self.forget.curvature_state()

    def load_curvature_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Begin both with it."""
        self.retain.load_curvature_state({name: value.clone() for name, value in state.items()})
        self.forget.load_curvature_state(state)

    def derivation(self) -> str:
        """As the rule has it."""
        return self.forget.derivation()

    def derived(self) -> dict[str, torch.Tensor]:
        """Return what is derived from the curvature, which is the same for both."""
        return self.forget.derived()

    def load_derived(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give it to both, neither of which changes it."""
        self.retain.load_derived(state)
        self.forget.load_derived(state)

    def scramble(self, seed: int) -> None:
        """Scramble both alike."""
        self.forget.scramble(seed)
        self.retain.scramble(seed)

    def metrics(self) -> dict[str, float]:
        """Return the forget rule's numbers, and the retain rule's as ``retain_...``."""
        return self.forget.metrics() | {f"retain_{name}": value for name, value in self.retain.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"forget": self.forget.state_dict(), "retain": self.retain.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both states."""
        self.forget.load_state_dict(state_dict["forget"])
        self.retain.load_state_dict(state_dict["retain"])
        self._share_groups()


def make_combination(
    combine: Combine, objective: str, rule: OptimizerSpec, ratio: float = 1.0, processes: int = 1
) -> Combination:
    """Return the combination of that name.

    Args:
        combine: ``sum``, ``projected`` or ``dual``.
        objective: Name of the objective, for messages.
        rule: The update rule's hyper-parameters.
        ratio: Learning rate of the retain step as a multiple of that of the forget step; for ``dual``.
        processes: Processes that train together.

    Raises:
        ValueError: The rule cannot step twice, or the gradients are of several processes.
    """
    if combine == "sum":
        return Combination()
    if processes > 1:
        raise ValueError(
            f"training.combine={combine} keeps a gradient apart, which several processes do not share: use one "
            "process, or set training.combine to sum"
        )
    if combine == "projected":
        return Projected(objective)
    if rule.needs_closure:
        raise ValueError(
            f"training.combine=dual steps on two gradients, and {rule.name} asks for one loss again and again (a "
            "closure): choose another optimizer, or set training.combine to sum"
        )
    return Dual(objective, ratio)
