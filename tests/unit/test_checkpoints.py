"""Checkpoints are whole or absent, one that is not whole is passed over, and a lost model is never saved."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from soul import config
from soul.checkpoints import MANIFEST, last_checkpoint
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.stored import StorageError, read_lines
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.types import LostModelError


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do(kwargs["model"])


@pytest.fixture
def train(tmp_path, tokenizer, make_model, forget_set, retain_set, refusals):
    def run(*callbacks, objective=None, optimizer=None, **settings):
        training = TrainingSpec(precision="float32", **{"save_steps": 2, "max_steps": 6, **settings})
        loss = config.component(OBJECTIVES, objective, "npo")
        log = LogCallback(tmp_path / "log.jsonl")
        trainer = UnlearnTrainer(
            make_model(),
            training.arguments(tmp_path / "checkpoints"),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, refusals),
            objective=loss,
            optimizer=config.component(OPTIMIZERS, optimizer or {"name": "sophia", "lr": 1e-3}, ""),
            training=training,
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path / "checkpoints"))
        return trainer

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_named_when_it_is_whole(train, tmp_path):
    seen = []
    trainer = train(At(5, lambda _model: seen.append(names(tmp_path / "checkpoints"))))
    assert seen == [["checkpoint-4"]]
    assert names(tmp_path / "checkpoints") == ["checkpoint-6"]
    assert last_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint-6")
    assert trainer.args.logging_nan_inf_filter is False  # transformers would leave nan losses out


FILES = ("optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth", "training_args.bin", MANIFEST)
HURT = [(name, how) for name in FILES for how in ("cut", "gone") if (name, how) != (MANIFEST, "gone")]


@pytest.mark.parametrize(("hurt", "how"), HURT)
def test_a_newer_one_that_is_not_whole_is_passed_over_and_removed(train, tmp_path, hurt, how):
    folder = tmp_path / "checkpoints"
    train(max_steps=2)
    good, torn = folder / "checkpoint-2", folder / "checkpoint-4"
    before = content(good)
    shutil.copytree(good, torn)
    for file in (torn / "trainer_state.json", torn / MANIFEST):
        file.write_text(
            file.read_text().replace('"global_step": 2', '"global_step": 4').replace('"step": 2', '"step": 4')
        )
    assert last_checkpoint(folder) == str(torn)
    if how == "gone":
        (torn / hurt).unlink()
    else:
        (torn / hurt).write_bytes((torn / hurt).read_bytes()[:-20])
    assert last_checkpoint(folder) == str(good)
    assert names(folder) == ["checkpoint-2"]
    assert content(good) == before


def test_one_without_a_manifest_counts_where_its_files_have_their_ends(train, tmp_path):
    folder = tmp_path / "checkpoints"
    train(max_steps=2)
    (folder / "checkpoint-2" / MANIFEST).unlink()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    optimizer = folder / "checkpoint-2/optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-20])
    assert last_checkpoint(folder) is None


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(train, tmp_path):
    def fill(_model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match=r"checkpoint-4: File too large; what was written before is whole: free"):
            train(At(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "checkpoints") == ["checkpoint-2"]
    assert last_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint-2")
    train()
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def ruin(value):
    def do(model):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = value

    return do


def test_weights_that_are_no_numbers_are_not_saved(train, tmp_path):
    with pytest.raises(LostModelError, match=r"up_proj.weight holds values that are no numbers after step 4.*lower"):
        train(At(4, ruin(float("nan"))))
    assert last_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint-2")


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_did_it(train, tmp_path):
    with pytest.raises(
        LostModelError,
        match=r"is nan at step 4: the model is lost; lower optimizer.lr \(now 0.001.*raise objective.ret",
    ):
        train(At(3, ruin(float("inf"))))
    assert names(tmp_path / "checkpoints") == ["checkpoint-2"]
    assert read_lines(tmp_path / "log.jsonl")[-1]["step"] == 4


@pytest.mark.parametrize("rule", ["kfac", "lion", "signum", "adamw"])
def test_a_gradient_that_is_no_number_stops_the_run_before_the_step(train, tmp_path, rule):
    """Averages would keep it, and signs and K-FAC's length hide it: nothing would be learned any more."""

    def poison(model):
        p = model.model.layers[1].mlp.up_proj.weight
        hook = p.register_hook(lambda g: (hook.remove(), g.clone().fill_(float("inf")))[1])

    with pytest.raises(LostModelError, match=r"a gradient of step 4 is no finite number.*lower optimizer.lr"):
        train(At(3, poison), optimizer={"name": rule})
    assert names(tmp_path / "checkpoints") == ["checkpoint-2"]
    assert read_lines(tmp_path / "log.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_a_retain_loss_that_explodes_stops_the_run(train, tmp_path, retain):
    with pytest.raises(LostModelError, match=r"retain loss was .* at step 1, is .* at step \d.* at most .*lower optim"):
        train(
            objective={"name": "ga", "retain": retain, "retain_weight": 0.01},
            optimizer={"name": "signum", "lr": 0.3},
            max_steps=20,
            warmup=0.0,
        )
    log = read_lines(tmp_path / "log.jsonl")
    assert log[-1]["retain"] > log[0]["retain"] + 5.8  # ln 340
    assert all(line["retain"] <= log[0]["retain"] + 5.9 for line in log[:-1])


def test_the_limit_can_be_set(train):
    with pytest.raises(LostModelError, match=r"may be at most 0.5 nats a token.*raise training.max_retain_loss"):
        train(objective={"name": "grad_diff"}, max_retain_loss=0.5)
    train(objective={"name": "grad_diff", "retain": "hidden"}, max_steps=2)  # in no nats: there is no limit by itself
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_retain_loss"):
            TrainingSpec(max_retain_loss=bad)
