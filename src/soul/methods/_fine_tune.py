"""Fine-tuning inside a method: the trainer's own loop, on examples of the method's choice."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

from soul.data.batches import UnlearnDataset
from soul.methods.base import Log, Progress
from soul.models import left_as_it_was
from soul.objectives.ft import FineTune
from soul.optim.adamw import AdamWSpec
from soul.reference import untrained_lora
from soul.trainer import LogCallback, UnlearnTrainer
from soul.training import TrainingSpec
from soul.types import Example


def refuse_trained_adapter(model: Any, why: str) -> None:
    """Make sure that an adapter, if there is one, adds nothing yet.

    Raises:
        ValueError: It is not known to add nothing (:func:`soul.reference.untrained_lora`); the message says ``why``
            that matters.
    """
    if hasattr(model, "peft_config") and not untrained_lora(model):
        raise ValueError(
            f"this adapter has been trained before, or is not plain LoRA, and {why}: merge it into the weights first"
        )


def fine_tune(
    model: Any,
    data: UnlearnDataset,
    examples: Sequence[Example],
    training: TrainingSpec,
    optimizer: AdamWSpec,
    *,
    what: str,
    progress: Progress,
    log: Log,
) -> int:
    """Train ``model`` in place on ``examples`` with AdamW, and leave it otherwise as it was given.

    Args:
        model: Only what is trainable changes.
        data: Whose template, lengths and seed are used.
        examples: What it learns.
        training: Length and batches; no checkpoints are kept, and rows are as long as the data's.
        optimizer: Learning rate and weight decay.
        what: What progress is called.
        progress: Called after each step.
        log: Called after each step with ``step``, ``nll`` (nats a token), ``learning_rate`` and ``seconds``.

    Returns:
        The number of steps.

    Raises:
        ValueError: There are no examples.
        LostModelError: The loss is no longer a number.
    """
    settings = dataclasses.replace(training, seed=data.seed, save_steps=0)
    dataset = UnlearnDataset(data.template, (), examples, ("retain",), seed=data.seed)
    steps = 0

    def note(step: int, of: int, record: dict[str, float]) -> None:
        nonlocal steps
        steps = step
        progress(what, step, of)
        numbers = {name: record[name] for name in ("learning_rate", "seconds")}
        log({"step": step, "nll": record["retain"], **numbers})

    lines = LogCallback(None, note)
    with left_as_it_was(model), tempfile.TemporaryDirectory() as folder:
        trainer = UnlearnTrainer(
            model,
            settings.arguments(folder, next(model.parameters()).device.type),
            dataset=dataset,
            objective=FineTune(),
            optimizer=optimizer,
            training=settings,
            callbacks=[lines],
        )
        lines.trainer = trainer
        trainer.train()
    return steps
