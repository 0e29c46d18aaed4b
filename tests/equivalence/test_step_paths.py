"""The fast ways to compute a step against the plain one: the same weights, states and numbers, to float tolerance."""

from __future__ import annotations

import functools
import math
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


def trained(
    rule: Any, path: str, *, signed: bool = False, dtype: torch.dtype = torch.float32, steps: int = 6, **storage: Any
) -> Any:
    """Return the optimizer after steps with refreshes between them, and what it told of each."""
    groups = problem(dtype)
    optimizer = rule(groups, lr=1e-2, **storage)
    optimizer.path = path
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


def test_threads_and_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are added tile by tile, in order, whoever made them."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(numbers(trained(RULES["sophia, kl"], "fused")[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    monkeypatch.setattr(_fused, "TILE", 97)
    smaller = numbers(trained(RULES["sophia, kl"], "fused")[0])
    for name, value in results[0].items():
        torch.testing.assert_close(smaller[name], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["foreach", "fused"])
@pytest.mark.parametrize("rule", ["sophia", "soul_release", "adamw_retain"])
def test_other_precisions(rule: str, path: str, dtype: torch.dtype) -> None:
    """bf16 has kernels of its own; what has none takes the multi-tensor way. A rounding may fall the other way."""
    expected = numbers(trained(RULES[rule], "reference", dtype=dtype)[0])
    found = numbers(trained(RULES[rule], path, dtype=dtype)[0])
    for name, value in expected.items():
        spacing = torch.finfo(dtype).eps if name.endswith(".p") else 0.0
        rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5 + spacing, 1e-5)
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)
        if name.endswith(".p") and dtype != torch.float64 and value.numel() > 100:
            assert float((found[name] != value).double().mean()) < 0.01


@pytest.mark.parametrize("path", ["foreach", "fused"])
@pytest.mark.parametrize("rule", ["sophia", "sophia, kl", "sophia, win_rate", "soul_release", "adamw_retain", "lion"])
def test_narrow_states_and_noise(rule: str, path: str) -> None:
    """bf16 states, and bf16 weights rounded by noise: the noise is the same, so only ties of a last digit differ."""
    storage = {"state_dtype": "bfloat16", "rounding": "stochastic", "dtype": torch.bfloat16}
    expected = numbers(trained(RULES[rule], "reference", **storage)[0])
    found = numbers(trained(RULES[rule], path, **storage)[0])
    for name, value in expected.items():
        assert value.dtype == found[name].dtype
        assert value.dtype == (torch.float32 if name.endswith("sum") else torch.bfloat16)
        apart = (found[name].float() - value.float()).norm()
        assert float(apart) <= 2e-3 * float(value.float().norm())
        if value.numel() > 100:
            assert float((found[name] != value).double().mean()) < 0.01


@pytest.mark.parametrize("path", ["foreach", "fused"])
def test_what_is_no_number_stays_so(path: str) -> None:
    """A lost model must look lost."""
    weights = []
    for way in ("reference", path):
        p = nn.Parameter(torch.ones(40))
        optimizer = Sophia([p], lr=0.1)
        optimizer.path = way
        p.grad = torch.ones(40)
        optimizer.update_curvature()
        p.grad[3], p.grad[5], p.grad[7] = math.nan, math.inf, -math.inf
        optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(weights[0], weights[1], equal_nan=True)
    assert weights[0].isnan()[3]


def test_the_way_is_chosen_by_size_device_and_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.ones(10), torch.ones(_paths.FUSED_FROM)
    assert _fused.available()  # the developers' extra brings numba, so that these tests test it
    assert not _paths.fuses("auto", [small])
    assert _paths.fuses("auto", [small, large])
    assert not _paths.fuses("auto", [large.to("meta")])
    assert _paths.fuses("fused", [small])
    assert not any(_paths.fuses(path, [large]) for path in ("reference", "foreach"))
    assert _paths.together("auto", [small])
    assert _paths.together("auto", [large.to("meta")])
    assert not _paths.together("auto", [large])
    monkeypatch.setattr(_fused, "available", lambda: False)
    assert not _paths.fuses("auto", [large])
    with pytest.raises(ValueError, match="needs numba: pip install numba"):
        _paths.fuses("fused", [large])


def test_the_way_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Signum([nn.Parameter(torch.ones(2))])
    assert optimizer.path == "auto"
    monkeypatch.setenv(_paths.VARIABLE, "foreach")
    assert optimizer.path == "foreach"
    optimizer.path = "reference"
    assert optimizer.path == "reference"
    with pytest.raises(ValueError, match="path must be one of auto, reference, foreach, fused, not 'gpu'"):
        optimizer.path = "gpu"
    monkeypatch.setenv(_paths.VARIABLE, "fast")
    with pytest.raises(ValueError, match="SOUL_STEP must be one of"):
        Signum([nn.Parameter(torch.ones(2))]).path  # noqa: B018 - reading it is the test


def test_autograd_knows_that_weights_were_changed() -> None:
    """Kernels write past torch; a graph that saved a weight must still notice."""
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    optimizer = Signum([p])
    optimizer.path = "fused"
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_numba_a_large_model_steps_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    _fused.available.cache_clear()
    try:
        p = nn.Parameter(torch.zeros(_paths.FUSED_FROM))
        p.grad = torch.ones_like(p)
        Signum([p], lr=0.5).step()
        assert not _fused.available()
    finally:
        _fused.available.cache_clear()
    assert bool((p == -0.5).all())
