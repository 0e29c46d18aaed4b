"""Unlearning in one call."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from soul import config
from soul.data.general import refusals as builtin_refusals
from soul.data.rows import to_example
from soul.data.sources import check_disjoint, load_examples
from soul.methods.base import Method
from soul.models import without_autocast
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec
from soul.recipe import DEFAULT_OBJECTIVE, DEFAULT_OPTIMIZER
from soul.registry import METHODS, OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, TrainingSpec, UnlearnTrainer, make_dataset
from soul.types import Example

Data = str | Path | Iterable[Example | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class UnlearnResult:
    """What :func:`unlearn` returns.

    Attributes:
        model: The model given, changed in place.
        log: One record a step: loss terms, win rate, learning rate, seconds.
    """

    model: Any
    log: list[dict[str, float]]


def unlearn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Data = (),
    retain: Data = (),
    objective: str | Mapping[str, Any] | Objective = DEFAULT_OBJECTIVE,
    optimizer: str | Mapping[str, Any] | OptimizerSpec = DEFAULT_OPTIMIZER,
    method: str | Mapping[str, Any] | Method | None = None,
    training: TrainingSpec | Mapping[str, Any] | None = None,
    refusals: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> UnlearnResult:
    """Make ``model`` forget one set and keep another, in place.

    Args:
        model: A Hugging Face causal language model (or a PEFT model: then only the adapter changes).
        tokenizer: Its tokenizer.
        forget: What to forget: a file, a hub dataset, or examples (:class:`soul.Example`, or mappings with the columns
            that files have: question and answer, prompt and response, messages ...).
        retain: What to keep, likewise.
        objective: Name, ``{"name": ..., setting: ...}``, or an instance.
        optimizer: Likewise.
        method: Likewise, e.g. ``"influence"``; it takes the place of objective, optimizer and training loop.
        training: Length, batch size, precision, seed.
        refusals: Phrasings for ``po`` and ``dpo``; the built-in ones by default.
        callbacks: ``transformers`` callbacks.

    Raises:
        ValueError: Unknown names or settings, missing data, or the same item in both sets.

    Example:
        >>> result = soul.unlearn(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl")  # doctest: +SKIP
        >>> result.log[-1]["step_length"]  # doctest: +SKIP
    """
    loss, rule = objective, optimizer
    if not isinstance(loss, Objective):
        loss = config.component(OBJECTIVES, loss, DEFAULT_OBJECTIVE)
    if not isinstance(rule, OptimizerSpec):
        rule = config.component(OPTIMIZERS, rule, DEFAULT_OPTIMIZER)
    settings = (
        training if isinstance(training, TrainingSpec) else config.parse(TrainingSpec, training or {}, "training")
    )
    lost, kept = _examples(forget, "forget"), _examples(retain, "retain")
    if lost and kept:
        check_disjoint(lost, kept)
    if method is not None:
        do = method if isinstance(method, Method) else config.component(METHODS, method, "")
        records: list[dict[str, float]] = []
        data = make_dataset(tokenizer, lost, kept, do, settings)
        return UnlearnResult(do(model, data, log=lambda record: records.append(dict(record))), records)
    dataset = make_dataset(tokenizer, lost, kept, loss, settings, refusals or builtin_refusals())
    log = LogCallback(None)
    with tempfile.TemporaryDirectory() as folder:
        device = next(model.parameters()).device.type
        trainer = UnlearnTrainer(
            model,
            settings.arguments(folder, device),
            dataset=dataset,
            objective=loss,
            optimizer=rule,
            training=settings,
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        trainer.train()
    without_autocast(model)
    return UnlearnResult(model, log.records)


def _examples(data: Data, what: str) -> list[Example]:
    if isinstance(data, (str, Path)):
        return load_examples(data)
    result: list[Example] = []
    for i, item in enumerate(data):
        if isinstance(item, Example):
            result.append(item)
        elif isinstance(item, Mapping):
            example = to_example(item, f"{what}[{i}]")
            result.append(example if example.id else dataclasses.replace(example, id=str(i)))
        else:
            raise ValueError(
                f"{what}[{i}] must be a soul.Example or a mapping such as question and answer, not {item!r}"
            )
    return result
