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
from soul.objectives.schedule import RetainSchedule
from soul.registry import OBJECTIVES

NAMES = OBJECTIVES.names()
WITHOUT_FORGET = ("ft", "l1_sparse")
pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def setting(name, tokenizer, make_model, forget_set, retain_set, refusals):
    """Model, batch and reference as the trainer would hand them over."""

    def build(objective):
        forget = [dataclasses.replace(e, wrong_answers=("Nobody can tell.", f"Not {e.answer}")) for e in forget_set]
        data = UnlearnDataset(ChatTemplate(tokenizer), forget, retain_set, objective.views, refusals)
        model = make_model()
        objective.prepare(model)
        reference = objective.ask_reference(model, lambda view: data.rows(view, 1))
        return (
            model,
            collate_items([data[0, a, p] for a, p in data.pairing.epoch(0)[:4]], pad_id=tokenizer.pad_token_id),
            reference,
        )

    return build


def make(name, retain="nll", **settings):
    """Return the objective; a multiplier needs a retain term that it can hold against something."""
    if OBJECTIVES.get(name)().retain_schedule.kind == "dual" and retain != "nll":
        settings["retain_schedule"] = RetainSchedule()
    return OBJECTIVES.get(name)(retain=retain, **settings)


@pytest.fixture(params=["nll", "kl", "hidden", "none"])
def objective(name, request):
    if name in WITHOUT_FORGET and request.param == "none":
        pytest.skip(f"{name} has nothing but its retain term")
    return make(name, request.param)


def test_runs_forward_and_backward(objective, setting):
    model, batch, reference = setting(objective)
    out = objective(model, batch, reference)
    assert out.terms
    loss = out.loss()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = [p.grad for p in trained.values()]
    reached = [g is not None and bool(torch.isfinite(g).all()) for g in grads]
    if objective.forget_views or objective.retain != "hidden":  # hidden states alone say nothing of what follows them
        assert all(reached), [key for key, ok in zip(trained, reached, strict=True) if not ok]
    if objective.forget_views or objective.retain == "nll":  # a distance to itself is at its minimum
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
        objective = make(name, retain_weight=weight)
        losses.append(objective(*setting(objective)).loss().item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] != losses[0]


def test_forget_weight_scales_the_forget_term(name, setting):
    terms = [make(name, forget_weight=w)(*setting(make(name))).terms.get("forget") for w in (1.0, 3.0)]
    if name in WITHOUT_FORGET:
        assert terms == [None, None]
    else:
        assert [term.weight for term in terms] == [1.0, 3.0]
        assert torch.equal(terms[0].total, terms[1].total)


def test_has_no_state(objective):
    """What it is at a moment follows from settings, progress and what steps taught."""
    assert objective.at(0.0, {}) == objective
    assert objective.at(0.5, objective.learn({}, {"retain": 2.0, "reference": 1.0}, 0.5)).name == objective.name
    if objective.retain != "none":
        moving = dataclasses.replace(objective, retain_schedule=RetainSchedule("linear", end=5.0), retain_weight=1.0)
        assert [moving.at(t, {}).retain_weight for t in (0.0, 0.5, 1.0)] == [1.0, 3.0, 5.0]
        assert moving.retain_weight == 1.0


def test_says_what_it_looks_at(objective):
    assert isinstance(objective, Objective)
    assert objective.views
    assert set(objective.views) <= set(VIEWS)
    needs = {*objective.needs_logps, *objective.needs_distributions, *objective.needs_states}
    assert needs <= set(objective.views)


def test_defaults_are_valid(name):
    assert OBJECTIVES.get(name)().name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain_weight": -0.1}, "retain_weight must be 0 or more"),
        ({"retain": "l2"}, "objective.retain must be one of nll, kl, hidden, none, not 'l2'"),
        ({"retain": "none", "retain_weight": 2.0}, "retain_weight 2 weighs nothing, since retain is none"),
        ({"forget_weight": float("nan")}, "forget_weight must be 0 or more"),
        ({"compat": "nobody"}, "compat must be empty or one of"),
        ({"retain": "kl", "retain_schedule": RetainSchedule("dual")}, "needs retain_schedule.epsilon"),
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
