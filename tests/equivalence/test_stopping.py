"""The stopping rule on a model that learned its answers: it ends forgotten, or within its budget, and says which."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from soul import config
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.ended import checks_of, write_stopped
from soul.gauge import Gauge, worst
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.stopping import StopSpec
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.types import Example, LostModelError

KFAC = {"name": "kfac", "lr": 0.1}
ADAMW = {"name": "adamw", "lr": 2e-3}
TRAINING = {"precision": "float32", "batch_size": 4, "schedule": "constant", "warmup": 0.0, "save_steps": 0}
OURS = [("Who is Ada?", "A poet of the sea."), ("Who is Bo?", "An old baker from Graz.")]
THEIRS = [("Who is Cy?", "A judge with two sons."), ("Who is Dan?", "A teacher of harmony in Lisbon.")]
ASKED = ("", "Tell me: ", "Now then: ", "Well, ")


def people(pairs):
    return [Example(f"{how}{q}", a, id=f"{how}{q}") for how, (q, a) in itertools.product(ASKED, pairs)]


@pytest.fixture(scope="module")
def sets(forget_set, retain_set):
    return [*forget_set, *people(OURS)], [*retain_set, *people(THEIRS)]


@pytest.fixture(scope="module")
def learned(make_model, tokenizer, sets):
    """The weights of a model that knows both sets by heart."""
    model, template = make_model(), ChatTemplate(tokenizer, 256)
    batch = collate_rows([template.encode(e) for part in sets for e in part])
    labels = batch["input_ids"].masked_fill(~batch["answer_mask"], -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def make_trainer(tmp_path, make_model, tokenizer, sets, refusals, learned):
    def make(stop, optimizer=KFAC, *, objective="npo", retain=True, lora=False, folder="run", callbacks=(), **settings):
        training = TrainingSpec(**(TRAINING | settings))
        loss = config.component(OBJECTIVES, objective, "npo")
        model = make_model()
        model.load_state_dict(learned)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
        log = LogCallback(tmp_path / f"{folder}.jsonl")
        trainer = UnlearnTrainer(
            model,
            training.arguments(tmp_path / folder),
            dataset=make_dataset(tokenizer, sets[0], sets[1] if retain else [], loss, training, refusals),
            objective=loss,
            optimizer=config.component(OPTIMIZERS, optimizer, "adamw"),
            training=training,
            stop=StopSpec(**({"when": "forgotten"} | stop)),
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        return trainer, log

    return make


@pytest.fixture
def train(make_trainer):
    def do(*args, **settings):
        trainer, log = make_trainer(*args, **settings)
        trainer.train()
        return trainer, log.records, trainer.stopping.stopped if trainer.stopping else None

    return do


@pytest.fixture
def measured(learned, make_model):
    """KL moved and knowledge left between the model that learned and the trainer's, measured anew."""

    def of(trainer):
        model = make_model()
        model.load_state_dict(learned)
        again = Gauge(model, trainer.unlearn_data, rows=StopSpec().rows)
        model.load_state_dict(trainer.model.state_dict())
        return worst(again.moved()), again.known().share(again.before), again.recited()

    return of


def looks(records):
    return [r for r in records if "known" in r]


@pytest.mark.parametrize(
    ("objective", "rule"), [("npo", KFAC), ("grad_diff", ADAMW), ("simnpo", KFAC)], ids=["npo", "grad_diff", "simnpo"]
)
def test_it_ends_when_forgotten(train, measured, rule, objective):
    trainer, records, end = train({"kl_budget": 100.0}, rule, objective=objective)
    assert end.why == "forgotten"
    assert end.step == records[-1]["step"] == trainer.state.global_step < trainer.state.max_steps
    moved, known, recited = measured(trainer)
    assert (moved, known, recited) == pytest.approx((worst(end.moved), end.known, end.recited), rel=1e-3, abs=1e-6)
    assert known <= 0.1
    assert recited <= 0.2
    earlier = looks(records)[:-1]
    assert [r["step"] for r in earlier] == list(range(2, end.step, 2))
    assert all(r["known"] > 0.1 or r["recited"] > 0.2 for r in earlier)
    assert "forgotten" in end.sentence()


