"""What every registered optimizer says it will keep is what it keeps, counted among all tensors that are alive."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_tasks import make, names
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from soul.optim.base import OptimizerSpec, UpdateRule
from soul.optim.cost import multiplies_bf16, probed_cost
from soul.optim.external import ExternalSpec
from soul.optim.kfac import KFACSpec


def alive() -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors there are, by address."""
    gc.collect()
    # not isinstance, which wakes up proxies that other libraries keep
    # and not what compiled models of other tests leave, which has a shape and no memory
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor))
    found = [t.untyped_storage() for t in tensors]
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def passes(spec: OptimizerSpec, rule: UpdateRule, loss: Callable[[], torch.Tensor], steps: int = 3) -> None:
    """Make curvature passes and steps as the trainer does, with the loss's own gradient for a cotangent."""
    for _ in range(steps):
        if spec.needs_curvature:
            with rule.observing():
                loss().backward()
            rule.update_curvature()
            rule.zero_grad()
        loss().backward()
        rule.step()
        rule.zero_grad()


def kept(spec: OptimizerSpec, model: nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that are there after steps and were not before, gradients apart."""
    loss().backward()  # whatever a model keeps for itself
    model.zero_grad()
    before = alive()
    rule = spec.build([p for p in model.parameters() if p.requires_grad], model)
    passes(spec, rule, loss)
    return sum(storage.nbytes() for at, storage in alive().items() if at not in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", names())
def test_declared_state_is_the_real_one(name: str, dtype: torch.dtype, make_model: Any) -> None:
    model = make_model(dtype=dtype)
    ids = torch.arange(24).view(2, 12)
    spec = make(name)
    declared = spec.cost([p for p in model.parameters() if p.requires_grad], model)
    found = kept(spec, model, lambda: model(input_ids=ids).logits.float().logsumexp(-1).square().mean())
    assert found > 0
    assert declared.kept == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in names() if "state_dtype" in {f.name for f in dataclasses.fields(make(n))}])
def test_narrow_states_take_half(name: str, dtype: torch.dtype, make_model: Any) -> None:
    model = make_model(dtype=dtype)
    ids = torch.arange(24).view(2, 12)
    params = list(model.parameters())
    spec = make(name, state_dtype="bfloat16", rounding="stochastic")
    declared = spec.cost(params, model)
    found = kept(spec, model, lambda: model(input_ids=ids).logits.float().logsumexp(-1).square().mean())
    assert declared.kept == pytest.approx(found, rel=0.02)
    assert declared.kept == pytest.approx(make(name).cost(params, model).kept / 2, rel=0.01)


@pytest.mark.parametrize("others", ["frozen", "diagonal"])
@pytest.mark.parametrize(
    "name", [name for name in names() if "others" in {f.name for f in dataclasses.fields(make(name))}]
)
def test_biases_and_parameters_without_factors_count(name: str, others: str) -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 16, bias=False))
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    if others == "diagonal" and name == "whiten":
        pytest.skip("whiten steps nothing but its layers")
    spec = make(name, others=others)
    declared = spec.cost(list(model.parameters()), model)
    assert declared.kept == pytest.approx(kept(spec, model, lambda: model(x).square().mean()), rel=0.02)


@pytest.mark.parametrize("damping", [0.1, 0.001])
def test_inverses_in_bf16_count_half(damping: float) -> None:
    model = nn.Sequential(nn.Linear(300, 260, bias=False), nn.Linear(260, 30, bias=False))
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    spec = make("kfac", damping=damping)
    assert isinstance(spec, KFACSpec)
    declared = spec.cost(list(model.parameters()), model)
    exact = dataclasses.replace(spec, products="exact").cost(list(model.parameters()), model)
    halved = damping > 0.01 and multiplies_bf16("cpu")
    assert exact.kept - declared.kept == (2 * (300**2 + 260**2 + 260**2) if halved else 0)
    assert declared.kept == pytest.approx(kept(spec, model, lambda: model(x).square().mean()), rel=0.02)


@pytest.mark.parametrize("name", names())
def test_meta_tensors_are_enough_and_cost_the_same(name: str, make_model: Any) -> None:
    model = make_model()
    spec = make(name)
    real = spec.cost(list(model.parameters()), model)
    model = model.to("meta")
    assert spec.cost(list(model.parameters()), model) == real


@pytest.mark.parametrize("name", names())
def test_costs_add_up_over_sets_of_parameters(name: str, make_model: Any) -> None:
    """Twice the layers keep twice the state: a formula has no constant part but a step's own space."""
    spec = make(name)
    small, large = make_model(), make_model()
    large.model.layers.extend(make_model(1).model.layers)
    large.config.num_hidden_layers = len(large.model.layers)
    once, twice = (spec.cost(list(m.model.layers.parameters()), m) for m in (small, large))
    for what in ("state", "whole", "traffic", "products", "per_position", "derivation"):
        assert getattr(twice, what) == pytest.approx(2 * getattr(once, what), rel=1e-3)
    assert once.kept > 0


@pytest.mark.parametrize(
    "path", ["torch.optim.NAdam", "torch.optim.Adafactor", "torch.optim.Adagrad", "torch.optim.Rprop"]
)
def test_rules_from_elsewhere_are_probed(path: str) -> None:
    """A state with a number for each row or column is scaled as it should be."""
    model = nn.Sequential(nn.Linear(90, 64), nn.LayerNorm(64), nn.Linear(64, 7))
    x = torch.randn(5, 90, generator=torch.Generator().manual_seed(0))
    spec = ExternalSpec(path=path)
    declared = spec.cost(list(model.parameters()), model)
    assert declared.kept == pytest.approx(kept(spec, model, lambda: model(x).square().mean()), rel=0.02)


def test_a_rule_that_cannot_be_probed_says_so() -> None:
    with pytest.raises(ValueError, match="memory of this optimizer is not known"):
        ExternalSpec(path="torch.optim.LBFGS").cost([torch.ones(2, 2)])


def test_a_probe_agrees_with_the_formulas() -> None:
    params = [torch.ones(12, 40), torch.ones(40)]
    for name in names("loose_parameters"):
        spec = make(name)
        if spec.needs_curvature:  # their state begins with a pass
            continue
        probed = probed_cost(lambda tensors, spec=spec: spec.build(tensors), params)
        assert spec.cost(params).state == pytest.approx(probed.state, rel=0.02)
