"""Sophia and its controls against their formulas in numpy, the bounds they promise, and LoRA's first steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soul.curvature.estimators import backward_curvature
from soul.optim import AdamWRetain, Sophia
from soul.registry import OPTIMIZERS

LR, B1, B2, DECAY = 0.01, 0.9, 0.8, 0.1
SIZES = (24, 16)


def noises(seed: int = 2) -> Iterator[list[np.ndarray]]:
    """Yield vectors for two tensors whose entries span five decades."""
    rng = np.random.default_rng(seed)
    while True:
        yield [rng.standard_normal(n) * np.logspace(-2.5, 0.5, n) for n in SIZES]


def as_tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.tensor(a).view(-1, 8) for a in arrays]


class Reference:
    """The averages of Sophia and AdamWRetain for two tensors of one parameter group."""

    def __init__(self) -> None:
        self.p = [np.random.default_rng(5).standard_normal(n) for n in SIZES]
        self.m, self.h = ([np.zeros(n) for n in SIZES] for _ in range(2))
        self.steps = self.refreshes = 0

    def refresh(self, estimate: list[np.ndarray]) -> None:
        self.refreshes += 1
        self.h = [B2 * h + (1 - B2) * e for h, e in zip(self.h, estimate, strict=True)]

    def average(self, g: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Take in a gradient; return ``m_hat`` and the positive part of ``h_hat``."""
        self.steps += 1
        self.m = [B1 * m + (1 - B1) * x for m, x in zip(self.m, g, strict=True)]
        m_hat = [m / (1 - B1**self.steps) for m in self.m]
        return m_hat, [np.maximum(h / (1 - B2**self.refreshes), 0) for h in self.h]

    def move(self, u: list[np.ndarray]) -> None:
        self.p = [p * (1 - LR * DECAY) - LR * x for p, x in zip(self.p, u, strict=True)]


def compare(rule: Any, signed: bool, step_of: Any, steps: int = 20) -> list[dict[str, float]]:
    """Run ``rule`` beside ``step_of(m_hat, h_hat) -> u``, with a refresh at every third step; return its metrics."""
    reference, told = Reference(), []
    params = [nn.Parameter(t) for t in as_tensors(reference.p)]
    optimizer = rule(params, lr=LR, betas=(B1, B2), weight_decay=DECAY)
    source = noises()
    for step in range(steps):
        if step % 3 == 0:
            root, other = next(source), next(source)
            # as Hutchinson's, of either sign, or a square; the first is positive so that something is known
            estimate = [r * o for r, o in zip(root, other, strict=True)] if signed and step else [r**2 for r in root]
            reference.refresh(estimate)
            for p, r in zip(params, as_tensors(root), strict=True):
                p.grad = r
            given = dict(zip(params, as_tensors(estimate), strict=True)) if signed and step else None
            optimizer.update_curvature(given)
        g = next(source)
        for p, x in zip(params, as_tensors(g), strict=True):
            p.grad = x
        reference.move(step_of(*reference.average(g)))
        optimizer.step()
        for p, expected in zip(params, reference.p, strict=True):
            np.testing.assert_allclose(p.detach().numpy().ravel(), expected, rtol=0, atol=1e-12)
        told.append(optimizer.metrics() | {"predicted_kl": optimizer.predicted_kl() or 0.0})
    return told


def mean_of(arrays: list[np.ndarray]) -> float:
    return float(np.concatenate(arrays).mean())


def ratio(m: list[np.ndarray], h: list[np.ndarray], rho: float, damping: float, relative: float) -> list[np.ndarray]:
    floor = damping + relative * rho * mean_of(h)
    return [a / (rho * b + floor) for a, b in zip(m, h, strict=True)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("rho", "damping", "relative"), [(0.5, 0.02, 0.0), (0.5, 1e-6, 0.3), (2.0, 0.01, 0.05)])
