"""Every registered objective inside the trainer: first order and the default second order, whole model and LoRA."""

from __future__ import annotations

import dataclasses
import gc
import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from soul.adapters import AdapterSpec, add_adapter
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.objectives.schedule import RetainSchedule
from soul.recipe import DEFAULT_OPTIMIZER
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec

NAMES = OBJECTIVES.names()
KEEPS = ("ft", "l1_sparse")  # with nothing to forget
SETTINGS = {"rmu": {"trained": "all"}, "l1_sparse": {"gamma": 1e-4}}


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """A trainer collects garbage once; what imports and fixtures hold is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class KilledError(Exception):
    """Stands for a lost machine."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture(scope="module")
def sets(forget_set, retain_set):
    return [dataclasses.replace(e, wrong_answers=("Nobody can tell.", "In Oslo.")) for e in forget_set], retain_set


@pytest.fixture(scope="module")
def nll(tokenizer, forget_set):
    """How unlikely the forget answers are to a model, nats a token."""
    template = ChatTemplate(tokenizer)
    batch = collate_rows([template.encode(e) for e in forget_set], pad_id=template.pad)

    def of(model):
        model.eval()
        with torch.no_grad():
            return -forward_answers(model, batch).token_logps().mean().item()

    return of


@pytest.fixture(scope="module")
def taught(make_model, tokenizer, sets):
    """The weights of a model that knows both sets."""
    template, model = ChatTemplate(tokenizer), make_model(1)
    batch = collate_rows([template.encode(e) for examples in sets for e in examples], pad_id=template.pad)
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        adam.zero_grad()
        (-forward_answers(model, batch).token_logps().mean()).backward()
        adam.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def make_trainer(tokenizer, make_model, taught, sets, refusals):
    def of(folder, objective, optimizer, *, lora=False, callbacks=(), **settings):
        model = make_model(1)
        model.load_state_dict(taught)
        if lora:
            model = add_adapter(model, AdapterSpec(r=4))
        defaults: dict[str, Any] = {"precision": "float32", "warmup": 0.0, "schedule": "constant", "save_steps": 0}
        training = TrainingSpec(**{**defaults, "batch_size": 4, "epochs": 1, **settings})
        log = LogCallback(folder / "log.jsonl")
        trainer = UnlearnTrainer(
            model,
            training.arguments(folder),
            dataset=make_dataset(tokenizer, sets[0], sets[1], objective, training, refusals),
            objective=objective,
            optimizer=optimizer,
            training=training,
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        return trainer, log

    return of


def own(name):
    return OBJECTIVES.get(name)(**SETTINGS.get(name, {}))


def check(trainer, log, steps):
    trainer.train()
    assert len(log.records) == steps
    assert all(math.isfinite(value) for record in log.records for value in record.values())
    return trainer.model


@pytest.mark.parametrize("name", NAMES)
def test_forgets_what_it_was_told_to(name, tmp_path, make_trainer, make_model, taught, nll):
    """Answers that were known become less likely, or stay where there is nothing to forget."""
    before = make_model(1)
    before.load_state_dict(taught)
    rule = OPTIMIZERS.get("adamw")(lr=1e-4 if name in KEEPS else 6e-3)
    trainer, log = make_trainer(tmp_path, own(name), rule, epochs=2)
    after = nll(check(trainer, log, 6 if name in KEEPS else 4))
    rise = after - nll(before)
    assert abs(rise) < 0.5 if name in KEEPS else rise > 0.05
    assert "retain_weight" in log.records[0] if name == "pdu" else "retain_weight" not in log.records[0]


@pytest.mark.parametrize(
    ("optimizer", "lora"), [(DEFAULT_OPTIMIZER, False), (DEFAULT_OPTIMIZER, True), ("adamw", True)]
)
@pytest.mark.parametrize("name", NAMES)
def test_any_rule_whole_or_lora(name, optimizer, lora, tmp_path, make_trainer):
    rule = OPTIMIZERS.get(optimizer)()
    trainer, log = make_trainer(tmp_path, own(name), rule, lora=lora, max_steps=2)
    start = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    model = check(trainer, log, 2)
    moved = {key for key, p in model.named_parameters() if p.requires_grad and not torch.equal(p, start[key])}
    assert moved
    if lora:
        assert all("lora" in key for key in moved)


def test_a_multiplier_survives_a_kill(tmp_path, make_trainer):
    """The weight of the retain term that a checkpoint's run goes on with is the one it had learned."""
    settings = {
        "epochs": 2,
        "save_steps": 1,
        "max_retain_loss": 1e3,
    }  # so fast that much is lost, which is not the point
    objective, rule = OBJECTIVES.get("pdu")(retain_weight=2.0), OPTIMIZERS.get("adamw")(lr=3e-2)
    whole, log = make_trainer(tmp_path / "whole", objective, rule, **settings)
    whole.train()
    killed, _ = make_trainer(tmp_path / "cut", objective, rule, callbacks=[KillAt(3)], **settings)
    with pytest.raises(KilledError):
        killed.train()
    again, rest = make_trainer(tmp_path / "cut", objective, rule, **settings)
    again.train(resume_from_checkpoint=True)
    weights = [record["retain_weight"] for record in log.records]
    assert [record["retain_weight"] for record in rest.records] == weights
    assert weights[0] == 2.0
    assert len(set(weights)) == len(weights) == 4
    for record, later in zip(log.records, log.records[1:], strict=False):
        slack = record["retain"] - 1.1 * record["reference"]
        assert later["retain_weight"] == pytest.approx(max(0.0, record["retain_weight"] + 5.0 * slack), rel=1e-6)
    for (key, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_weights_along_a_line(tmp_path, make_trainer):
    schedule = RetainSchedule("linear", end=3.0)
    objective = OBJECTIVES.get("grad_diff")(retain_schedule=schedule)
    trainer, log = make_trainer(tmp_path, objective, OPTIMIZERS.get("adamw")(lr=1e-4), max_steps=4)
    trainer.train()
    assert [record["retain_weight"] for record in log.records] == [1.0, 1.5, 2.0, 2.5]
    for record in log.records:
        assert record["loss"] == pytest.approx(record["forget"] + record["retain_weight"] * record["retain"])


@pytest.mark.parametrize(("size", "accumulation"), [(5, 1), (2, 2)])
def test_l1_penalty_counts_once_in_a_window(size, accumulation, tmp_path, make_trainer):
    objective, rule = OBJECTIVES.get("l1_sparse")(gamma=1e-3), OPTIMIZERS.get("adamw")(lr=1e-3)
    trainer, log = make_trainer(tmp_path, objective, rule, max_steps=2, batch_size=size, accumulation=accumulation)
    norm = sum(p.abs().sum().item() for p in trainer.model.parameters())
    trainer.train()
    first, second = log.records
    assert first["sparsity"] == pytest.approx(norm, rel=1e-5)
    assert first["loss"] == pytest.approx(first["retain"] + 1e-3 * norm, rel=1e-5)
    assert second["loss"] == pytest.approx(second["retain"] + 0.5e-3 * second["sparsity"], rel=1e-5)
    assert second["sparsity"] < norm


@pytest.mark.parametrize("lora", [False, True])
def test_rmu_trains_its_blocks_alone(lora, tmp_path, make_trainer):
    """Of two blocks the steered one is the first, and nothing else moves."""
    trainer, log = make_trainer(tmp_path, OBJECTIVES.get("rmu")(), OPTIMIZERS.get("adamw")(), lora=lora, max_steps=2)
    start = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    model = check(trainer, log, 2)
    moved = [key for key, p in model.named_parameters() if not torch.equal(p, start[key])]
    assert moved
    assert all(".layers.0." in key and ("lora" in key) == lora for key in moved)
    assert log.records[0]["retain"] == pytest.approx(0, abs=1e-6)  # nothing has moved before the first step
    assert log.records[1]["retain"] > 0


def test_a_block_that_is_not_there(tmp_path, make_trainer):
    with pytest.raises(ValueError, match="layer must be from 0 to 1 in this model, not 2"):
        make_trainer(tmp_path, OBJECTIVES.get("rmu")(layer=2), OPTIMIZERS.get("adamw")())


def test_other_answers_are_asked_for(tokenizer, forget_set, retain_set, refusals):
    training = TrainingSpec()
    with pytest.raises(ValueError, match=r"column perturbed_answer.*8 of 8 examples have none, for one 'f0'"):
        make_dataset(tokenizer, forget_set, retain_set, OBJECTIVES.get("altpo")(), training, refusals)
    with pytest.raises(ValueError, match="a retain set to take other answers from"):
        make_dataset(tokenizer, forget_set, [], OBJECTIVES.get("random_labels")(retain="none"), training, refusals)
