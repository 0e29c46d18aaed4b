"""What every registered objective must do, whatever its formula."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re

import pytest
import torch

from soul.data.batches import VIEWS, UnlearnDataset, collate_items
from soul.data.templates import ChatTemplate
from soul.objectives.base import Objective
from soul.reference import build_reference
from soul.registry import OBJECTIVES

NAMES = OBJECTIVES.names()
pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def setting(name, tokenizer, make_model, forget_set, retain_set, refusals):
    """Model, batch and reference as the trainer would hand them over."""

    def build(objective):
        data = UnlearnDataset(ChatTemplate(tokenizer), forget_set, retain_set, objective.views, refusals)
        model = make_model()
        reference = build_reference(
            model,
            logps=[r for v in objective.needs_logps for r in data.rows(v, 1)],
            distributions=[r for v in objective.needs_distributions for r in data.rows(v, 1)],
        )
        return model, collate_items([data[0, i, i + 1] for i in range(4)], pad_id=tokenizer.pad_token_id), reference

    return build


@pytest.fixture(params=["nll", "kl", "none"])
def objective(name, request):
    if name == "ft" and request.param == "none":
        pytest.skip("ft has nothing but its retain term")
    return OBJECTIVES.get(name)(retain=request.param)


def test_runs_forward_and_backward(objective, setting):
    model, batch, reference = setting(objective)
    out = objective(model, batch, reference)
    assert out.terms
    loss = out.loss()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    if objective.views != ("retain",) or objective.retain != "kl":  # a KL to itself is at its minimum
        assert any(g is not None and g.abs().max() > 0 for g in grads)


def test_counts_are_those_of_the_terms(objective, setting):
    model, batch, reference = setting(objective)
    terms = objective(model, batch, reference).terms
    assert objective.counts(batch) == {name: term.count for name, term in terms.items()}
    assert all(count > 0 for count in objective.counts(batch).values())


def test_leaves_the_model_and_the_batch_alone(objective, setting):
    model, batch, reference = setting(objective)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    copy = {k: v.clone() for k, v in batch.items()}
    first = objective(model, batch, reference).loss()
    assert torch.equal(objective(model, batch, reference).loss(), first)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, copy[k]) for k, v in batch.items())
    assert not model.lm_head._forward_pre_hooks


def test_retain_weight_scales_the_retain_term(name, setting):
    losses = []
    for weight in (0.0, 1.0, 3.0):
        objective = OBJECTIVES.get(name)(retain="nll", retain_weight=weight)
        losses.append(objective(*setting(objective)).loss().item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] != losses[0]


def test_says_what_it_looks_at(objective):
    assert isinstance(objective, Objective)
    assert objective.views
    assert set(objective.views) <= set(VIEWS)
    assert set(objective.needs_logps) | set(objective.needs_distributions) <= set(objective.views)


def test_defaults_are_valid(name):
    assert OBJECTIVES.get(name)().name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain_weight": -0.1}, "retain_weight must be 0 or more"),
        ({"retain": "l2"}, "retain must be nll, kl or none"),
    ],
)
def test_rejects_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.get(name)(**settings)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_rejects_bad_beta(name, beta):
    cls = OBJECTIVES.get(name)
    if "beta" not in {f.name for f in dataclasses.fields(cls)}:
        pytest.skip("has no beta")
    with pytest.raises(ValueError, match="beta must be above 0"):
        cls(beta=beta)


def test_is_a_frozen_value(objective):
    assert dataclasses.replace(objective) == objective
    assert pickle.loads(pickle.dumps(objective)) == objective
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.retain_weight = 2.0


def test_says_what_it_is(name):
    cls = OBJECTIVES.get(name)
    text = inspect.cleandoc(cls.__dict__["__doc__"])
    assert not text.startswith(f"{cls.__name__}("), "the docstring that dataclasses invent"
    assert re.search(r"\b\d{4}\.\d{5}\b", text) or "``L = " in text, "a paper, or the formula"
