"""Influence unlearning on a small model that has learned both sets by heart."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from soul import config
from soul.curvature.ihvp import INVERSES, InverseSpec
from soul.curvature.products import loss_gradient, mean_nll, micro_batches, trainable
from soul.data.batches import UnlearnDataset, collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.methods import influence as module
from soul.methods.base import json_lines
from soul.methods.influence import Influence
from soul.registry import METHODS

BUDGET = 0.1


@pytest.fixture(scope="module")
def data(tokenizer, forget_set, retain_set):
    return UnlearnDataset(ChatTemplate(tokenizer), forget_set, retain_set, Influence.views, seed=3)


@pytest.fixture(scope="module")
def taught(make_model, data):
    """The weights of a model that says every answer nearly surely."""
    model = make_model(0)
    rows = micro_batches(data.encoded["forget"] + data.encoded["retain"], data.template.pad)
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        gradient = loss_gradient(model, rows)[1]
        for name, p in model.named_parameters():
            p.grad = gradient[name]
        adam.step()
    assert mean_nll(model, rows) < 0.05
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def make(make_model, taught):
    def again() -> Any:
        model = make_model(0)
        model.load_state_dict(taught)
        return model

    return again


def forget_nll(model: Any, data: UnlearnDataset) -> float:
    return mean_nll(model, micro_batches(data.encoded["forget"], data.template.pad))


def independent_kl(before: Any, after: Any, rows: Any) -> float:
    """Return ``KL(p_before || p_after)`` over the answer tokens of rows, one row at a time, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collate_rows([row])
            p, q = (forward_answers(m, batch).logits_NV.double().log_softmax(-1) for m in (before, after))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


