"""Kronecker factors of layers as models have them: adapters on one input, experts without tokens, frozen biases."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from soul.adapters import AdapterSpec, add_adapter
from soul.curvature.inverses import EigenInverse, damped
from soul.curvature.kronecker import KroneckerFactors
from soul.curvature.passes import CurvaturePasses
from soul.curvature.seen import Seen
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import ChatTemplate
from soul.optim._kronecker_cost import _with_inputs_of_their_own
from soul.registry import OPTIMIZERS
from soul.types import LostModelError

SPEC = CurvatureSpec(batch=4, interval=1, cache=False)


@pytest.fixture
def refreshed(tokenizer: Any, retain_set: Any) -> Callable[..., Any]:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set)]

    def make(model: Any, name: str = "kfac", spec: CurvatureSpec = SPEC) -> Any:
        rule = OPTIMIZERS.get(name)(lr=0.1).build([p for p in model.parameters() if p.requires_grad], model)
        CurvaturePasses(spec, rows).refresh(model, rule, 0)
        return rule

    return make


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_on_one_input_share_its_factor(refreshed, make_model, monkeypatch, dropout) -> None:
    def adapted() -> Any:
        return add_adapter(make_model(), AdapterSpec(r=2, dropout=dropout))

    def owners(factors: KroneckerFactors, half: str = "") -> set[str]:
        return {factors.input_of(name) for name in factors.layers if half in name}

    model = adapted()
    factors = refreshed(model).factors
    assert len(owners(factors, ".lora_A.")) == len(owners(refreshed(make_model()).factors)) == 4 * 2
    assert set(_with_inputs_of_their_own(model, factors)) == owners(factors)
    kept = [t for name, t in factors.state().items() if not name.endswith(".shares")]
    assert 0 < factors.bytes() <= sum(t.numel() * t.element_size() for t in kept)
    monkeypatch.setattr(Seen, "owner", lambda *_: None)
    apart = refreshed(adapted()).factors
    assert owners(apart) == set(apart.layers)
    for name in factors.layers:
        assert torch.equal(factors.inputs(name), apart.inputs(name))


def test_a_layer_without_rows_is_not_known() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    factors = KroneckerFactors(model)
    with factors.observing():
        (model["a"](torch.ones(4, 3)).sum() + model["b"](torch.ones(0, 3)).sum()).backward()
    factors.absorb()
    assert (factors.knows("a"), factors.knows("b")) == (True, False)
    assert set(factors.state()) == {"a.inputs", "a.outputs"}
    with factors.observing():
        model["b"](torch.ones(0, 3))
    with pytest.raises(ValueError, match="no forward pass was watched"):
        factors.absorb()


def test_factors_that_are_no_numbers_are_refused_and_not_kept(refreshed, make_model, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path))
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = torch.inf
    with pytest.raises(LostModelError, match=r"factor of the layer model\.layers\.1\.mlp\.down_proj is not finite"):
        refreshed(model, spec=CurvatureSpec(batch=4, warm_start=2, interval=0))
    assert not [file for file in Path(tmp_path).rglob("*") if file.is_file()]
    factors = KroneckerFactors(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LostModelError, match="the layer 0 is not finite"):
        factors.load_state({"0.inputs": torch.full((3, 3), torch.nan)})
    with pytest.raises(LostModelError, match="not finite"):
        damped(torch.full((2, 2), torch.nan), 0.1)


def watched(model: nn.Module, params: Any, **settings: Any) -> Any:
    """Return a rule after one pass through all layers of ``model``, which are given the same input."""
    rule = OPTIMIZERS.get("kfac")(lr=0.1, **settings).build(params, model)
    x = torch.randn(8, 3)
    with rule.observing():
        sum(layer(x).square().sum() for layer in model.children()).backward()  # type: ignore[union-attr]
    rule.update_curvature()
    return rule


def test_layers_with_frozen_and_free_biases_have_factors_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in "abc"})
    model["a"].bias.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = watched(model, [p for p in model.parameters() if p.requires_grad])
    assert [rule.factors.input_of(name) for name in "abc"] == ["a", "b", "b"]
    rule.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) - {"a.bias"}


def test_a_state_over_other_parameters_is_refused() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    rule = watched(model, model.parameters())
    rule.step()
    saved = rule.state_dict()
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="optimizer has 3 parameters and this run's 4"):
        rule.load_state_dict(saved)


@pytest.mark.parametrize("left_out", ["of the groups", "of the gradients"])
def test_a_bias_that_does_not_move_leaves_its_weight_to(left_out: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer)
    bias = layer.bias.detach().clone()
    rule = watched(model, [layer.weight] if left_out == "of the groups" else model.parameters())
    if left_out == "of the gradients":
        layer.bias.grad = None
    weight = layer.weight.detach().clone()
    rule.step()
    assert torch.equal(layer.bias, bias)
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("size", [torch.inf, torch.nan])
def test_a_gradient_that_is_no_number_is_refused_before_the_average_has_it(size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    rule = watched(model, model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, size)
    with pytest.raises(LostModelError, match="a gradient is no finite number"):
        rule.step()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    rule.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e38])
def test_a_direction_of_no_length_is_no_step(size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    rule = watched(model, model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, size)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rule.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert rule.metrics() == {}
    assert [("skips a step" in str(w.message)) for w in told] == [True] * (not 0 <= size < 1)


def test_what_a_pass_says_nothing_of_is_nothing_in_its_sum() -> None:
    """A layer that one pass of four sees, as an expert may be: ``G`` is a sum over each pass, ``A`` a mean."""
    torch.manual_seed(0)
    layers = {"always": nn.Linear(3, 2), "seldom": nn.Linear(2, 2)}
    factors = KroneckerFactors(nn.ModuleDict(layers))
    eigen = EigenInverse(factors, 0.1)

    def see(*names: str) -> None:
        with factors.observing():
            for name in names:
                layers[name](torch.ones(4, layers[name].in_features)).sum().backward()

    see("always", "seldom")
    factors.absorb()
    g = {name: factors.outputs(name).clone() for name in layers}
    eigen.basis("seldom")  # whose moments begin as K-FAC's own
    moments = eigen.moments["seldom"].clone()
    for n in (2, 3, 4):
        see("always")
        eigen.add("always", torch.ones(2, 4))
        eigen.absorb(1 / n)
        factors.absorb(1 / n)
    assert torch.allclose(factors.outputs("always"), g["always"])
    assert torch.allclose(factors.outputs("seldom"), g["seldom"] / 4)
    assert torch.allclose(factors.inputs("seldom"), torch.ones(3, 3))
    assert torch.allclose(eigen.moments["seldom"], moments / 4)