def test_sophia_follows_its_formula(signed: bool, rho: float, damping: float, relative: float) -> None:
    rates = []

    def step_of(m: list[np.ndarray], h: list[np.ndarray]) -> list[np.ndarray]:
        u = ratio(m, h, rho, damping, relative)
        rates.append(np.mean(np.abs(np.concatenate(u)) < 1))
        return [np.clip(x, -1, 1) for x in u]

    def rule(params: Any, **settings: Any) -> Sophia:
        return Sophia(params, rho=rho, damping=damping, relative_damping=relative, **settings)

    told = compare(rule, signed, step_of)
    assert [t["win_rate"] for t in told] == pytest.approx(rates, abs=1e-9)
    assert 0.05 < min(rates) < 0.99  # else the clip was never in play, and this shows half of the rule


def test_sophia_bounds_each_tensor() -> None:
    scaled = []

    def step_of(m: list[np.ndarray], h: list[np.ndarray]) -> list[np.ndarray]:
        u = ratio(m, h, 4.0, 1e-3, 0.05)
        factors = [min(1.0, 1 / np.sqrt(np.mean(x**2))) for x in u]
        scaled.append(np.mean([f < 1 for f in factors]))
        return [f * x for f, x in zip(factors, u, strict=True)]

    def rule(params: Any, **settings: Any) -> Sophia:
        return Sophia(params, rho=4.0, damping=1e-3, relative_damping=0.05, clip="block_rms", **settings)

    told = compare(rule, True, step_of)
    assert [t["blocks_scaled"] for t in told] == scaled
    assert all("win_rate" not in t for t in told)
    assert 0 < np.mean(scaled) < 1


def test_sophia_bounds_the_predicted_kl() -> None:
    bound, costs = 2e-4, []

    def step_of(m: list[np.ndarray], h: list[np.ndarray]) -> list[np.ndarray]:
        u = ratio(m, h, 1.0, 1e-3, 0.05)
        cost = sum(0.5 * LR**2 * float(np.sum(b * x**2)) for b, x in zip(h, u, strict=True))
        costs.append(cost)
        return [x * min(1.0, np.sqrt(bound / cost)) for x in u]

    def rule(params: Any, **settings: Any) -> Sophia:
        return Sophia(params, rho=1.0, damping=1e-3, relative_damping=0.05, clip="kl", kl_bound=bound, **settings)

    told = compare(rule, True, step_of)
    assert min(costs) < bound < max(costs)
    assert [t["kl_scale"] for t in told] == pytest.approx([min(1, np.sqrt(bound / c)) for c in costs])
    assert [t["predicted_kl"] for t in told] == pytest.approx([min(bound, c) for c in costs])
    assert max(t["predicted_kl"] for t in told) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("relative", [0.0, 0.2])
def test_adamw_retain_follows_its_formula(relative: float) -> None:
    def step_of(m: list[np.ndarray], h: list[np.ndarray]) -> list[np.ndarray]:
        floor = relative * mean_of(h)
        return [a / (np.sqrt(b + floor) + 1e-3) for a, b in zip(m, h, strict=True)]

    def rule(params: Any, **settings: Any) -> AdamWRetain:
        return AdamWRetain(params, eps=1e-3, relative_damping=relative, **settings)

    compare(rule, False, step_of)
    compare(rule, True, step_of)


@pytest.mark.parametrize("clip", ["element", "block_rms", "kl"])
def test_predicted_kl_is_that_of_the_step_made(clip: str) -> None:
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in SIZES]
    optimizer = Sophia(params, lr=0.3, clip=clip, rho=0.5, kl_bound=1e-4)  # pyright: ignore[reportArgumentType]
    assert optimizer.predicted_kl() is None
    source = noises()
    curvature = next(source)
    for p, c in zip(params, curvature, strict=True):
        p.grad = torch.tensor(c)
    optimizer.update_curvature()
    for p, g in zip(params, next(source), strict=True):
        p.grad = torch.tensor(g)
    optimizer.step()
    made = 0.5 * sum(float((torch.tensor(c) ** 2) @ p.detach() ** 2) for c, p in zip(curvature, params, strict=True))
    assert optimizer.predicted_kl() == pytest.approx(made, rel=1e-9)
    if clip == "kl":
        assert made == pytest.approx(1e-4, rel=1e-6)