def test_forgets_up_to_the_target_within_the_budget(make, data):
    model, records = make(), []
    method = Influence(inverse="kfac", steps=6, max_kl=BUDGET, target_nll=0.9)
    assert method(model, data, log=records.append) is model
    assert 0.9 <= forget_nll(model, data) <= 0.99
    probe, _ = method.split_retain(data)
    kl = independent_kl(make(), model, probe)
    assert kl <= BUDGET
    assert records[-1]["retain_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert records[-1]["forget_nll"] == pytest.approx(forget_nll(model, data), rel=1e-5)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert all(r["seconds"] > 0 and r["retain_kl"] <= BUDGET * (r["step"] / 6) ** 2 for r in records)
    for earlier, later in itertools.pairwise(records):
        assert earlier["forget_nll"] == pytest.approx(later["forget_nll_before"], rel=1e-5)


@pytest.mark.parametrize("inverse", sorted(INVERSES))
def test_iterating_forgets_more_than_one_shot_at_the_same_price(make, data, inverse):
    """Neither has a target: both spend the budget, and the iterated one takes gradients anew on the way."""
    reached, solver = {}, InverseSpec(draws=2, rank=8, iterations=20)
    for steps in (1, 4):
        method = Influence(inverse=inverse, steps=steps, target_nll=0.0, max_kl=BUDGET, solver=solver)
        model, records = make(), []
        method(model, data, log=records.append)
        assert len(records) == steps
        assert 0.8 * BUDGET < records[-1]["retain_kl"] <= BUDGET
        reached[steps] = forget_nll(model, data)
    assert forget_nll(make(), data) + 0.1 < reached[1] < reached[4]


def test_curvature_forgets_more_than_plain_ascent_at_the_same_price(make, data):
    reached = {}
    for inverse in ("identity", "diagonal", "kfac", "ekfac"):
        model = make()
        Influence(inverse=inverse, steps=1, target_nll=0.0, max_kl=BUDGET)(model, data)
        reached[inverse] = forget_nll(model, data)
    assert reached["identity"] < min(reached["diagonal"], reached["kfac"], reached["ekfac"])


@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_same_seed_same_bytes(make, data, tokenizer, forget_set, retain_set, refresh):
    other = UnlearnDataset(data.template, forget_set, retain_set, Influence.views, seed=4)
    results = []
    for i, source in enumerate((data, data, other)):
        torch.manual_seed(i)  # what went on before must not matter
        model = make()
        Influence(steps=3, refresh=refresh, max_kl=BUDGET)(model, source)
        results.append(model.state_dict())
    first, again, different = results
    assert all(torch.equal(again[n], x) for n, x in first.items())
    assert any(not torch.equal(different[n], x) for n, x in first.items())


def test_curvature_is_estimated_as_often_as_asked(make, data, monkeypatch):
    built = []
    original = module.make_inverse
    monkeypatch.setattr(module, "make_inverse", lambda *args: (built.append(args[2]), original(*args))[1])
    counts = []
    for refresh in (0, 1, 2, 3):
        built.clear()
        Influence(inverse="diagonal", steps=4, refresh=refresh, target_nll=0.0, max_kl=BUDGET)(make(), data)
        counts.append(len(built))
    assert counts == [1, 4, 2, 2]


def test_only_linear_layers_move_unless_all_may(make, data):
    start = make().state_dict()
    for parameters in ("linear", "all"):
        model = make()
        model.train()
        Influence(inverse="diagonal", steps=1, max_kl=BUDGET, parameters=parameters)(model, data)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        linear = {n for n in start if "proj" in n}
        assert moved == (linear if parameters == "linear" else set(dict(model.named_parameters())))
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_layers_wider_than_asked_for_stay_where_factors_are_needed(make, data, caplog):
    start = make().state_dict()
    attention = {n for n in start if "self_attn" in n and "proj" in n}
    wide_outputs = {n for n in start if "gate_proj" in n or "up_proj" in n}
    sides = {"kfac": attention, "whiten": attention | wide_outputs, "diagonal": {n for n in start if "proj" in n}}
    for inverse, moves in sides.items():
        caplog.clear()
        model = make()
        solver = InverseSpec(max_dim=32, draws=1)
        Influence(inverse=inverse, solver=solver, steps=1, max_kl=BUDGET)(model, data)
        assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == moves
        assert ("are wider than solver.max_dim (32)" in caplog.text) == (inverse != "diagonal")
    for parameters in ("linear", "all"):
        with pytest.raises(ValueError, match=r"all 14 linear layers are wider than solver.max_dim \(8\).* raise it"):
            Influence(inverse="whiten", solver=InverseSpec(max_dim=8), parameters=parameters).check(make())


def test_an_adapter_moves_and_nothing_else_does(make, data):
    from peft import LoraConfig, get_peft_model

    base = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    learned = set(trainable(model))
    records: list[Any] = []
    Influence(inverse="ekfac", steps=3, max_kl=BUDGET, target_nll=0.0)(model, data, log=records.append)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= learned
    assert {"lora_A", "lora_B"} == {n.split(".")[-3] for n in moved}
    assert set(trainable(model)) == learned
    assert records[-1]["retain_kl"] <= BUDGET
    assert records[-1]["forget_nll"] > 0.3


def test_an_error_leaves_the_last_whole_step(make, data, monkeypatch):
    """The second step fails in the middle of its search: the weights are those after the first, not a trial's."""
    one = make()
    Influence(inverse="diagonal", steps=1, max_kl=BUDGET / 4, target_nll=0.0)(one, data)  # the first of two

    calls = 0
    original = module._Run.retain_kl

    def failing(self):
        nonlocal calls
        calls += self.kl > 0
        if calls == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(module._Run, "retain_kl", failing)
    model, records = make(), []
    with pytest.raises(KeyboardInterrupt):
        Influence(inverse="diagonal", steps=2, max_kl=BUDGET, target_nll=0.0)(model, data, log=records.append)
    assert len(records) == 1
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in one.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_nll": 1e-6},
            r"NLL is 0\.\d+ nats a token before any step, and method\.target_nll, .* is 1e-06: set it",
        ),
        (
            {"alpha": 1e6, "trials": 1, "inverse": "identity", "target_nll": 0.0, "max_kl": BUDGET},
            rf"the shortest of 1 tried, 1e\+06, .* leaves the first of 4 steps {BUDGET / 16:.2g}",
        ),
    ],
)
def test_a_run_without_a_step_says_so(make, data, settings, said):
    model = make()
    records: list[Any] = []
    with pytest.raises(ValueError, match=said):
        Influence(**settings)(model, data, log=records.append)
    assert records == []
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in make().state_dict().items())


