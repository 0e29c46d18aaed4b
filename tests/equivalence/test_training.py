"""The trainer: accumulation is exact, the same seed gives the same bytes, and a killed run ends where it would have."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from soul import config
from soul.data.batches import VIEWS
from soul.forward import forward_answers
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec


class KilledError(Exception):
    """Stands for a lost machine."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture
def make_trainer(tokenizer, make_model, forget_set, retain_set, refusals):
    def make(folder, objective, optimizer, *, dtype=torch.float32, callbacks=(), log=None, retain=None, **settings):
        training = TrainingSpec(**{"precision": "float32", **settings})
        loss = OBJECTIVES.get(objective)(**({"retain": retain} if retain else {}))
        rule = config.component(OPTIMIZERS, optimizer, "adamw")
        trainer = UnlearnTrainer(
            make_model(0, dtype),
            training.arguments(folder),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, refusals),
            objective=loss,
            optimizer=rule,
            training=training,
            callbacks=[*([log] if log else []), *callbacks],
        )
        if log:
            log.trainer = trainer
        return trainer

    return make


@pytest.fixture
def weights(make_model):
    def of(trainer, *, moved=True):
        state = {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}
        start = make_model(0, next(iter(state.values())).dtype).state_dict()
        assert not moved or all(not torch.equal(v, start[k]) for k, v in state.items() if "norm" not in k)
        return state

    return of


ADAMW = {"name": "adamw", "lr": 1e-3}
SIGNUM = {"name": "signum", "lr": 1e-3}
LION = {"name": "lion", "lr": 1e-3}
RELEASE = {"name": "soul_release", "lr": 1e-3}
SOPHIA = {"name": "sophia", "lr": 1e-3, "curvature": {"interval": 2}}


@pytest.mark.parametrize("objective", ["grad_diff", "npo", "dpo"])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (3, 3)])
def test_accumulation_is_exact(tmp_path, make_trainer, weights, objective, size, accumulation):
    """Eight pairs of unequal length make one step, however they are cut into micro-batches."""
    results, logs = [], []
    for b, a in ((8, 1), (size, accumulation)):
        log = LogCallback(None)
        trainer = make_trainer(
            tmp_path / f"{b}x{a}", objective, ADAMW, dtype=torch.float64, log=log,
            batch_size=b, accumulation=a, epochs=3, warmup=0.0, schedule="constant",
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 3
        results.append(weights(trainer))
        logs.append(log.records)
    whole, parts = results
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-9)
    for one, other in zip(*logs, strict=True):
        assert {k: other[k] for k in ("forget", "retain", "loss")} == pytest.approx(
            {k: one[k] for k in ("forget", "retain", "loss")}, rel=1e-9
        )


SIGN_LIKE = [SIGNUM, LION, SOPHIA, RELEASE]


@pytest.mark.parametrize("rule", SIGN_LIKE, ids=lambda o: o["name"])
def test_accumulation_is_exact_for_rules_that_end_in_a_sign(tmp_path, make_trainer, weights, rule):
    """In float64, where rounding turns no sign."""
    whole, parts = (
        run_cut(tmp_path, make_trainer, weights, rule, b, a, dtype=torch.float64) for b, a in ((8, 1), (1, 8))
    )
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", [ADAMW, *SIGN_LIKE], ids=lambda o: o["name"])
def test_accumulation_in_fp32_differs_in_a_coordinate_in_a_thousand_at_most(tmp_path, make_trainer, weights, rule):
    """A gradient near 0 whose sign rounding turns is worth two steps, and few are that near."""
    whole, parts = (run_cut(tmp_path, make_trainer, weights, rule, b, a) for b, a in ((8, 1), (1, 8)))
    gaps = torch.cat([(parts[key] - value).abs().flatten() for key, value in whole.items()])
    differing = gaps > 1e-3 * rule["lr"]
    assert differing.float().mean() <= 1e-3
    assert gaps.max() <= 2.001 * rule["lr"]