def test_kl_without_curvature_is_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = Sophia([p], clip="kl")
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="no curvature yet"):
        optimizer.step()
    retain = AdamWRetain([p])
    with pytest.raises(ValueError, match="no retain gradient"):
        retain.step()
    assert p.tolist() == [0.0, 0.0]


def test_wrong_estimates_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"its parameter's shape \[2, 3\], not torch.strided \[3, 2\]"):
        Sophia([p]).update_curvature({p: torch.ones(3, 2)})
    with pytest.raises(ValueError, match="dense curvature estimate"):
        Sophia([p]).update_curvature({p: torch.ones(2, 3).to_sparse()})
    other = nn.Parameter(torch.zeros(1))
    optimizer = Sophia([p])
    optimizer.update_curvature({other: torch.ones(1)})  # an estimate may know of more parameters than the rule
    assert p not in optimizer.state


# Calibration


def calibrated(win_rate: float, steps: int, rng: np.random.Generator, optimizer: Sophia | None = None) -> Any:
    """Run ``steps`` with heavy-tailed gradients; return the optimizer and the win rates it told."""
    sizes, told = (3000, 1000), []
    if optimizer is None:
        params = [nn.Parameter(torch.zeros(n)) for n in sizes]
        groups = [{"params": params}, {"params": [nn.Parameter(torch.zeros(500))], "embedding": True}]
        optimizer = Sophia(groups, lr=1e-3, win_rate=win_rate)
    for _ in range(steps):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.tensor(rng.standard_normal(len(p)) * np.exp(rng.standard_normal(len(p))), dtype=p.dtype)
        optimizer.update_curvature()
        for p in params:
            g = rng.standard_normal(len(p)) * np.exp(rng.standard_normal(len(p))) * (np.arange(len(p)) % 4 > 0)
            p.grad = torch.tensor(g, dtype=p.dtype) * 1e-3
        optimizer.step()
        told.append(optimizer.metrics())
    return optimizer, told


@pytest.mark.parametrize("win_rate", [0.05, 0.3, 0.9])
def test_rho_is_set_for_a_win_rate(win_rate: float) -> None:
    """A quarter of the coordinates has no gradient; they count in neither the target nor what is told."""
    optimizer, told = calibrated(win_rate, 14, np.random.default_rng(3))
    for numbers in told[:10]:
        assert numbers["win_rate"] == pytest.approx(win_rate, abs=2e-3)
        assert numbers["win_rate_embedding"] == pytest.approx(win_rate, abs=5e-3)
    rhos = [numbers["rho"] for numbers in told]
    assert len(set(rhos[:10])) == 10
    assert len(set(rhos[9:])) == 1  # 1 / (1 - .9) steps, then it stays
    assert rhos[-1] != told[-1]["rho_embedding"]
    assert abs(told[-1]["win_rate"] - win_rate) < 0.15
    assert optimizer.param_groups[0]["calibrations"] == 10


def test_rho_is_set_where_estimates_have_either_sign() -> None:
    rng = np.random.default_rng(4)
    p = nn.Parameter(torch.zeros(4000))
    optimizer = Sophia([p], lr=1e-3, win_rate=0.3)
    for _ in range(5):
        optimizer.update_curvature({p: torch.tensor(rng.standard_normal(4000) + 0.2, dtype=p.dtype)})
        p.grad = torch.tensor(rng.standard_normal(4000), dtype=p.dtype)
        optimizer.step()
        assert (optimizer.state[p]["curvature"] < 0).sum() > 400
        assert optimizer.metrics()["win_rate"] == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize("cut", [4, 12])