def test_a_given_length_is_taken_or_shortened(make, data):
    records: list[Any] = []
    Influence(inverse="identity", steps=1, alpha=0.5, max_kl=10.0, target_nll=0.0)(make(), data, log=records.append)
    assert records[0]["alpha"] == 0.5
    assert records[0]["trials"] == 1
    Influence(inverse="identity", steps=1, alpha=1e6, max_kl=BUDGET, target_nll=0.0)(make(), data, log=records.append)
    assert records[1]["alpha"] < 1e6
    assert records[1]["retain_kl"] <= BUDGET


def test_the_step_is_the_newton_ascent_step(make, data):
    """With plain ascent and a given length: ``theta + alpha (grad L_forget - weight grad L_retain)``."""
    model, start = make(), make()
    method = Influence(
        inverse="identity", steps=1, alpha=0.25, max_kl=100.0, target_nll=0.0, retain_weight=0.5, parameters="all"
    )
    method(model, data)
    forget = micro_batches(data.encoded["forget"], data.template.pad)
    retain = micro_batches(method.split_retain(data)[1], data.template.pad)  # fewer than curvature_rows: all of them
    up, down = loss_gradient(start, forget)[1], loss_gradient(start, retain)[1]
    for name, p in start.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p + 0.25 * (up[name] - 0.5 * down[name]))


def test_the_probe_is_held_out(data):
    probe, pool = Influence().split_retain(data)
    assert len(probe) == len(data.encoded["retain"]) // 3
    assert not {row.key for row in probe} & {row.key for row in pool}
    alone = copy.copy(data)
    alone.encoded = {**data.encoded, "retain": data.encoded["retain"][:1]}
    probe, pool = Influence().split_retain(alone)
    assert probe == pool


def test_settings_survive_a_recipe(tmp_path):
    method = config.component(METHODS, {"name": "influence", "inverse": "cg", "solver": {"tolerance": "1e-4"}}, "")
    assert method.solver.tolerance == 1e-4
    assert config.component(METHODS, config.plain(method), "") == method
    assert "influence" in METHODS.names()
    assert METHODS.summary("influence").startswith("Influence unlearning (arXiv 2404.18239")


def test_the_log_is_json_lines(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("what a killed run left\n")
    log = json_lines(file)
    assert file.read_text() == ""  # present even where no step was taken
    log({"step": 1, "alpha": 0.5})
    log({"step": 2, "alpha": 0.25})
    assert file.read_text() == '{"step": 1, "alpha": 0.5}\n{"step": 2, "alpha": 0.25}\n'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inverse": "kfca"}, "unknown inverse 'kfca'; known: identity"),
        ({"max_kl": 0}, "max_kl must be above 0"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"alpha": -1}, "alpha must be 0 or more"),
        ({"solver": {"damping": 0}}, "damping must be above 0"),
        ({"parameters": "norms"}, "parameters"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config.component(METHODS, {"name": "influence", **settings}, "")


def test_a_model_with_nothing_to_move_is_refused(make, data):
    frozen = make().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter to move: unfreeze some, or add an adapter"):
        Influence()(frozen, data)
    embeddings = make().requires_grad_(False)
    embeddings.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="no trainable linear layer to move: set parameters to all"):
        Influence()(embeddings, data)


def test_missing_sets_are_refused(tokenizer, forget_set, retain_set):
    for sets in ((forget_set, []), ([], retain_set)):
        with pytest.raises(ValueError, match=r"needs a .* set, and none was given"):
            UnlearnDataset(ChatTemplate(tokenizer), *sets, Influence.views)


def test_a_model_that_is_lost_is_reported(make, data):
    model = make()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NLL on the forget set is nan before any step: its weights are broken"):
        Influence()(model, data)


def test_a_direction_that_is_lost_is_reported(make, data, monkeypatch):
    class Lost(INVERSES["identity"]):
        def __call__(self, v):
            return {name: x * self.spec.damping * float("inf") for name, x in v.items()}

    monkeypatch.setitem(INVERSES, "identity", Lost)
    model = make()
    with pytest.raises(ValueError, match=r"the identity direction has length inf at step 1: raise solver\.damping"):
        Influence(inverse="identity")(model, data)
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in make().state_dict().items())
