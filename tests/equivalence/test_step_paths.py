"""The fast ways to compute a step against the plain one: the same weights, states and numbers, to float tolerance."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from soul.optim import AdamWRetain, Lion, Signum, Sophia, SoulRelease, _fused, _paths

SHAPES = [(), (1,), (0,), (61,), (40, 33), (3, 5, 7), (130, 41)]
RULES: dict[str, Callable[..., Any]] = {
    "signum": Signum,
    "signum, no momentum": functools.partial(Signum, momentum=0.0),
    "lion": Lion,
    "soul_release": functools.partial(SoulRelease, rho=1e-3),
    "adamw_retain": AdamWRetain,
    "adamw_retain, undamped": functools.partial(AdamWRetain, relative_damping=0.0, eps=1e-3),
    "sophia": functools.partial(Sophia, rho=0.5),
    "sophia, damped": functools.partial(Sophia, rho=0.5, damping=1e-2, relative_damping=0.5),
    "sophia, win_rate": functools.partial(Sophia, win_rate=0.3, betas=(0.7, 0.95)),
    "sophia, block_rms": functools.partial(Sophia, clip="block_rms", rho=1.0),
    "sophia, kl": functools.partial(Sophia, clip="kl", rho=1.0, kl_bound=1e-5),
}
SIGNS = ("signum", "lion")


def problem(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Return parameter groups of all shapes: one decays, one ascends, one is an embedding with a rate of its own."""
    generator = torch.Generator().manual_seed(0)

    def some() -> list[nn.Parameter]:
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        strided = torch.randn(20, 30, generator=generator).to(dtype).t()
        return [nn.Parameter(t) for t in [*tensors, strided]]

    return [
        {"params": some(), "weight_decay": 0.1},
        {"params": some(), "maximize": True},
        {"params": some(), "embedding": True, "lr": 3e-3},
    ]


def trained(rule: Any, path: str, *, signed: bool = False, dtype: torch.dtype = torch.float32, steps: int = 6) -> Any:
    """Return the optimizer after steps with refreshes between them, and what it told of each."""
    groups = problem(dtype)
    optimizer = rule(groups, lr=torch.tensor(1e-2) if path == "tensor" else 1e-2)
    optimizer.path = "reference" if path == "tensor" else path
    generator = torch.Generator().manual_seed(1)
    params = [p for group in groups for p in group["params"]]
    told = []

    def noise(p: torch.Tensor) -> torch.Tensor:
        scale = torch.randn(p.shape, generator=generator).mul(1.5).exp()
        return (torch.randn(p.shape, generator=generator) * scale).to(dtype)

    for step in range(steps):
        if step % 3 == 0:
            for p in params:
                p.grad = noise(p)
            estimate = {p: p.grad * noise(p) if step else p.grad.square() for p in params} if signed else None
            optimizer.update_curvature(estimate)
        for at, p in enumerate(params):
            p.grad = None if at == step else noise(p)
        optimizer.step()
        told.append(optimizer.metrics() | {"predicted_kl": optimizer.predicted_kl() or 0.0})
    return optimizer, told


def numbers(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return weights and states."""
    out = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for at, p in enumerate(params):
        out[f"{at}.p"] = p.detach()
        out |= {f"{at}.{name}": value for name, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
    return out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors, and fill several lists."""
    monkeypatch.setattr(_fused, "TILE", 1000)
    monkeypatch.setattr("soul.optim._elementwise.CPU_CHUNK_PER_THREAD", 1500)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("path", ["foreach", "fused"])
@pytest.mark.parametrize("rule", RULES)
def test_every_path_is_the_reference(rule: str, path: str, signed: bool) -> None:
    expected, told_expected = trained(RULES[rule], "reference", signed=signed)
    found, told = trained(RULES[rule], path, signed=signed)
    one, other = numbers(expected), numbers(found)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=2e-5, atol=1e-6)
    for a, b in zip(told_expected, told, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=3e-4)  # a coordinate or two at the very bound
