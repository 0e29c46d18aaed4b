"""What every registered optimizer keeps, what it keeps it for, and what it will not keep at all."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from optimizer_tasks import LR, Classifier, assert_same, build, differ, make, names
from torch import nn

from soul.optim.base import UpdateRule


def tensors_in(tree: Any) -> dict[str, torch.Tensor]:
    """Return all tensors of a state dict by their path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {f"{key}/{path}": value for key, part in items for path, value in tensors_in(part).items()}


# State


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_survives_a_checkpoint(name: str, dtype: torch.dtype) -> None:
    """Written, read without pickle's powers and loaded, the state is the same bits; the steps that follow too."""
    problem = Classifier(dtype)
    spec, rule = build(name, problem)
    problem.run(spec, rule, 4)
    file = io.BytesIO()
    torch.save({"rule": rule.state_dict(), "model": problem.model.state_dict()}, file)
    saved = tensors_in(copy.deepcopy(rule.state_dict()))
    problem.run(spec, rule, 5, start=4)
    assert any(not torch.equal(value, saved[path]) for path, value in tensors_in(rule.state_dict()).items())

    again = Classifier(dtype)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    again.model.load_state_dict(read["model"])
    other = dataclasses.replace(spec, lr=0.5).build(again.model.parameters(), again.model)
    other.load_state_dict(read["rule"])
    loaded = tensors_in(other.state_dict())
    assert loaded.keys() == saved.keys()
    for path, value in loaded.items():
        assert value.dtype == saved[path].dtype
        assert torch.equal(value, saved[path])
    again.run(spec, other, 5, start=4)
    assert_same(again.weights(), problem.weights())