def test_a_calibrated_rho_survives_a_checkpoint(cut: int) -> None:
    whole, _ = calibrated(0.3, 16, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    first, _ = calibrated(0.3, cut, rng)
    groups = [{"params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in first.param_groups]
    second = Sophia(groups, lr=1e-3, win_rate=0.3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    calibrated(0.3, 16 - cut, rng, second)
    for one, other in zip(whole.param_groups, second.param_groups, strict=True):
        assert torch.equal(one["rho"], other["rho"])
        for p, q in zip(one["params"], other["params"], strict=True):
            assert torch.equal(p, q)


def test_a_win_rate_where_nothing_moves_leaves_rho() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = Sophia([p], win_rate=0.3, rho=0.125)
    p.grad = torch.ones(3)
    optimizer.update_curvature()
    p.grad = torch.zeros(3)
    optimizer.step()
    assert float(optimizer.param_groups[0]["rho"]) == 0.125
    assert p.tolist() == [0.0, 0.0, 0.0]


# LoRA


class LoRA(nn.Module):
    """``W x + B A x`` with a frozen ``W`` and, as at every start, ``B = 0``: no loss depends on ``A`` yet."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w, a, self.x = (torch.randn(n, 12, generator=generator).double() for n in (5, 3, 64))
        self.a, self.b = nn.Parameter(a / 12**0.5), nn.Parameter(torch.zeros(5, 3).double())
        self.y = torch.randint(5, (64,), generator=generator)

    def logits(self) -> torch.Tensor:
        return self.x @ self.w.T + self.x @ self.a.T @ self.b.T

    def backward(self) -> None:
        nn.functional.cross_entropy(self.logits(), self.y).backward()

    def pass_curvature(self, optimizer: Any, seed: int) -> None:
        self.zero_grad()
        backward_curvature(self.logits(), torch.full((64,), 1 / 64), "ggn", torch.Generator().manual_seed(seed))
        optimizer.update_curvature()
        self.zero_grad()


def first_steps_of_a(optimizer_of: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first move of ``A``, which comes at step two and without a further refresh, and its momentum."""
    model = LoRA()
    optimizer = optimizer_of([model.a, model.b])
    model.pass_curvature(optimizer, 1)
    assert not optimizer.state[model.a]["curvature"].any()
    assert optimizer.state[model.b]["curvature"].any()
    start = model.a.detach().clone()
    model.backward()
    optimizer.step()
    assert torch.equal(model.a, start)  # B is 0, and with it the gradient of A
    model.zero_grad()
    model.backward()
    optimizer.step()
    return model.a.detach() - start, optimizer.state[model.a]["exp_avg"]


def test_loras_first_steps_are_no_sign_steps() -> None:
    lr = 1e-3
    move, m = first_steps_of_a(lambda params: Sophia(params, lr=lr, rho=1.0))
    assert 0.01 * lr < move.abs().max() < 0.5 * lr
    torch.testing.assert_close(move / move.norm(), -m / m.norm())  # a gradient step, in the scale that B gives
    move, m = first_steps_of_a(lambda params: Sophia(params, lr=lr))
    assert float((move.abs() < 0.99 * lr).float().mean()) > 0.2  # also where a small rho cuts most steps
    for rho in (0.04, 1.0):  # what it would be without
        move, m = first_steps_of_a(lambda params, rho=rho: Sophia(params, lr=lr, rho=rho, relative_damping=0.0))
        torch.testing.assert_close(move, -lr * m.sign())
    move, m = first_steps_of_a(lambda params: AdamWRetain(params, lr=lr))
    assert move.abs().max() < lr
    torch.testing.assert_close(move / move.norm(), -m / m.norm())


@pytest.mark.parametrize(
    "settings", [{}, {"win_rate": 0.3}, {"clip": "block_rms"}, {"clip": "kl", "rho": 1.0, "lr": 0.3}]
)
def test_lora_learns(settings: dict[str, Any]) -> None:
    model = LoRA()
    spec = OPTIMIZERS.get("sophia")(**{"lr": 0.02, **settings})
    optimizer = spec.build(model.parameters())
    start = nn.functional.cross_entropy(model.logits(), model.y).item()
    for step in range(60):
        if step % 5 == 0:
            model.pass_curvature(optimizer, step)
        model.zero_grad()
        model.backward()
        optimizer.step()
    assert nn.functional.cross_entropy(model.logits(), model.y).item() < 0.8 * start
    assert all(bool(p.isfinite().all()) for p in model.parameters())