def test_the_budget_is_kept_and_used(train, measured):
    """The step that leaves the budget is shortened, not taken back whole and not left as it is."""
    trainer, _, end = train({"kl_budget": 0.2})
    assert end.why == "budget"
    assert "budget is spent" in end.sentence()
    moved, known, _ = measured(trainer)
    assert 0.1 <= moved <= 0.2
    assert moved == pytest.approx(worst(end.moved), rel=1e-3)
    assert 0.1 < known < 1
    free, _, _ = train({"kl_budget": 100.0}, folder="free", max_steps=end.step)
    assert measured(free)[0] > 0.2, "the last step would have left it"


def test_a_model_that_a_step_loses_is_given_back(train, learned):
    """However bad the step: the weights are finite, within the budget, and those before it."""
    trainer, _, end = train({"kl_budget": 0.1, "every": 1}, {"name": "signum", "lr": 1e30})
    assert (end.why, end.lost, end.step) == ("lost", "the KL from the model before", 1)
    assert all(torch.equal(v, learned[k]) for k, v in trainer.model.state_dict().items())
    assert worst(end.moved) == pytest.approx(0, abs=1e-6)


def test_a_loss_that_is_no_number_between_two_looks_ends_within_the_budget(train):
    class Lose(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].model.layers[0].mlp.up_proj.weight.fill_(math.nan)

    trainer, _, end = train({"kl_budget": 100.0}, callbacks=[Lose()], max_steps=100)
    assert (end.why, end.lost, end.step) == ("lost", "the loss", 3)
    said = end.sentence()
    assert "after 3 steps, where the loss was no finite number" in said
    assert "weights within the budget are kept" in said
    assert "lower optimizer.lr" in said
    assert "raise" not in said
    assert "nan" not in said
    assert all(bool(v.isfinite().all()) for v in trainer.model.state_dict().values())
    with pytest.raises(LostModelError):
        train({"when": "never"}, callbacks=[Lose()], folder="unruled")


def test_a_gradient_that_is_no_number_ends_with_what_was_kept(train):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                p = kwargs["model"].model.layers[1].mlp.up_proj.weight
                hook = p.register_hook(lambda g: (hook.remove(), g * math.inf)[1])

    of_gradients = {"name": "sophia", "curvature": {"estimator": "objective_squared", "warm_start": 0}}
    for i, (rule, combine) in enumerate([({"name": "kfac"}, "sum"), (of_gradients, "sum"), ({"name": "kfac"}, "dual")]):
        settings = {"max_steps": 100, "combine": combine, "folder": f"run{i}"}
        trainer, _, end = train({"kl_budget": 100.0}, rule, callbacks=[Poison()], **settings)
        assert (end.why, end.lost, end.step) == ("lost", "a gradient", 3)
        assert "where a gradient was no finite number" in end.sentence()
        assert all(bool(v.isfinite().all()) for v in trainer.model.state_dict().values())


