"""Problems small enough to know the answer to, and the steps of a trainer around any registered update rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from soul.curvature.estimators import ESTIMATORS, backward_curvature
from soul.curvature.spec import CurvatureSpec
from soul.optim.base import CurvatureOptimizerSpec, OptimizerSpec, UpdateRule
from soul.registry import OPTIMIZERS

LR = 0.02

# What a rule declares, and the tests that therefore do not apply to it. There is no other list of exceptions.
DOES_NOT_APPLY: dict[str, tuple[Callable[[OptimizerSpec], bool], str]] = {
    "loose_parameters": (
        lambda spec: spec.needs_modules,
        "watches the layers of a model: parameters alone are nothing",
    ),
    "copies": (lambda spec: spec.needs_modules, "watches the layers of a model, which a copy of the rule alone lacks"),
    "group_lr": (lambda spec: spec.needs_modules, "one length for the whole step, whose budget the first group holds"),
    "estimates": (
        lambda spec: not spec.needs_curvature or spec.needs_modules,
        "is not told of curvature by a diagonal estimate",
    ),
    "second_order": (
        lambda spec: (
            not isinstance(spec, CurvatureOptimizerSpec)
            or spec.curvature.estimator in ("empirical", "squared_gradient")
        ),
        "does not claim to use curvature",
    ),
}


def applies(topic: str, spec: OptimizerSpec) -> bool:
    """Say whether tests of ``topic`` mean anything for the rule."""
    return not DOES_NOT_APPLY[topic][0](spec)


def names(topic: str | None = None) -> list[str]:
    """Return the registered optimizers that tests of ``topic`` apply to."""
    every = OPTIMIZERS.names()
    return every if topic is None else [name for name in every if applies(topic, OPTIMIZERS.get(name)())]


def make(name: str, **settings: Any) -> OptimizerSpec:
    """Return the spec of ``name`` with curvature at every step, where it wants any."""
    cls = OPTIMIZERS.get(name)
    default = cls()
    assert isinstance(default, OptimizerSpec)
    if isinstance(default, CurvatureOptimizerSpec):
        settings.setdefault("curvature", dataclasses.replace(default.curvature, interval=1))
    return dataclasses.replace(default, **{"weight_decay": 0.0, **settings})


class Problem:
    """A model, its data and what the trainer would do with them; subclasses say what the loss is."""

    model: nn.Module
    mask_BT: torch.Tensor | None = None

    def outputs(self) -> torch.Tensor:
        """Return the model's outputs ``[N, V]`` at the positions that count."""
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        """Return the mean loss."""
        raise NotImplementedError

    def cotangent(self, estimator: str, outputs_NV: torch.Tensor, generator: torch.Generator) -> None:
        """Send backward what makes the square of the gradient an estimate of the curvature of the loss."""
        raise NotImplementedError

    def bring_curvature(self, spec: OptimizerSpec, rule: UpdateRule, step: int) -> None:
        """Make the pass that is due before ``step``, if any."""
        curvature: CurvatureSpec | None = getattr(spec, "curvature", None)
        if not spec.needs_curvature or curvature is None or not curvature.due(step):
            return
        self.model.zero_grad()
        assert ESTIMATORS[curvature.estimator].cotangent is not None, "these problems make passes by cotangents"
        with rule.observing(self.mask_BT):
            self.cotangent(curvature.estimator, self.outputs(), torch.Generator().manual_seed(1000 + step))
        rule.update_curvature()
        self.model.zero_grad()

    def run(self, spec: OptimizerSpec, rule: UpdateRule, steps: int, start: int = 0) -> None:
        """Do what the trainer does: a curvature pass where one is due, then a step."""
        for step in range(start, start + steps):
            self.bring_curvature(spec, rule, step)
            self.model.zero_grad()
            self.loss().backward()
            rule.step()

    def weights(self) -> list[torch.Tensor]:
        """Return copies of the parameters."""
        return [p.detach().clone() for p in self.model.parameters()]


