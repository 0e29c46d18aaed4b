"""What Kronecker rules make of refreshes over time, and what they leave to the next run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from soul.curvature.inverses import EigenInverse
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import ChatTemplate
from soul.optim.ekfac import EKFACSpec
from soul.optim.kronecker import KroneckerRule
from soul.registry import OPTIMIZERS


@pytest.fixture
def passes(tokenizer: Any, retain_set: Any) -> Callable[..., CurvaturePasses]:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set)]
    return lambda spec: CurvaturePasses(spec, rows)


@pytest.mark.parametrize(("batch", "micro_batches"), [(10, 1), (5, 2), (2, 5)])
def test_moments_are_those_of_a_whole_refresh(passes: Any, make_model: Any, batch: int, micro_batches: int) -> None:
    """A rotation keeps the sum of squares, so the moments of a layer sum to the diagonal estimate of its weight."""
    spec = CurvatureSpec(batch=batch, micro_batches=micro_batches, interval=1, cache=False)
    model = make_model()
    rule = EKFACSpec(curvature=spec, decay=0.0).build(model.parameters(), model)
    source = passes(spec)
    source.refresh(model, rule, 0)
    source.refresh(model, rule, 1)
    diagonal = source.estimate(model, rule, source.plan(1))  # the same picks and noise once more
    assert diagonal is not None
    for name, layer in rule.factors.layers.items():
        assert isinstance(rule.preconditioner, EigenInverse)
        total = float(rule.preconditioner.moments[name].sum())
        assert total == pytest.approx(float(diagonal[layer.weight].sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "whiten"])
def test_a_warm_start_weighs_as_many_refreshes_as_it_is_worth(passes: Any, make_model: Any, name: str) -> None:
    spec = CurvatureSpec(batch=4, warm_start=9, micro_batches=2, interval=1, cache=False)
    model = make_model()
    source = passes(spec)

    def known(decay: float) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what a rule knows after the warm start and after one more refresh."""
        rule = OPTIMIZERS.get(name)(curvature=spec, decay=decay).build(model.parameters(), model)
        for step in range(2):
            source.refresh(model, rule, step)
            for layer in rule.factors.layers if name == "ekfac" else ():
                rule.preconditioner.basis(layer)
            yield {key: value.clone() for key, value in rule.curvature_state().items() if value.is_floating_point()}

    (warm, both), (_, new) = known(0.9), known(0.0)
    share = (1 - 0.9) / (1 - 0.9**5)  # the fifth, after a warm start worth four
    for key, value in both.items():
        torch.testing.assert_close(value, warm[key].lerp(new[key], share), rtol=1e-4, atol=1e-7)
    assert ("moments" in {key.rpartition(".")[2] for key in both}) == (name == "ekfac")


def test_states_of_older_runs_load(passes: Any, make_model: Any) -> None:
    """They kept K-FAC's moments beside the corrected ones, and the number of corrections."""
    model = make_model()
    rule = EKFACSpec().build(model.parameters(), model)
    passes(CurvatureSpec(interval=1, cache=False)).refresh(model, rule, 0)
    inverse = rule.preconditioner
    assert isinstance(inverse, EigenInverse)
    for name in rule.factors.layers:
        inverse.basis(name)
    state = inverse.state()
    old = {key.replace(".moments", ".kfac"): value for key, value in state.items()}
    inverse.load_state(old)
    assert inverse.state().keys() == state.keys()
    corrected = {key: value + 1 for key, value in state.items() if key.endswith(".moments")}
    counts = {f"{name}.corrections": torch.tensor(2) for name in rule.factors.layers}
    inverse.load_state(old | corrected | counts)
    assert all(torch.equal(inverse.state()[key], value) for key, value in corrected.items())


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_damping_that_waits_for_a_refresh_waits_after_a_resume_too(name: str) -> None:
    def step(layer: nn.Linear, rule: KroneckerRule, seed: int) -> None:
        layer.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        rule.step()

    def begin() -> tuple[nn.Linear, KroneckerRule]:
        layer = nn.Linear(5, 4, bias=False)
        nn.init.ones_(layer.weight)
        model = nn.Sequential(layer)
        return layer, OPTIMIZERS.get(name)(lr=0.1).build(model.parameters(), model)

    layer, rule = begin()
    with rule.observing():
        layer(torch.randn(9, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    rule.update_curvature()
    step(layer, rule, 1)
    rule.feedback(1.0, 10.0)  # far more than predicted
    assert rule.metrics()["damping"] == 0.1
    other, resumed = begin()
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    step(layer, rule, 2)
    step(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    assert resumed.metrics() == rule.metrics()
    state = copy.deepcopy(rule.state_dict())
    del state["kronecker"]["damping_in_use"]  # an older one
    resumed.load_state_dict(state)
    assert resumed.preconditioner.damping == pytest.approx(0.15)
    for either in (rule, resumed):
        with either.observing():
            (layer if either is rule else other)(torch.ones(2, 5)).square().sum().backward()
        either.update_curvature()
        assert either.preconditioner.damping == pytest.approx(0.15)
