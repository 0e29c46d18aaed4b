"""Influence unlearning: Newton steps up the forget loss, measured by the curvature of what is to stay."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from soul.curvature.ihvp import Inverse, InverseSpec, inverse_class, make_inverse
from soul.curvature.products import (
    GaussNewton,
    evaluating,
    loss_gradient,
    mean_nll,
    micro_batches,
    on_device,
    trainable,
)
from soul.curvature.vectors import Vector, axpy_, dot, norm
from soul.data.batches import Batch, UnlearnDataset
from soul.data.templates import Encoded
from soul.forward import forward_answers
from soul.methods.base import Log, Method, Progress, silent, unheard
from soul.methods.step_size import Bounds, Trial, longest
from soul.objectives.base import count_tokens, kl_to_reference
from soul.reference import build_reference
from soul.registry import METHODS
from soul.types import LostModelError

_logger = logging.getLogger(__name__)


@METHODS.register("influence")
@dataclasses.dataclass(frozen=True)
class Influence(Method):
    """Influence unlearning (arXiv 2404.18239, section 4): Newton ascent on the forget loss, as far as a KL budget goes.

    Leaving the forget set out of training moves the minimum, to first order, by ``H^-1 grad l(1/N - w_MU)``: one step
    ``theta <- theta + alpha (C + lambda)^-1 grad L_forget``, with ``C`` the curvature of the retain loss. Here ``C`` is
    the Gauss-Newton matrix, ``alpha`` is searched so that the measured retain KL, ``KL(p_before || p_theta)``, stays
    within ``max_kl``, and ``steps > 1`` takes gradients (and curvature) anew after each step. One step is the static
    baseline of the paper.

    Step ``i`` of ``n`` may bring the KL up to ``(i/n)^2 max_kl``: equal lengths, where the path is straight.

    Attributes:
        inverse: ``identity``, ``diagonal``, ``woodfisher``, ``cg``, ``kfac``, ``ekfac`` or ``whiten``.
        solver: Settings of the inverse.
        steps: Most steps.
        refresh: Steps from one estimate of the curvature to the next; 0 keeps the first. ``cg`` and ``woodfisher``
            always use the weights at hand.
        max_kl: Budget of retain KL in nats a token, over all steps, measured on ``probe_rows``.
        target_nll: Forget NLL in nats a token at which to stop; 0 stops only at the budget. A model that begins there
            is refused, since nothing would be done: plain text is often at more than 4 before.
        alpha: Longest step; 0 leaves the length to the budget. The paper's own length is the share of the training
            data that is to be forgotten.
        retain_weight: Weight of the retain gradient that is subtracted: ``v = grad L_forget - retain_weight grad
            L_retain``, over the rows of the curvature.
        parameters: ``linear`` moves the weights of linear layers inside the model; ``all`` everything trainable. A
            token that no retain row holds has no curvature, and ``all`` moves its embedding as far as damping lets it.
            The Kronecker inverses cover linear layers only, up to ``solver.max_dim``.
        curvature_rows: Retain examples in an estimate of the curvature, drawn anew for each; of ``data.curvature``
            where that is given.
        probe_rows: Retain examples that the KL is measured on; never among those of the curvature, unless there is
            only one.
        batch_tokens: Padded tokens in a micro-batch.
        trials: Most lengths to try for a step.
    """

    inverse: str = "ekfac"
    solver: InverseSpec = dataclasses.field(default_factory=InverseSpec)
    steps: int = 4
    refresh: int = 1
    max_kl: float = 0.1
    target_nll: float = 3.0
    alpha: float = 0.0
    retain_weight: float = 0.0
    parameters: Literal["linear", "all"] = "linear"
    curvature_rows: int = 64
    probe_rows: int = 32
    batch_tokens: int = 1024
    trials: int = 12

    def __post_init__(self) -> None:
        inverse_class(self.inverse)
        for name in ("steps", "curvature_rows", "probe_rows", "batch_tokens", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("refresh", "target_nll", "alpha", "retain_weight"):
            if not getattr(self, name) >= 0:  # refuses nan too
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.max_kl < math.inf:
            raise ValueError(f"max_kl must be above 0, not {self.max_kl}: a budget of 0 allows no step")
        if self.parameters not in ("linear", "all"):
            raise ValueError(f"parameters must be linear or all, not {self.parameters!r}")

    def __call__(self, model: Any, data: UnlearnDataset, *, progress: Progress = silent, log: Log = unheard) -> Any:
        """Change ``model`` in place and return it; after an error it is as the last whole step left it.

        Raises:
            ValueError: Nothing to move, or a target that is reached before.
            LostModelError: A step whose direction is not a number, or no first step within the budget.
        """
        with evaluating(model), self._restricted(model):
            run = _Run(self, model, data)
            for step in range(self.steps):
                progress("influence steps", step, self.steps)
                started = time.perf_counter()
                record = run.step(step)
                if record is None:
                    break
                log({"step": step + 1, **record, "seconds": round(time.perf_counter() - started, 4)})
            progress("influence steps", self.steps, self.steps)
        return model

    def check(self, model: nn.Module) -> None:
        """Find out whether there is anything to move.

        Raises:
            ValueError: No linear layer is trainable, or all are wider than ``solver.max_dim``.
        """
        self._movable(model)

    def _movable(self, model: nn.Module) -> tuple[set[str], list[str]]:
        """Return the names of the parameters that are to move, and of the layers that are too wide to."""
        params = trainable(model)
        layers, wide = inverse_class(self.inverse).covers(model, self.solver)
        if wide and not layers:
            raise ValueError(
                f"all {len(wide)} linear layers are wider than solver.max_dim ({self.solver.max_dim}), and "
                f"{self.inverse} moves none: raise it, or use the inverse diagonal or cg"
            )
        kept = set(params)
        if self.parameters == "linear":
            kept &= {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_parameters()}
        if not kept:
            raise ValueError(
                f"{type(model).__name__} has no trainable {'linear layer' if params else 'parameter'} to move: "
                + ("set parameters to all" if params else "unfreeze some, or add an adapter")
            )
        return kept, list(wide)

    @contextlib.contextmanager
    def _restricted(self, model: nn.Module) -> Iterator[None]:
        """Let only what is to move require gradients."""
        params = trainable(model)
        kept, wide = self._movable(model)
        if wide:
            _logger.warning(
                "%d linear layers, %s first, are wider than solver.max_dim (%d) and do not move; a larger one, or "
                "the inverse diagonal or cg, moves them",
                len(wide),
                wide[0],
                self.solver.max_dim,
            )
        try:
            for name, p in params.items():
                p.requires_grad_(name in kept)
            yield
        finally:
            for p in params.values():
                p.requires_grad_(True)

    def split_retain(self, data: UnlearnDataset) -> tuple[list[Encoded], list[Encoded]]:
        """Return the rows that the KL is measured on, and those that curvature may be drawn from."""
        rows = data.encoded["retain"]
        order = np.random.default_rng([data.seed, 8]).permutation(len(rows))
        cut = min(self.probe_rows, max(1, len(rows) // 3))
        probe, rest = [rows[i] for i in order[:cut]], [rows[i] for i in order[cut:]]
        return probe, data.curvature or rest or probe


class _Run:
    """One run of the method: what stays the same from step to step."""

    def __init__(self, method: Influence, model: Any, data: UnlearnDataset) -> None:
        self.method, self.model, self.data = method, model, data
        self.pad, self.tokens = data.template.pad, method.batch_tokens
        self.forget = micro_batches(data.encoded["forget"], self.pad, self.tokens)
        probe, self.pool = method.split_retain(data)
        self.probe = micro_batches(probe, self.pad, self.tokens)
        self.reference = build_reference(model, distributions=probe, pad_id=self.pad, max_tokens=self.tokens)
        self.inverse: Inverse | None = None
        self.last: Trial | None = None  # what was tried last
        self.kl, self.nll = 0.0, mean_nll(model, self.forget)
        if not math.isfinite(self.nll):
            raise ValueError(f"the model's NLL on the forget set is {self.nll} before any step: its weights are broken")
        self.target = method.target_nll or math.inf
        if self.nll >= self.target:
            raise ValueError(
                f"the forget set's NLL is {self.nll:.3g} nats a token before any step, and method.target_nll, at which "
                f"to stop, is {self.target:g}: set it higher, or to 0 to go as far as method.max_kl lets it"
            )

    def step(self, number: int) -> dict[str, float] | None:
        """Take one step and return its record; None where there is nothing left to do."""
        if self.nll >= self.target:
            return None
        method, retained = self.method, self.draw_retained(number)
        if self.inverse is None:
            seed = self.data.seed * 1_000_003 + number
            self.inverse = make_inverse(method.inverse, self.model, retained, method.solver, seed)
        before, gradient = loss_gradient(self.model, self.forget)
        if method.retain_weight:
            axpy_(gradient, -method.retain_weight, loss_gradient(self.model, retained)[1])
        direction = self.inverse(gradient)
        size, slope = norm(direction), dot(direction, gradient)
        report = self.inverse.report()
        del gradient
        if method.refresh and (number + 1) % method.refresh == 0:
            self.inverse = None  # its memory goes before the next one's comes
        if not (math.isfinite(size) and size > 0):
            raise LostModelError(
                f"the {method.inverse} direction has length {size} at step {number + 1}: raise solver.damping"
                if size
                else f"the {method.inverse} direction is zero at step {number + 1}: nothing it covers has a gradient"
            )
        found, tried = self.move(direction, number)
        if found is None and not number:
            last = self.last
            assert last is not None, "a step was tried"
            far = (
                f"forget NLL to {last.nll:.3g}, and method.target_nll is {method.target_nll:g}"
                if math.isfinite(last.nll)
                else f"retain KL to {last.kl:.2g} nats a token, and method.max_kl leaves the first of {method.steps} "
                f"steps {method.max_kl / method.steps**2:.2g}"
            )
            raise LostModelError(
                f"no step was found: the shortest of {tried} tried, {last.alpha:.2g}, brings {far}: raise "
                "method.trials, solver.damping or that bound"
            )
        if found is None:
            return None
        self.kl, self.nll = found.kl, found.nll
        return {
            "forget_nll_before": before,
            "forget_nll": found.nll,
            "retain_kl": found.kl,
            "alpha": found.alpha,
            "step_norm": found.alpha * size,
            "predicted_gain": found.alpha * slope,  # in the quantity the step follows, were it linear
            "trials": float(tried),
            **report,
        }

    def draw_retained(self, step: int) -> list[Batch]:
        """Return the retain examples of a step's curvature."""
        count = min(self.method.curvature_rows, len(self.pool))
        picks = np.random.default_rng([self.data.seed, step, 9]).choice(len(self.pool), count, replace=False)
        return micro_batches([self.pool[i] for i in sorted(picks)], self.pad, self.tokens)

    def move(self, direction: Vector, number: int) -> tuple[Trial | None, int]:
        """Search the length of the step, and leave the weights at its end; also return how many lengths were tried."""
        method = self.method
        limit = method.max_kl * ((number + 1) / method.steps) ** 2
        bounds = Bounds(limit, min(self.kl, limit), self.target, method.alpha or math.inf)
        cost = math.sqrt(max(GaussNewton(self.model, self.probe).quadratic(direction), 1e-30) / 2)
        first = (math.sqrt(limit) - math.sqrt(bounds.kl_before)) / cost  # where sqrt(KL) grows by `cost` a unit
        tried = 0
        with _Line(trainable(self.model), direction) as line:

            def measure(alpha: float) -> Trial:
                nonlocal tried
                tried += 1
                line.at(alpha)
                kl = self.retain_kl()
                self.last = found = Trial(alpha, kl, mean_nll(self.model, self.forget) if kl <= limit else math.inf)
                return found

            found = longest(measure, method.alpha or max(first, 1e-12), bounds, method.trials)
            if found is not None:
                line.at(found.alpha)
                line.keep()
        return found, tried

    @torch.no_grad()
    def retain_kl(self) -> float:
        """Return ``KL(p_before || p_theta)`` on the probe's answer tokens, in nats a token."""
        total = 0.0
        for batch in self.probe:
            batch = on_device(self.model, batch)
            answers = forward_answers(self.model, batch)
            total += float(kl_to_reference(answers, self.reference.logits(self.model, batch, answers, "retain")))
        return total / sum(count_tokens(batch, "retain") for batch in self.probe)


class _Line:
    """Weights ``theta + alpha u`` for any ``alpha``; ``theta`` again on leaving, unless kept."""

    def __init__(self, params: Mapping[str, nn.Parameter], direction: Vector) -> None:
        self.params, self.direction = params, direction
        self.start = {name: params[name].detach().clone() for name in direction}
        self.kept = False

    @torch.no_grad()
    def at(self, alpha: float) -> None:
        """Go to ``theta + alpha u``."""
        for name, u in self.direction.items():
            self.params[name].copy_(self.start[name].to(u.dtype).add(u, alpha=alpha))

    def keep(self) -> None:
        """Stay where the weights are now."""
        self.kept = True

    def __enter__(self) -> _Line:
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        if not self.kept:
            for name, value in self.start.items():
                self.params[name].copy_(value)