def run_cut(tmp_path, make_trainer, weights, rule, size, accumulation, **more):
    trainer = make_trainer(
        tmp_path / f"{size}x{accumulation}", "grad_diff", rule,
        batch_size=size, accumulation=accumulation, epochs=3, warmup=0.0, schedule="constant", **more,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    return weights(trainer)


def test_a_step_is_the_gradient_of_the_mean_over_the_window(tmp_path, make_trainer, make_model):
    """Four micro-batches add up to the gradient of the loss over all eight pairs, each item counted once."""
    trainer = make_trainer(
        tmp_path, "grad_diff", {"name": "adamw", "lr": 1e-3}, dtype=torch.float64,
        batch_size=2, accumulation=4, max_steps=1, warmup=0.0, schedule="constant", max_grad_norm=0.0,
    )  # fmt: skip
    data, model = trainer.unlearn_data, make_model(0, torch.float64)
    items = [data[0, a, p] for a, p in data.pairing.epoch(0)]
    trainer.objective(model, trainer.data_collator(items), trainer.reference).loss().backward()
    seen = {}

    class Peek(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.add_callback(Peek())
    trainer.train()
    for name, p in model.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", [ADAMW, SOPHIA], ids=lambda o: o["name"])
@pytest.mark.parametrize("objective", ["npo", "po"])
def test_same_seed_same_bytes(tmp_path, make_trainer, weights, objective, optimizer):
    results = []
    for i, seed in enumerate((0, 0, 1)):
        trainer = make_trainer(tmp_path / str(i), objective, optimizer, batch_size=3, epochs=2, seed=seed)
        torch.manual_seed(100 + i)  # what went on before must not matter
        trainer.train()
        results.append(weights(trainer))
    first, again, other = results
    assert all(torch.equal(again[k], v) for k, v in first.items())
    assert any(not torch.equal(other[k], v) for k, v in first.items())


@pytest.mark.parametrize("optimizer", [ADAMW, SOPHIA], ids=lambda o: o["name"])
@pytest.mark.parametrize(
    ("objective", "accumulation", "save", "kill"), [("npo", 1, 3, 5), ("po", 2, 3, 4), ("npo", 1, 4, 6)]
)
def test_a_killed_run_ends_where_it_would_have(
    tmp_path, make_trainer, weights, objective, accumulation, save, kill, optimizer
):
    """Four micro-batches an epoch; the checkpoint lies inside an epoch, past the first one, or between two."""
    settings = {"batch_size": 2, "accumulation": accumulation, "epochs": 3, "save_steps": save}
    whole_log = LogCallback(tmp_path / "whole.jsonl")
    whole = make_trainer(tmp_path / "whole", objective, optimizer, log=whole_log, **settings)
    whole.train()

    killed = make_trainer(
        tmp_path / "cut",
        objective,
        optimizer,
        callbacks=[KillAt(kill)],
        log=LogCallback(tmp_path / "cut.jsonl"),
        **settings,
    )
    with pytest.raises(KilledError):
        killed.train()
    resumed = make_trainer(tmp_path / "cut", objective, optimizer, log=LogCallback(tmp_path / "cut.jsonl"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{save}"))

    assert resumed.state.global_step == whole.state.global_step
    expected = weights(whole)
    assert all(torch.equal(v, expected[k]) for k, v in weights(resumed).items())
    lines = [[json.loads(x) for x in (tmp_path / f).read_text().splitlines()] for f in ("whole.jsonl", "cut.jsonl")]
    for records in lines:
        for record in records:
            record.pop("seconds")
            record.pop("curvature_seconds", None)
    assert lines[0] == lines[1]


def test_no_step_is_taken_after_the_last(tmp_path, make_trainer, weights):
    """Six steps end within an epoch of four; a machine may be lost between their checkpoint and the model."""
    settings = {"batch_size": 2, "max_steps": 6, "save_steps": 3, "schedule": "constant"}
    whole = make_trainer(tmp_path / "whole", "npo", ADAMW, **settings)
    whole.train()
    log = LogCallback(None)
    again = make_trainer(tmp_path / "whole", "npo", ADAMW, log=log, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    assert again.state.global_step == 6
    assert log.records == []
    expected = weights(whole)
    assert all(torch.equal(v, expected[k]) for k, v in weights(again).items())


def test_the_log_has_the_learning_rate_that_a_step_was_made_with(tmp_path, make_trainer):
    log, made = LogCallback(None), []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            made.append(kwargs["optimizer"].param_groups[0]["lr"])

    make_trainer(tmp_path, "npo", ADAMW, log=log, callbacks=[Look()], batch_size=2, epochs=1, warmup=0.25).train()
    assert [r["learning_rate"] for r in log.records] == made
    assert made == pytest.approx([0.0, 1e-3, 2e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize(("accumulation", "steps", "epochs"), [(1, 8, 3), (4, 2, 3), (3, 4, 3), (8, 5, 6)])
def test_the_reference_is_asked_for_the_epochs_that_the_steps_take(
    tmp_path, make_trainer, monkeypatch, accumulation, steps, epochs
):
    """Four batches an epoch, each epoch with other retain rows; and one epoch more than is walked through."""
    trainer = make_trainer(tmp_path, "npo", ADAMW, batch_size=2, accumulation=accumulation, max_steps=steps)
    inner, asked = trainer.unlearn_data.rows, set()
    monkeypatch.setattr(trainer.unlearn_data, "rows", lambda view, n: (asked.add(n), inner(view, n))[1])
    trainer.train()
    assert asked == {epochs}
    assert epochs - 1 <= trainer.state.epoch <= epochs


def test_a_rule_that_needs_a_closure_is_refused_by_name(tmp_path, make_trainer, monkeypatch):
    monkeypatch.setattr(OPTIMIZERS.get("sgd"), "needs_closure", True)
    with pytest.raises(ValueError, match=r"^sgd asks for the loss again and again .*: choose another optimizer"):
        make_trainer(tmp_path, "npo", {"name": "sgd"})
    with pytest.raises(ValueError, match=r"^external asks for the loss again and again .*: choose another optimizer"):
        make_trainer(tmp_path, "npo", {"name": "external", "path": "torch.optim.LBFGS"})


def test_a_lost_model_stops_the_run(tmp_path, make_trainer):
    log = LogCallback(tmp_path / "log.jsonl")
    trainer = make_trainer(tmp_path, "ga", {"name": "adamw", "lr": 1e-3}, log=log, epochs=1)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss is nan at step 1.*lower optimizer.lr"):
        trainer.train()


@pytest.mark.parametrize("rule", [ADAMW, {"name": "kfac", "others": "diagonal", "curvature": {"interval": 0}}])
def test_frozen_embeddings_stay_and_the_rest_moves(tmp_path, make_trainer, make_model, rule):
    trainer = make_trainer(tmp_path, "grad_diff", rule, batch_size=4, epochs=2, frozen="embeddings")
    trainer.train()
    start = make_model(0).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, start[name]) == ("embed" in name or "lm_head" in name), name


def test_curvature_may_be_of_examples_of_its_own(tmp_path, make_model, tokenizer, forget_set, retain_set):
    """The factors are those of a run whose retain set is the curvature's, and the loss is of the retain set."""
    loss, kept = OBJECTIVES.get("grad_diff")(), {}
    rule = config.component(OPTIMIZERS, {"name": "kfac", "curvature": {"interval": 0, "cache": False}}, "")
    training = TrainingSpec(precision="float32", batch_size=4, epochs=1)
    halves = {"retain": retain_set[:5], "curvature": retain_set[5:]}
    for name, retain, own in (
        ("apart", halves["retain"], halves["curvature"]),
        ("same", halves["curvature"], ()),
        ("other", halves["retain"], ()),
    ):
        log = LogCallback(None)
        dataset = make_dataset(tokenizer, forget_set, retain, loss, training, [], own)
        trainer = UnlearnTrainer(
            make_model(0), training.arguments(tmp_path / name), dataset=dataset, objective=loss, optimizer=rule,
            training=training, callbacks=[log],
        )  # fmt: skip
        log.trainer = trainer
        trainer.train()
        kept[name] = (trainer.update_rule.curvature_state(), log.records[0]["retain"])
    factors = {name: state for name, (state, _) in kept.items()}
    assert all(torch.equal(v, factors["same"][k]) for k, v in factors["apart"].items())
    assert not all(torch.equal(v, factors["other"][k]) for k, v in factors["apart"].items())
    assert kept["apart"][1] == kept["other"][1] != kept["same"][1]


def test_what_has_no_factors_costs_no_gradient_and_changes_nothing(tmp_path, make_trainer, monkeypatch):
    """Steps of layers within max_dim are those of a run that makes the others' gradients, which are not clipped by."""
    spec = {"name": "kfac", "max_dim": 32, "curvature": {"interval": 0, "cache": False}}
    short = {"batch_size": 4, "epochs": 2, "max_grad_norm": 0.0}
    frozen = make_trainer(tmp_path / "frozen", "grad_diff", spec, **short)
    start = {n: p.detach().clone() for n, p in frozen.model.named_parameters()}
    frozen.train()
    left = {n for n, p in frozen.model.named_parameters() if not p.requires_grad}
    assert {n.split(".")[-2] for n in left} == {"gate_proj", "up_proj", "down_proj"}
    monkeypatch.setattr(OPTIMIZERS.get("kfac"), "prepare", lambda *_: None)
    whole = make_trainer(tmp_path / "whole", "grad_diff", spec, **short)
    whole.train()
    assert all(p.requires_grad for p in whole.model.parameters())
    for (name, p), q in zip(frozen.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, start[name]) == (name in left or "norm" in name or "embed" in name or "lm_head" in name)


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)])
def test_projection_takes_the_retain_direction_out_of_the_forget_gradient(tmp_path, make_trainer, size, accumulation):
    """One step of gradient descent against gradients of the two terms found apart, in float64."""

    def make(name, combine):
        return make_trainer(
            tmp_path / name, "grad_diff", {"name": "sgd", "lr": 1e-2, "momentum": 0.0}, dtype=torch.float64,
            combine=combine, batch_size=size, accumulation=accumulation, epochs=1, warmup=0.0, schedule="constant",
            max_grad_norm=0.0,
        )  # fmt: skip

    def gradient(trainer):
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        moves = zip(start, trainer.model.parameters(), strict=True)
        return torch.cat([(a - p.detach()).flatten() / 1e-2 for a, p in moves])

    apart = make("apart", "sum")
    keys = [key for batch in apart.get_train_dataloader().batch_sampler for key in batch]
    batch = apart.data_collator([apart.unlearn_data[key] for key in keys])
    terms, weights = apart.objective(apart.model, batch, apart.reference).terms, list(apart.model.parameters())

    def flat(term):
        found = torch.autograd.grad(term.weight * term.total / term.count, weights, retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    forget, retain = flat(terms["forget"]), flat(terms["retain"])
    torch.testing.assert_close(gradient(make("together", "sum")), forget + retain, rtol=0, atol=1e-9)
    projected = gradient(make("projected", "projected"))
    expected = retain + forget - (forget @ retain) / (retain @ retain) * retain
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-9)
    assert abs(float((projected - retain) @ retain)) < 1e-9 < abs(float(forget @ retain))


def test_a_retain_gradient_that_is_rounding_alone_protects_nothing(tmp_path, make_trainer, make_model):
    """At the first step a KL from the model before has no gradient; only its rounding is not 0."""
    ends = []
    for combine in ("sum", "projected"):
        trainer = make_trainer(
            tmp_path / combine, "kl", {"name": "sgd", "lr": 1e-2, "momentum": 0.0}, combine=combine, batch_size=8,
            epochs=1, warmup=0.0, schedule="constant",
        )  # fmt: skip
        trainer.train()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("retain", ["kl", "nll"])
@pytest.mark.parametrize("reference", ["cache", "copy"])
def test_the_reference_is_rounded_as_training_is(tmp_path, make_trainer, monkeypatch, retain, reference):
    """Of unchanged weights log-ratios and KL are 0 in bf16 too."""
    seen = []
    kind = OBJECTIVES.get("npo")
    plain = kind.__call__

    def watched(self, model, batch, asked):
        out = plain(self, model, batch, asked)
        answers = forward_answers(model, batch)
        ratios = answers.sum_rows(answers.token_logps()) - asked.sequence_logps(answers)
        seen.append(ratios[answers.view_B == VIEWS.index("forget")].detach())
        return out

    monkeypatch.setattr(kind, "__call__", watched)
    trainer = make_trainer(
        tmp_path, "npo", ADAMW, retain=retain, precision="bfloat16", reference=reference, batch_size=8,
        max_steps=1, warmup=0.0,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 1
    assert float(seen[0].abs().max()) < 1e-3  # .13 where the reference was asked in fp32
    if retain == "kl":
        assert trainer.last_terms["retain"] < 1e-5


@pytest.mark.parametrize("rule", [{"name": "adamw", "lr": 1e-3}, {"name": "kfac", "every": 4}])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_no_gradient_is_left_over(tmp_path, make_trainer, make_model, rule, steps):
    """A single step is taken at the full rate, and the last one moves whatever rule moves only at times."""
    trainer = make_trainer(tmp_path, "grad_diff", rule, batch_size=2, max_steps=steps)
    moved = []
    weight = trainer.model.model.layers[0].mlp.up_proj.weight

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moved.append(weight.detach().clone())

    trainer.add_callback(Watch())
    before = weight.detach().clone()
    trainer.train()
    assert len(moved) == steps
    last = moved[-2] if steps > 1 else before
    assert not torch.equal(moved[-1], last)


def test_projection_needs_something_to_project_off(tmp_path, make_trainer):
    with pytest.raises(ValueError, match="needs a retain term"):
        make_trainer(tmp_path, "ga", ADAMW, combine="projected", batch_size=4, epochs=1).train()
