"""Layers that take turns with their curvature, against the same run by hand in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from soul.curvature.estimators import ggn_cotangent
from soul.optim.ekfac import EKFACSpec
from soul.optim.kfac import KFACSpec
from soul.optim.whiten import WhitenSpec

SPECS = {"whiten": WhitenSpec, "kfac": KFACSpec, "ekfac": EKFACSpec}
SIZES = ((5, 4), (4, 6), (6, 3), (3, 2))
LR, MOMENTUM = 0.1, 0.8


def model_of() -> Any:  # a sequence of linear layers
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*size, bias=i == 1) for i, size in enumerate(SIZES))).double()


def rule_of(name: str, model: Any, **settings: int) -> Any:
    rule = SPECS[name](lr=LR, momentum=MOMENTUM, **settings).build(model.parameters(), model)
    x = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with rule.observing():
        logits = model(x)
        weights = torch.full((30,), 1 / 30, dtype=x.dtype)
        logits.backward(gradient=ggn_cotangent(logits.detach(), weights, torch.Generator().manual_seed(2)))
    rule.update_curvature()
    model.zero_grad()
    return rule


def gradients(model: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


@pytest.mark.parametrize("name", SPECS)
def test_turns_are_those_of_a_run_by_hand(name: str) -> None:
    model, turns = model_of(), 3
    rule = rule_of(name, model, turns=turns)
    weights = {i: layer.weight.detach().clone() for i, layer in enumerate(model)}
    biases = {1: model[1].bias.detach().clone()}
    averages: dict[int, torch.Tensor] = {}
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the debiased direction, and its product with the average
    for step in range(1, 8):
        gradients(model, step)
        for i, layer in enumerate(model):
            g = layer.weight.grad if i != 1 else torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
            averages[i] = MOMENTUM * averages.get(i, torch.zeros_like(g)) + (1 - MOMENTUM) * g
            if step % turns == i % turns or step == 1:
                m = averages[i] / (1 - MOMENTUM**step)
                u = rule.preconditioner(str(i), m)
                found[i] = u, (u * m).sum()
        length = torch.stack([dot for _, dot in found.values()]).sum().sqrt()
        for i, (u, _) in found.items():
            weights[i] -= LR / length * (u if i != 1 else u[:, :-1])
            if i == 1:
                biases[1] -= LR / length * u[:, -1]
        rule.step()
        assert rule.metrics()["step_length"] == pytest.approx(LR)
    for i, layer in enumerate(model):
        torch.testing.assert_close(layer.weight.detach(), weights[i], rtol=0, atol=1e-12)
    torch.testing.assert_close(model[1].bias.detach(), biases[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_run_goes_on_along_what_layers_had_found(name: str) -> None:
    model = model_of()
    rule = rule_of(name, model, turns=3)
    for step in range(1, 6):
        gradients(model, step)
        rule.step()
    other = copy.deepcopy(model)
    resumed = rule_of(name, other, turns=3)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    for step in range(6, 10):
        for either, optimizer in ((model, rule), (other, resumed)):
            gradients(either, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_turns_take_less_arithmetic_and_one_more_number_a_weight(name: str) -> None:
    model = model_of()
    one, three = (SPECS[name](turns=n).cost(list(model.parameters()), model) for n in (1, 3))
    assert three.products == one.products // 3
    weights = sum(o * i + o * (n == 1) for n, (i, o) in enumerate(SIZES))
    assert three.state == one.state + 4 * weights
    assert three.step == one.step - 4 * weights  # the moves are those that are kept
    with pytest.raises(ValueError, match=r"every \(2\) or turns \(3\): leave one of them at 1"):
        SPECS[name](turns=3, every=2)
    with pytest.raises(ValueError, match="turns must be 1 or more, not 0"):
        SPECS[name](turns=0)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_without_a_gradient_in_its_turn_divides_at_the_next(name: str) -> None:
    """As an expert does that no token was sent to: nothing moves along what is older than the turns."""
    model = model_of()
    rule = rule_of(name, model, turns=3)
    divided: list[tuple[int, str]] = []
    apply = rule.preconditioner.__class__.__call__

    def noted(self, layer: str, matrix: torch.Tensor) -> torch.Tensor:
        divided.append((step, layer))
        return apply(self, layer, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule.preconditioner.__class__, "__call__", noted)
        for step in range(1, 9):
            gradients(model, step)
            if step in (1, 2, 5, 8):  # the turns of the third layer, and the first step
                model[2].weight.grad = None
            rule.step()
    assert [s for s, layer in divided if layer == "2"] == [3, 6]
    assert [s for s, layer in divided if layer == "0"] == [1, 3, 6]


@pytest.mark.parametrize("name", ["kfac", "whiten"])
def test_new_curvature_ends_what_was_found_with_the_old(name: str) -> None:
    model = model_of()
    rule = rule_of(name, model, turns=3)
    for step in (1, 2):
        gradients(model, step)
        rule.step()
    old = [rule.state[layer.weight]["direction"] for layer in model]
    with rule.observing():
        model(torch.randn(30, 5, dtype=torch.float64)).sum().backward()
    rule.update_curvature()
    gradients(model, 3)
    rule.step()
    new = [rule.state[layer.weight]["direction"] for layer in model]
    assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_a_state_of_before_there_were_turns_is_taken_over() -> None:
    model = model_of()
    rule = rule_of("kfac", model)
    gradients(model, 1)
    rule.step()
    saved = rule.state_dict()
    for group in saved["param_groups"]:
        del group["turns"]
    resumed = rule_of("kfac", model)
    resumed.load_state_dict(saved)
    resumed.step()
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="optimizer has 4 parameters and this run's 5"):
        resumed.load_state_dict(saved)


def test_weights_of_16_bits_go_on_as_exactly() -> None:
    model = model_of().bfloat16()
    model.double()  # rounded, so that the two begin alike
    small = copy.deepcopy(model).bfloat16()
    rule = KFACSpec(lr=LR, turns=3).build(small.parameters(), small)
    with rule.observing():
        small(torch.randn(30, 5).bfloat16()).sum().backward()
    rule.update_curvature()
    for step in (1, 2):
        for p in small.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        rule.step()
    kept = rule.state[small[0].weight]
    other = copy.deepcopy(small)
    resumed = KFACSpec(lr=LR, turns=3).build(other.parameters(), other)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    again = resumed.state[other[0].weight]
    assert kept["direction"].dtype == again["direction"].dtype == torch.float32
    assert torch.equal(kept["direction"], again["direction"])
    assert torch.equal(kept["dot"], again["dot"])
