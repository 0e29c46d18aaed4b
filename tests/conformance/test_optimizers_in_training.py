"""Every registered optimizer inside the trainer, on a tiny language model: it learns, accumulates, resumes exactly."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_tasks import make, names
from transformers import TrainerCallback

from soul.optim.base import OptimizerSpec
from soul.registry import OBJECTIVES
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec

STEADY = {"warmup": 0.0, "schedule": "constant", "save_steps": 0}


class KilledError(Exception):
    """Stands for a lost machine."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture
def make_trainer(tokenizer: Any, make_model: Any, forget_set: Any, retain_set: Any, refusals: Any) -> Any:
    def make_one(
        folder: Path,
        objective: str,
        spec: OptimizerSpec,
        dtype: torch.dtype = torch.float32,
        callbacks: Any = (),
        **settings: Any,
    ) -> tuple[UnlearnTrainer, LogCallback]:
        training = TrainingSpec(precision="float32", **settings)
        loss, log = OBJECTIVES.get(objective)(), LogCallback(None)
        trainer = UnlearnTrainer(
            make_model(0, dtype),
            training.arguments(folder),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, refusals),
            objective=loss,
            optimizer=spec,
            training=training,
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        return trainer, log

    return make_one


def weights(trainer: UnlearnTrainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", names())
def test_learns_a_tiny_language_model(name: str, tmp_path: Path, make_trainer: Any) -> None:
    """Two walks over ten answers must take off a twentieth of their loss, at one of three learning rates."""
    falls = []
    for lr in (0.01, 0.1, 0.003):
        trainer, log = make_trainer(tmp_path / str(lr), "ft", make(name, lr=lr), batch_size=5, epochs=4, **STEADY)
        trainer.train()
        losses = [record["loss"] for record in log.records]
        falls.append(sum(losses[-2:]) / sum(losses[:2]))
        if falls[-1] < 0.95:
            break
    assert min(falls) < 0.95


@pytest.mark.parametrize("name", names())
def test_accumulation_changes_nothing(name: str, tmp_path: Path, make_trainer: Any) -> None:
    """Eight pairs of unequal length make one step, as 8 x 1 and as 3 x 3, in float64.

    Rules that end in a sign turn a difference of rounding into a whole step where the momentum is 0 but for rounding,
    so what is asked is that hardly any coordinate differs.
    """
    results = []
    for size, accumulation in ((8, 1), (3, 3)):
        trainer, _ = make_trainer(
            tmp_path / str(size), "grad_diff", make(name, lr=1e-3), torch.float64,
            batch_size=size, accumulation=accumulation, epochs=2, **STEADY,
        )  # fmt: skip
        start = weights(trainer)
        trainer.train()
        assert trainer.state.global_step == 2
        results.append(weights(trainer))
        assert any(not torch.equal(value, start[key]) for key, value in results[-1].items())
    whole, parts = results
    different = sum(int(((parts[key] - value).abs() > 1e-9).sum()) for key, value in whole.items())
    assert different <= 1e-4 * sum(value.numel() for value in whole.values())


@pytest.mark.parametrize("name", names())
def test_a_killed_run_ends_where_it_would_have(name: str, tmp_path: Path, make_trainer: Any) -> None:
    settings = {"batch_size": 4, "epochs": 3, "save_steps": 2}
    spec = make(name, lr=3e-3, weight_decay=0.01)
    whole, log = make_trainer(tmp_path / "whole", "npo", spec, **settings)
    whole.train()
    killed, _ = make_trainer(tmp_path / "cut", "npo", spec, callbacks=[KillAt(3)], **settings)
    with pytest.raises(KilledError):
        killed.train()
    torch.manual_seed(5)  # what went on between must not matter
    resumed, tail = make_trainer(tmp_path / "cut", "npo", spec, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed).items())

    def told(records: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in record.items() if "seconds" not in k} for record in records[-4:]]

    assert told(tail.records) == told(log.records)


def count(sizes: list[int], x: torch.Tensor) -> torch.Tensor:
    sizes.append(x.nbytes)
    return x


@pytest.mark.parametrize(
    ("objective", "name", "settings"),
    [
        ("grad_diff", "adamw", {}),
        ("npo", "sophia", {}),
        ("kl", "kfac", {}),
        ("npo", "ekfac", {"frozen": "embeddings"}),
        ("rmu", "whiten", {}),
        ("grad_diff", "kfac", {"combine": "projected"}),
        ("grad_diff", "adamw", {"combine": "dual"}),
    ],
)
def test_checkpointing_changes_memory_and_nothing_else(
    objective: str, name: str, settings: Any, tmp_path: Path, make_trainer: Any
) -> None:
    """The forward pass that runs again is watched by no factor, and the gradient is the same, in float64."""
    results, kept = [], []
    for checkpointing in (False, True):
        how = {**STEADY, **settings, "batch_size": 4, "max_steps": 3, "gradient_checkpointing": checkpointing}
        trainer, _ = make_trainer(tmp_path / str(checkpointing), objective, make(name, lr=1e-3), torch.float64, **how)
        bytes_kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(count, bytes_kept), lambda x: x):
            trainer.train()
        results.append(weights(trainer))
        kept.append(sum(bytes_kept))
    assert kept[1] < kept[0], "it was not on"
    plain, again = results
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-10)