@pytest.mark.parametrize("name", names("copies"))
def test_can_be_copied_and_pickled(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    problem.run(spec, rule, 3)

    def step(rule: UpdateRule) -> list[torch.Tensor]:
        params = [p for group in rule.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.ones_like(p)
        rule.step()
        return [p.detach().clone() for p in params]

    before = problem.weights()
    twins = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    for twin in twins:
        assert type(twin) is type(rule)
        assert twin.metrics() == {}
    moved = [step(twin) for twin in twins]
    assert_same(problem.weights(), before)
    expected = step(rule)
    for result in moved:
        assert_same(result, expected)


# Parameters and their groups


@pytest.mark.parametrize("name", names())
def test_parameters_without_gradient_stay(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem, weight_decay=0.1)
    problem.run(spec, rule, 1)
    before = problem.weights()
    problem.bring_curvature(spec, rule, 1)
    problem.loss().backward()
    for p in list(problem.model.parameters())[2:]:
        p.grad = None
    rule.step()
    assert differ(problem.weights()[:2], before[:2])
    assert_same(problem.weights()[2:], before[2:])


@pytest.mark.parametrize("name", names())
def test_frozen_parameters_stay(name: str) -> None:
    problem = Classifier()
    for p in problem.model[0].parameters():  # pyright: ignore[reportIndexIssue]
        p.requires_grad_(False)
    before = problem.weights()
    spec, rule = build(name, problem, weight_decay=0.1)
    problem.run(spec, rule, 3)
    assert_same(problem.weights()[:2], before[:2])
    assert differ(problem.weights()[2:], before[2:])


class Triplets(Classifier):
    """Three layers with the same weights and the same input: what differs between them is their parameter group."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(5, 3)
        self.model = nn.ModuleList([first, copy.deepcopy(first), copy.deepcopy(first)])

    def outputs(self) -> torch.Tensor:
        assert isinstance(self.model, nn.ModuleList)
        return sum(layer(self.x_BTD)[self.mask_BT] for layer in self.model)  # pyright: ignore[reportReturnType]


def moves(problem: Classifier, groups: list[dict[str, Any]], name: str) -> list[torch.Tensor]:
    """Return what one step does to the weight of each layer."""
    layers = list(problem.model)  # pyright: ignore[reportArgumentType]
    before = [layer.weight.detach().clone() for layer in layers]
    spec = make(name, lr=0.01)
    rule = spec.build(
        [{"params": list(x.parameters()), **g} for x, g in zip(layers, groups, strict=True)], problem.model
    )
    problem.run(spec, rule, 1)
    return [layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)]


@pytest.mark.parametrize("name", names("group_lr"))
def test_groups_keep_their_learning_rate(name: str) -> None:
    one, two, again = moves(Triplets(), [{"lr": 0.01}, {"lr": 0.02}, {}], name)
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-7)
    assert torch.equal(one, again)


@pytest.mark.parametrize("name", names())
def test_groups_keep_their_weight_decay(name: str) -> None:
    problem = Triplets()
    weight = problem.model[0].weight.detach().clone()  # pyright: ignore[reportIndexIssue]
    plain, decayed, again = moves(problem, [{}, {"weight_decay": 0.5}, {"weight_decay": 0.0}], name)
    assert torch.equal(plain, again)
    if name != "external":  # what weight decay means is the class's own business
        torch.testing.assert_close(decayed, plain - 0.01 * 0.5 * weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", names())
def test_groups_can_be_added(name: str) -> None:
    problem = Classifier()
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))  # pyright: ignore[reportIndexIssue]
    spec = make(name, lr=LR)
    rule = spec.build(first, problem.model)
    problem.run(spec, rule, 1)
    before = problem.weights()
    assert_same([p.detach() for p in second], Classifier().weights()[2:])
    rule.add_param_group({"params": second})
    problem.run(spec, rule, 1, start=1)
    assert differ(problem.weights()[:2], before[:2])
    assert differ(problem.weights()[2:], before[2:])


@pytest.mark.parametrize("name", names())
def test_accepts_iterators_and_named_parameters(name: str) -> None:
    results = []
    for kind in ("list", "iterator", "named", "groups"):
        problem = Classifier()
        model, spec = problem.model, make(name, lr=LR)
        params: Any = {
            "list": list(model.parameters()),
            "iterator": model.parameters(),
            "named": model.named_parameters(),
            "groups": iter([{"params": model.parameters()}]),
        }[kind]
        rule = spec.build(params, model)
        problem.run(spec, rule, 2)
        results.append(problem.weights())
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("name", names())
def test_strided_parameters_step_like_contiguous_ones(name: str) -> None:
    results = []
    for strided in (False, True):
        problem = Classifier()
        layer: Any = problem.model[0]  # pyright: ignore[reportIndexIssue]
        if strided:
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        assert layer.weight.is_contiguous() != strided
        spec, rule = build(name, problem, weight_decay=0.1)
        problem.run(spec, rule, 3)
        results.append(problem.weights())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", names("loose_parameters"))
def test_scalars_and_empty_parameters_work(name: str) -> None:
    spec = make(name)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((), (1,), (0,), (2, 0), (2, 1, 2))]
    rule = spec.build(params)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.update_curvature()
    rule.step()
    assert all(bool((p < 1).all()) for p in params)


# What it refuses


@pytest.mark.parametrize("name", names())
def test_sparse_gradients_are_refused(name: str) -> None:
    problem = Classifier()
    spec, rule = build(name, problem)
    problem.run(spec, rule, 1)
    problem.bring_curvature(spec, rule, 1)
    problem.loss().backward()
    weight = next(iter(problem.model.parameters()))
    weight.grad = torch.ones_like(weight).to_sparse()
    before = problem.weights()
    with pytest.raises(ValueError, match="dense gradients"):
        rule.step()
    assert_same(problem.weights(), before)


@pytest.mark.parametrize("name", names("loose_parameters"))
def test_complex_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="real floating-point"):
        make(name).build([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("name", names())
def test_differentiating_through_a_step_is_refused(name: str) -> None:
    problem = Classifier()
    with pytest.raises(ValueError, match="differentiable"):
        make(name).build([{"params": list(problem.model.parameters()), "differentiable": True}], problem.model)