class Classifier(Problem):
    """Two layers with biases, sequences with padding, three classes; good enough for whatever is not about speed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        self.model.to(dtype)
        self.x_BTD = torch.randn(6, 4, 5, generator=generator).to(dtype)
        self.y_BT = torch.randint(3, (6, 4), generator=generator)
        lengths = torch.tensor([4, 3, 4, 2, 1, 4])
        self.mask_BT = torch.arange(4) < lengths[:, None]

    def outputs(self) -> torch.Tensor:
        assert self.mask_BT is not None
        return self.model(self.x_BTD)[self.mask_BT]

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.outputs().float(), self.y_BT[self.mask_BT])

    def cotangent(self, estimator: str, outputs_NV: torch.Tensor, generator: torch.Generator) -> None:
        weights = torch.full((len(outputs_NV),), 1 / len(outputs_NV))
        backward_curvature(outputs_NV, weights, estimator, generator, self.y_BT[self.mask_BT])


class Logistic(Classifier):
    """Multinomial logistic regression on inputs of unequal scale (condition number near 1e4); convex."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Linear(6, 3).double()
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        scales = torch.logspace(0, -2, 6, dtype=torch.float64)
        self.x_BTD = torch.randn(60, 1, 6, generator=generator, dtype=torch.float64) * scales
        truth = torch.randn(6, 3, generator=generator, dtype=torch.float64) / scales[:, None]
        noisy = (self.x_BTD @ truth).squeeze(1) + torch.randn(60, 3, generator=generator, dtype=torch.float64)
        self.y_BT = noisy.argmax(-1, keepdim=True)
        self.mask_BT = torch.ones(60, 1, dtype=torch.bool)

    def loss(self) -> torch.Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters())
        return nn.functional.cross_entropy(self.outputs(), self.y_BT[self.mask_BT]) + 1e-4 * penalty

    def best(self) -> float:
        """Return the smallest loss there is, from L-BFGS."""
        params = self.model.parameters()
        solver = torch.optim.LBFGS(params, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        solver.step(closure)
        return float(self.loss().detach())


class LeastSquares(Problem):
    """``1/2 mean |W x - W* x|^2`` through one linear layer, with a condition number of exactly 1e4.

    Args:
        rotated: Mix the axes of the input, so that no diagonal is the curvature.
    """

    CONDITION = 1e4

    def __init__(self, *, rotated: bool) -> None:
        generator = torch.Generator().manual_seed(7)
        n, width = 64, 8
        axes, _ = torch.linalg.qr(torch.randn(n, width, generator=generator, dtype=torch.float64))
        self.eigenvalues = torch.logspace(0, -math.log10(self.CONDITION), width, dtype=torch.float64)
        self.x = axes * (n * self.eigenvalues).sqrt()
        if rotated:
            self.x = self.x @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        # a list of modules, as rules that watch layers look for them inside of a model
        self.model = nn.Sequential(nn.Linear(width, 2, bias=False)).double()
        self.y = self.x @ torch.randn(width, 2, generator=generator, dtype=torch.float64)
        nn.init.zeros_(next(self.model.parameters()))

    def outputs(self) -> torch.Tensor:
        return self.model(self.x)

    def loss(self) -> torch.Tensor:
        return 0.5 * (self.outputs() - self.y).square().sum(-1).mean()

    def cotangent(self, estimator: str, outputs_NV: torch.Tensor, generator: torch.Generator) -> None:
        """The curvature at the outputs is the identity: ``sqrt(w)`` times signs, or times signed residuals."""
        signs = torch.randint(2, outputs_NV.shape, generator=generator).double() * 2 - 1
        if estimator == "empirical":
            signs = signs[:, :1] * (outputs_NV - self.y).detach()
        if estimator == "squared_gradient":
            signs = (outputs_NV - self.y).detach() / len(outputs_NV) ** 0.5
        outputs_NV.backward(gradient=signs / len(outputs_NV) ** 0.5)

    def steps_to(self, spec: OptimizerSpec, target: float, limit: int) -> int:
        """Return the steps with a constant learning rate until the loss is ``target``, or ``limit + 1``."""
        rule = spec.build(self.model.parameters(), self.model)
        for step in range(limit):
            self.run(spec, rule, 1, step)
            loss = float(self.loss().detach())
            if loss <= target or not math.isfinite(loss):
                return step + 1 if loss <= target else limit + 1
        return limit + 1

    def loss_after(self, spec: OptimizerSpec, steps: int) -> float:
        """Return the loss after steps whose learning rate falls to zero, as in training."""
        rule = spec.build(self.model.parameters(), self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / steps)
        for step in range(steps):
            self.run(spec, rule, 1, step)
            schedule.step()
        return float(self.loss().detach())


def tunings(name: str, rates: tuple[float, ...]) -> Iterator[OptimizerSpec]:
    """Yield specs of ``name`` over learning rates."""
    for rate in rates:
        yield make(name, lr=rate)


def exact_tunings(name: str, rates: tuple[float, ...]) -> Iterator[OptimizerSpec]:
    """Yield specs for a loss without noise: little damping and momentum, whatever the rule calls them."""
    fields = {field.name: field for field in dataclasses.fields(OPTIMIZERS.get(name))}
    damping = next(({d: 1e-6} for d in ("relative_damping", "damping") if d in fields), {})
    for share in (0.0, 0.5):
        momentum: dict[str, Any] = {"momentum": share} if "momentum" in fields else {}
        if "betas" in fields:
            momentum = {"betas": (share, OPTIMIZERS.get(name)().betas[1])}
        for rate in rates:
            yield make(name, lr=rate, **damping, **momentum)


def build(name: str, problem: Classifier, **settings: Any) -> tuple[OptimizerSpec, UpdateRule]:
    """Return a spec and its rule over the parameters of ``problem``."""
    spec = make(name, lr=LR, **settings)
    return spec, spec.build(problem.model.parameters(), problem.model)


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """Assert that tensors are the same bits."""
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Say whether any of the tensors differs."""
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
