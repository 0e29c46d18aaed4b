"""Gradients of objectives: closed forms where weights are constants, finite differences where nothing is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from soul.data.batches import VIEWS, UnlearnDataset, collate_items
from soul.data.templates import ChatTemplate
from soul.forward import Answers
from soul.objectives.schedule import RetainSchedule
from soul.reference import Reference
from soul.registry import OBJECTIVES

N, V = 6, 11
CONSTANT_WEIGHTS = ("wga", "satimp", "ceu")  # of which the gradient is not that of the value


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    return Answers(
        logits_NV=torch.randn(N, V, generator=generator, dtype=torch.float64).mul(2).requires_grad_(),
        hidden_ND=torch.zeros(N, 1),
        targets_N=torch.randint(V, (N,), generator=generator),
        row_N=torch.tensor([0, 0, 1, 1, 1, 2]),
        view_B=torch.tensor([VIEWS.index(v) for v in ("forget", "forget", "retain")]),
        key_B=torch.arange(3),
    )


def gradient(objective, answers):
    objective.forget_term(answers, answers.token_logps(), Reference()).backward()
    return answers.logits_NV.grad


@pytest.mark.parametrize(
    ("name", "settings", "weight"),
    [
        ("wga", {"alpha": 0.7}, lambda p: p**0.7),
        ("wga", {"alpha": 0.0}, torch.ones_like),
        ("satimp", {"beta1": 2.0, "beta2": 0.5}, lambda p: p**2 * (1 - p) ** 0.5),
    ],
)
def test_weighted_ascent(answers, name, settings, weight):
    """``d/dz w log p_y = w (onehot_y - p)``, and nothing through ``w``."""
    p = answers.logits_NV.detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(answers.targets_N, V)
    expected = weight(p.gather(1, answers.targets_N[:, None])) * (onehot - p)
    expected[-1] = 0  # a retain token
    torch.testing.assert_close(gradient(OBJECTIVES.get(name)(**settings), answers), expected)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_ceu_moves_the_answer_down_and_the_others_up_in_proportion(answers, skip):
    """``d/dz H(q, p) = p - q``, with ``q`` the others' share."""
    p = answers.logits_NV.detach().softmax(-1)
    q = p.scatter(1, answers.targets_N[:, None], 0.0)
    expected = p - q / q.sum(-1, keepdim=True)
    for i, place in enumerate([0, 1, 0, 1, 2]):
        expected[i] *= place >= skip
    expected[-1] = 0
    torch.testing.assert_close(gradient(OBJECTIVES.get("ceu")(skip_first=skip), answers), expected)


def test_undial_is_at_rest_on_its_target(answers):
    """Where the model is the struck-down reference, nothing moves."""
    objective = OBJECTIVES.get("undial")(strength=3.0)
    chosen = answers.select("forget")
    strike = 3.0 * torch.nn.functional.one_hot(answers.targets_N[chosen], V)
    there = dataclasses.replace(answers, reference_NV={"forget": answers.logits_NV.detach()[chosen] + strike})
    torch.testing.assert_close(gradient(objective, there), torch.zeros(N, V, dtype=torch.float64))


@pytest.mark.parametrize("compat", ["", "closer-look"])
def test_me_is_at_rest_on_the_uniform_distribution(answers, compat):
    flat = dataclasses.replace(answers, logits_NV=torch.zeros(N, V, dtype=torch.float64, requires_grad=True))
    objective = OBJECTIVES.get("me")(compat=compat)
    assert objective.forget_term(flat, flat.token_logps(), Reference()).item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(gradient(objective, flat), torch.zeros(N, V, dtype=torch.float64))


DIFFERENTIABLE = [(n, "own") for n in OBJECTIVES.names() if n not in CONSTANT_WEIGHTS]
DIFFERENTIABLE += [(n, r) for n in ("ft", "npo", "rmu") for r in ("kl", "hidden")]
OPTIONS = {"rmu": {"steering": 2.0}}


def gpt2(tokenizer, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
        return GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize(("name", "retain"), DIFFERENTIABLE)
def test_finite_differences(name, retain, tokenizer, forget_set, retain_set, refusals):
    """Along a random direction of all weights, in float64 throughout (which Llama's norm is not)."""
    settings = OPTIONS.get(name, {}) | ({} if retain == "own" else {"retain": retain})
    objective = OBJECTIVES.get(name)(**settings)
    forget = [dataclasses.replace(e, wrong_answers=("Nobody can tell.",)) for e in forget_set]
    data = UnlearnDataset(ChatTemplate(tokenizer), forget, retain_set, objective.views, refusals)
    batch = collate_items([data[0, i, i + 1] for i in range(3)], pad_id=tokenizer.pad_token_id)
    reference = objective.ask_reference(gpt2(tokenizer, 0), lambda view: data.rows(view, 1))
    model = gpt2(tokenizer, 1)
    params = list(model.parameters())
    grads = torch.autograd.grad(
        objective(model, batch, reference).loss(), params, allow_unused=True, materialize_grads=True
    )
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    slope = sum(float((g * s).sum()) for g, s in zip(grads, steps, strict=True))
    values, eps = [], 1e-8  # so small that no weight changes its sign, where the L1 norm has a kink
    for side in (1, -2):  # from +eps to -eps
        with torch.no_grad():
            for p, s in zip(params, steps, strict=True):
                p.add_(s, alpha=side * eps)
            values.append(objective(model, batch, reference).loss().item())
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "kind must be one of constant, linear, dual"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"tolerance": -0.1}, "tolerance must be 0 or more"),
        ({"epsilon": -0.1}, "epsilon must be 0 or more"),
        ({"warmup": 1.0}, r"warmup is a share of the steps in \[0, 1\)"),
    ],
)
def test_schedules_reject_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RetainSchedule(**settings)


def test_schedule_of_the_multiplier():
    """``w <- max(0, w + rate (L - epsilon))``, from the reference's loss where no epsilon is given."""
    own = RetainSchedule("dual", rate=2.0, tolerance=0.5, warmup=0.25)
    assert own.learn({}, 1.0, {"retain": 3.0, "reference": 1.0}, 0.2) == {}
    state = own.learn({}, 1.0, {"retain": 2.0, "reference": 1.0}, 0.25)
    assert state == {"multiplier": 1.0 + 2.0 * (2.0 - 1.5)}
    assert own.weight(1.0, 0.5, state) == 2.0
    assert own.learn(state, 1.0, {"retain": 0.1, "reference": 1.0}, 0.5) == {"multiplier": 0.0}
    assert own.weight(1.0, 0.0, {}) == 1.0


def test_l1_penalty_decays_to_nothing():
    objective = OBJECTIVES.get("l1_sparse")(gamma=0.4)
    assert [objective.at(t, {}).gamma for t in (0.0, 0.25, 1.0)] == [0.4, 0.30000000000000004, 0.0]
    assert OBJECTIVES.get("l1_sparse")(gamma=0.4, decay="none").at(0.9, {}).gamma == 0.4
