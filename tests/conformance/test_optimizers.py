"""What every registered optimizer must do, whatever its rule."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from soul.optim.base import OptimizerSpec, UpdateRule
from soul.registry import OPTIMIZERS

SIZES = [(4, 3), (3,), ()]
CURVATURE = 1e-3  # gradients as small as a language model's: SoulRelease's constants are made for those
NAMES = OPTIMIZERS.names()

pytestmark = pytest.mark.parametrize("name", NAMES)


def make(name: str, **settings: Any) -> OptimizerSpec:
    spec = OPTIMIZERS.get(name)(**{"lr": 0.01, "weight_decay": 0.0, **settings})
    assert isinstance(spec, OptimizerSpec)
    return spec


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SIZES]


def targets() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator) for s in SIZES]


def loss_of(params: list[torch.nn.Parameter]) -> torch.Tensor:
    """Return a convex quadratic whose curvature is CURVATURE in every direction."""
    parts = [0.5 * CURVATURE * ((p.float() - t) ** 2).sum() for p, t in zip(params, targets(), strict=True)]
    return torch.stack(parts).sum()


def advance(rule: UpdateRule, params: list[torch.nn.Parameter], steps: int, start: int = 0) -> None:
    """Do what the trainer does: a curvature pass where one is due, then a step."""
    for step in range(start, start + steps):
        if rule.curvature_due(step):
            for p in params:
                p.grad = torch.full_like(p, CURVATURE**0.5)
            rule.update_curvature()
        rule.zero_grad()
        loss_of(params).backward()
        rule.step()


def snapshot(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_spec_is_a_frozen_record(name: str) -> None:
    spec = make(name)
    assert type(spec).name == name
    assert len(OPTIMIZERS.summary(name)) > 20
    assert type(spec)(**dataclasses.asdict(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_spec_hands_all_its_fields_to_the_rule(name: str) -> None:
    spec = OPTIMIZERS.get(name)()
    group = spec.build(parameters()).param_groups[0]
    for field in dataclasses.fields(spec):
        assert group[field.name] == getattr(spec, field.name)


def test_builds_an_update_rule_that_declares_its_needs(name: str) -> None:
    spec = make(name)
    rule = spec.build(parameters())
    assert isinstance(rule, UpdateRule)
    assert rule.curvature_due(0) == spec.needs_curvature
    assert rule.metrics() == {}


@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan")])
def test_refuses_a_learning_rate_of_zero_or_less(name: str, lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        make(name, lr=lr)
    rule: Any = type(make(name).build(parameters()))
    with pytest.raises(ValueError, match="lr must be above 0"):
        rule(parameters(), lr=lr)


def test_refuses_a_negative_weight_decay(name: str) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        make(name, weight_decay=-0.1)


def test_decreases_a_convex_quadratic(name: str) -> None:
    params = parameters()
    before = loss_of(params).item()
    advance(make(name).build(params), params, 600)
    assert loss_of(params).item() < 0.05 * before


def test_is_deterministic(name: str) -> None:
    results = []
    for _ in range(2):
        params = parameters()
        advance(make(name, weight_decay=0.1).build(params), params, 12)
        results.append(snapshot(params))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_survives_a_reload(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    rule = make(name, lr=0.03).build(params)
    advance(rule, params, 7)
    saved, weights = copy.deepcopy(rule.state_dict()), snapshot(params)
    advance(rule, params, 13, start=7)

    fresh = [torch.nn.Parameter(w) for w in weights]
    reloaded = make(name, lr=0.5).build(fresh)
    reloaded.load_state_dict(saved)
    for key, state in reloaded.state_dict()["state"].items():
        for entry, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == saved["state"][key][entry].dtype
                assert torch.equal(value, saved["state"][key][entry])
    advance(reloaded, fresh, 13, start=7)
    assert_same(snapshot(params), snapshot(fresh))


def test_low_precision_parameters_work(name: str) -> None:
    params = parameters(torch.bfloat16)
    before = loss_of(params).item()
    advance(make(name).build(params), params, 600)
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in params)
    assert loss_of(params).item() < 0.2 * before


def test_parameters_without_gradient_stay(name: str) -> None:
    params = parameters()
    rule = make(name, weight_decay=0.1).build(params)
    advance(rule, params, 1)
    before = snapshot(params)
    rule.zero_grad()
    params[0].grad = torch.ones_like(params[0])
    rule.update_curvature()
    rule.step()
    assert not torch.equal(params[0], before[0])
    assert_same(snapshot(params)[1:], before[1:])


def test_groups_keep_their_own_settings(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [
        {"params": params[:1], "lr": 0.01},
        {"params": params[1:2], "lr": 0.02},
        {"params": params[2:], "lr": 0.01, "weight_decay": 0.5},
    ]
    rule = make(name).build(groups)
    for grad in (1.0, 0.5):  # a curvature estimate of 1, then a gradient of 1/2
        for p in params:
            p.grad = torch.full_like(p, grad)
        if grad == 1.0:
            rule.update_curvature()
    rule.step()
    one, two, decayed = (1 - p.detach() for p in params)
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(decayed, one + 0.01 * 0.5)


def test_schedulers_drive_the_learning_rate(name: str) -> None:
    params = parameters()
    rule = make(name, lr=0.02).build(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.0 if step == 1 else 1.0)
    advance(rule, params, 1)
    scheduler.step()
    before = snapshot(params)
    advance(rule, params, 1, start=1)
    assert_same(snapshot(params), before)
    scheduler.step()
    advance(rule, params, 1, start=2)
    assert not torch.equal(params[0], before[0])


def test_closure_gives_the_loss(name: str) -> None:
    params = parameters()
    rule = make(name).build(params)
    advance(rule, params, 1)

    def closure() -> float:
        rule.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return float(loss.detach())

    expected = loss_of(params).item()
    assert rule.step(closure) == pytest.approx(expected)
    assert loss_of(params).item() < expected


def test_strided_parameters_step_like_contiguous_ones(name: str) -> None:
    plain = torch.nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(3)))
    strided = torch.nn.Parameter(plain.detach().t().contiguous().t())
    assert not strided.is_contiguous()
    for p in (plain, strided):
        rule = make(name, weight_decay=0.1).build([p])
        for step in range(3):
            p.grad = torch.arange(20.0).view(5, 4) / 10 - 1 + 0.1 * step
            rule.update_curvature()
            rule.step()
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=0, atol=1e-7)


def test_sparse_gradients_are_refused(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    rule = make(name).build([p])
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)sparse|dense"):
        rule.step()


def test_one_dimensional_and_empty_parameters_work(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(0))]
    rule = make(name).build(params)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.update_curvature()
    rule.step()
    assert float(params[0]) < 1


def test_accepts_iterators_and_named_parameters(name: str) -> None:
    model = torch.nn.Linear(2, 1)
    for params in (model.parameters(), model.named_parameters(), iter([{"params": model.parameters()}])):
        rule = make(name).build(params)  # pyright: ignore[reportArgumentType]
        assert sum(len(group["params"]) for group in rule.param_groups) == 2