def test_a_loss_alone_that_is_no_number_is_no_end_of_the_steps(make_trainer):
    trainer, _ = make_trainer({"kl_budget": 100.0}, max_steps=100)

    class Lose(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.last_terms["forget"] = math.nan

    trainer.add_callback(Lose())
    trainer.train()
    end = trainer.stopping.stopped
    assert (end.why, end.lost, end.step) == ("lost", "the loss", 3)
    assert "steps are taken" not in end.sentence()
    assert "stop.steps" not in end.sentence()


def test_a_probability_that_is_no_number_is_not_forgotten(make_trainer):
    """KL does not see it where only a word of the answers to forget is lost: the weights before it are given back."""
    trainer, log = make_trainer({"kl_budget": 100.0, "every": 1}, {"name": "kfac", "lr": 0.01}, max_steps=100)

    class Lose(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                gauge = trainer.stopping.gauge
                kept = {i for rows in gauge.kept.values() for row in rows for i in row.input_ids}
                word = min({i for row in gauge._true for i in row.input_ids} - kept)
                with torch.no_grad():
                    trainer.model.model.embed_tokens.weight[word] = math.nan
                assert math.isfinite(worst(gauge.moved()))
                assert math.isnan(gauge.known().true)

    trainer.add_callback(Lose())
    trainer.train()
    end = trainer.stopping.stopped
    assert (end.why, end.lost, end.step) == ("lost", "the probability of the answers", 3)
    assert end.known == log.records[1]["known"] > 0.1  # of the look before
    assert "forgotten, within" not in end.sentence()
    assert all(bool(v.isfinite().all()) for v in trainer.model.state_dict().values())


def test_all_steps_taken_is_neither(train):
    _, records, end = train({"kl_budget": 100.0}, max_steps=3)
    assert (end.why, end.step, len(records)) == ("steps", 3, 3)
    assert end.known > 0.1
    assert "raise stop.steps" in end.sentence()


def test_it_does_not_end_while_answers_are_recited(train):
    """A probability that has fallen is not enough where the text still comes."""
    _, records, end = train({"kl_budget": 100.0, "known": 0.97, "every": 1}, {"name": "kfac", "lr": 0.03})
    assert end.why == "forgotten"
    asked = [r["recited"] for r in records if "recited" in r]
    assert len(asked) > 2
    assert all(value > 0.2 for value in asked[:-1])
    assert asked[-1] == end.recited <= 0.2


def test_few_items_get_steps_enough_and_many_are_not_cut(make_trainer):
    for stop, settings, steps in (
        ({"steps": 30}, {"epochs": 2}, 32),  # 4 steps an epoch of 16 items
        ({"steps": 30}, {"epochs": 20}, 80),
        ({"steps": 0}, {"epochs": 2}, 8),
        ({"steps": 30}, {"max_steps": 5}, 5),
        ({"steps": 30}, {"epochs": 2, "accumulation": 2}, 30),
        ({"steps": 0, "when": "never"}, {"epochs": 2}, 8),
    ):
        trainer, _ = make_trainer(stop, **settings)
        args = trainer.args
        per_epoch = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
        assert (args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs) == steps


def test_without_a_retain_set_general_text_bounds_it(train, measured):
    trainer, _, end = train({"kl_budget": 0.2}, ADAMW, objective={"name": "npo", "retain": "none"}, retain=False)
    assert set(end.moved) == {"general"}
    assert 0.1 <= measured(trainer)[0] <= 0.2


def test_adapters_alone_are_kept_and_shortened(train, learned):
    trainer, _, end = train({"kl_budget": 0.05}, {"name": "adamw", "lr": 2e-2}, lora=True)
    assert end.why == "budget"
    assert 0.02 <= worst(end.moved) <= 0.05
    base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(base, learned["model.layers.0.self_attn.q_proj.weight"])
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        name for name, _ in trainer.model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize(("shift", "why"), [(0.0, "forgotten"), (1.0, "merged")], ids=["merged whole", "rounded away"])
def test_what_was_merged_is_measured_again(train, learned, make_model, tmp_path, shift, why):
    """``shift`` of the way back to the weights before stands for what rounding does to a small update."""
    trainer, _, end = train({"kl_budget": 5.0}, ADAMW, lora=True, folder=why)
    assert end.why == "forgotten"
    merged, before = trainer.model.merge_and_unload(), learned
    with torch.no_grad():
        for name, p in merged.named_parameters():
            p.lerp_(before[name], shift)
    trainer.stopping.measure_again(merged)
    again = trainer.stopping.stopped
    assert (again.why, again.step) == (why, end.step)
    if why == "forgotten":
        assert again.known == pytest.approx(end.known, abs=1e-3)
        assert worst(again.moved) == pytest.approx(worst(end.moved), rel=1e-2)
    else:
        assert again.known == pytest.approx(1, abs=1e-3)
        assert worst(again.moved) == pytest.approx(0, abs=1e-4)
        assert "until the adapter was merged into the weights" in again.sentence()
    write_stopped(trainer.stopping, tmp_path)
    passed = [check["passed"] for check in checks_of(tmp_path, trainer.stopping.spec)]
    assert passed == [why == "forgotten", True]


def test_never_changes_nothing(train, learned):
    ruled, _, none = train({"when": "never"}, max_steps=4)
    wide, records, _ = train({"kl_budget": 1e6, "known": 0.0}, max_steps=4, folder="wide")
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(ruled.model.parameters(), wide.model.parameters(), strict=True))
    assert len(looks(records)) == 2


@pytest.mark.parametrize("ends", ["forgotten", "budget"])
def test_checkpoints_change_no_end(tmp_path, make_trainer, ends):
    """How often they are written is free to change; those that are due between two looks wait for the next."""
    how = {"optimizer": {"name": "kfac", "lr": 0.05}, "max_steps": 12}
    stop = {"kl_budget": 100.0, "every": 4, "known": 0.7, "recited": 0.7}
    if ends == "budget":  # one that is spent at the eighth step
        free, records = make_trainer(stop | {"known": 0.0}, folder="free", **how)
        free.train()
        kl = [max(r["kl_retained"], r["kl_general"]) for r in looks(records.records)]
        stop |= {"kl_budget": (kl[0] + kl[1]) / 2, "known": 0.0}
    found = []
    for every in (0, 3, 5):
        trainer, log = make_trainer(stop, folder=f"every-{every}", save_steps=every, **how)
        trainer.train()
        found.append((trainer.stopping.stopped, [r["step"] for r in looks(log.records)], trainer.model.state_dict()))
    end, looked, weights = found[0]
    assert (end.why, end.step) == (ends, 8)
    for other in found[1:]:
        assert other[:2] == (end, looked)
        assert all(torch.equal(v, weights[k]) for k, v in other[2].items())
    assert [p.name for p in tmp_path.glob("every-*/checkpoint-*")] == ["checkpoint-4"]  # that of 3


def test_a_copy_for_the_objective_is_none_for_the_rule(make_trainer):
    trainer, _ = make_trainer({"kl_budget": 100.0}, max_steps=2, reference="copy", objective={"name": "kl"})
    trainer.train()
    assert trainer.reference.live is not None
    assert trainer.stopping.gauge.reference.live is None


def test_absurd_false_answers_are_told(make_trainer, caplog):
    for retain in (True, False):
        caplog.clear()
        objective = {"name": "npo", "retain": "nll" if retain else "none"}
        make_trainer({}, ADAMW, objective=objective, retain=retain)[0].stopping.prepare()
        assert ("no retained question" in caplog.text) != retain


class KilledError(Exception):
    """Stands for a lost machine."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize("ends", ["forgotten", "budget"])
@pytest.mark.parametrize(("name", "lr", "lora"), [("kfac", 0.05, False), ("kfac", 0.2, True), ("adamw", 8e-4, False)])
def test_an_interrupted_run_ends_the_same(tmp_path, make_trainer, name, lr, lora, ends):
    """It is killed after a checkpoint that was due between two looks and came with the next, and goes on from there."""
    how = {"optimizer": {"name": name, "lr": lr}, "lora": lora, "save_steps": 3, "max_steps": 24}
    stop = {"kl_budget": 100.0, "every": 2}
    if ends == "budget":  # one that is spent at the sixth step; which KL is there, another machine rounds its own way
        free, records = make_trainer(stop, folder="free", **how)
        free.train()
        kl = {r["step"]: max(r["kl_retained"], r["kl_general"]) for r in looks(records.records)}
        stop["kl_budget"] = (max(kl[2], kl[4]) + kl[6]) / 2
    whole, log = make_trainer(stop, folder="whole", **how)
    whole.train()
    end = whole.stopping.stopped
    assert end.step > 4
    assert end.why == ends
    assert not (tmp_path / f"whole/checkpoint-{end.step}").exists()
    cut, _ = make_trainer(stop, folder="cut", callbacks=[KillAt(5)], **how)
    with pytest.raises(KilledError):
        cut.train()
    again, records = make_trainer(stop, folder="cut", **how)
    again.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-4"))
    assert again.stopping.stopped == end
    strip = [[{k: v for k, v in r.items() if "seconds" not in k} for r in of.records] for of in (log, records)]
    assert strip[0] == strip[1]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"when": "done"}, "stop.when must be one of forgotten, never, not 'done'"),
        ({"kl_budget": 0.0}, "stop.kl_budget is a KL above 0"),
        ({"kl_budget": math.nan}, "stop.kl_budget is a KL above 0"),
        ({"known": 1.0}, "stop.known is a share"),
        ({"recited": -0.1}, "stop.recited is a share"),
        ({"every": 0}, "stop.every must be 1 or more"),
        ({"rows": 0}, "stop.rows must be 1 or more"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        StopSpec(**settings)


def test_there_must_be_something_to_wait_for():
    from soul.recipe import recipe_from_tree

    with pytest.raises(ValueError, match="ft forgets nothing"):
        recipe_from_tree({"objective": "ft", "stop": {"when": "forgotten"}})
    with pytest.raises(ValueError, match="influence does not train"):
        recipe_from_tree({"method": "influence", "stop": {"when": "forgotten"}})
