"""Unlearning in one call."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from soul import config
from soul.anchors import stand_in
from soul.cautions import forget_warnings, precision_warnings
from soul.checkpoints import check_weights
from soul.data.general import refusals as builtin_refusals
from soul.data.rows import to_examples
from soul.data.sources import check_disjoint, load_examples
from soul.inputs import read_refusals
from soul.methods.base import Method
from soul.models import left_as_it_was
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec
from soul.overlaps import find_overlaps, without_overlaps
from soul.recipe import DEFAULT_OBJECTIVE, DEFAULT_OPTIMIZER, DataSpec, Recipe
from soul.registry import METHODS, OBJECTIVES, OPTIMIZERS
from soul.stopping import Stopped, StopSpec
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.truncation import training_cuts
from soul.types import Example

Data = str | Path | Iterable[Example | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class UnlearnResult:
    """What :func:`unlearn` returns.

    Attributes:
        model: The model given, changed in place.
        log: One record a step: loss terms, win rate, learning rate, seconds.
        stopped: Why training ended, where a rule could end it.
        warnings: What stood in for a retain set, what was found in one, what was not trained on, what rounding drops,
            and what a method says of itself.
    """

    model: Any
    log: list[dict[str, float]]
    warnings: list[str] = dataclasses.field(default_factory=list)
    stopped: Stopped | None = None


def unlearn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Data = (),
    retain: Data | None = None,
    objective: str | Mapping[str, Any] | Objective = DEFAULT_OBJECTIVE,
    optimizer: str | Mapping[str, Any] | OptimizerSpec = DEFAULT_OPTIMIZER,
    method: str | Mapping[str, Any] | Method | None = None,
    training: TrainingSpec | Mapping[str, Any] | None = None,
    stop: str | Mapping[str, Any] | StopSpec | None = None,
    refusals: Sequence[str] | str | Path | None = None,
    data: DataSpec | Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> UnlearnResult:
    """Make ``model`` forget one set and keep another, in place.

    Args:
        model: A Hugging Face causal language model (or a PEFT model: then only the adapter changes).
        tokenizer: Its tokenizer; ``input_prompt`` changes it in place.
        forget: What to forget: a file, a hub dataset, or examples (:class:`soul.Example`, or mappings with the columns
            that files have: question and answer, prompt and response, messages ...).
        retain: What to keep, likewise. Where it is needed and left out, samples of the model and everyday requests
            stand in.
        objective: Name, ``{"name": ..., setting: ...}``, or an instance.
        optimizer: Likewise.
        method: Likewise, e.g. ``"influence"``; it takes the place of objective, optimizer and training loop.
        training: Length, batch size, precision, seed; ``save_steps`` is not looked at, since a model in memory has no
            run directory to go on from (:func:`soul.run.execute` has).
        stop: ``"forgotten"`` ends training when it has forgotten or has spent its budget of KL
            (:class:`soul.stopping.StopSpec`, whose settings may be given as a mapping); by default it takes all steps.
        refusals: Phrasings for ``po`` and ``dpo``, or a text file with one a line; the built-in ones by default.
        data: How to stand in for a retain set and what to do about one that holds what is to be forgotten
            (:class:`soul.recipe.DataSpec`; its sources are not looked at).
        callbacks: ``transformers`` callbacks.

    Raises:
        ValueError: Unknown names or settings, missing data, or the same item in both sets.

    Example:
        >>> result = soul.unlearn(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl")  # doctest: +SKIP
        >>> result.log[-1]["step_length"]  # doctest: +SKIP
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model must be a loaded model, not {model!r:.80}: load it with soul.load_model({model!r:.80})"
        )
    loss, rule = objective, optimizer
    if not isinstance(loss, Objective):
        loss = config.component(OBJECTIVES, loss, DEFAULT_OBJECTIVE)
    if not isinstance(rule, OptimizerSpec):
        rule = config.component(OPTIMIZERS, rule, DEFAULT_OPTIMIZER)
    settings = (
        training if isinstance(training, TrainingSpec) else config.parse(TrainingSpec, training or {}, "training")
    )
    settings = dataclasses.replace(settings, save_steps=0)  # nothing could go on from its folder, which ends with it
    ways = data if isinstance(data, DataSpec) else config.parse(DataSpec, data or {}, "data")
    do = method if method is None or isinstance(method, Method) else config.component(METHODS, method, "")
    rests = stop if isinstance(stop, StopSpec) else config.parse(StopSpec, _stop_tree(stop), "stop")
    recipe = Recipe(objective=loss, optimizer=rule, method=do, training=settings, stop=rests)
    sets, warnings = _sets(model, tokenizer, forget, retain, ways, recipe)
    rounds = any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    warnings += [*precision_warnings(recipe, rounds=rounds), *forget_warnings(sets[0])]
    phrasings = read_refusals(str(refusals)) if isinstance(refusals, (str, Path)) else refusals or builtin_refusals()
    dataset = make_dataset(tokenizer, *sets, do or loss, settings, phrasings)
    warnings += training_cuts({name: [row.lost for row in rows] for name, rows in dataset.encoded.items()})
    if do is not None:
        records: list[dict[str, float]] = []
        result = do(model, dataset, log=lambda record: records.append(dict(record)))
        check_weights(result)
        return UnlearnResult(result, records, [*warnings, *do.warnings()])
    log = LogCallback(None)
    with left_as_it_was(model), tempfile.TemporaryDirectory() as folder:
        device = next(model.parameters()).device.type
        trainer = UnlearnTrainer(
            model,
            settings.arguments(folder, device),
            dataset=dataset,
            objective=loss,
            optimizer=rule,
            training=settings,
            stop=rests,
            callbacks=[log, *callbacks],
        )
        log.trainer = trainer
        trainer.train()
        model = trainer.whole_model()
    check_weights(model)
    return UnlearnResult(model, log.records, warnings, trainer.stopping.stopped if trainer.stopping else None)


def _stop_tree(stop: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {"when": stop} if isinstance(stop, str) else stop or {}


def _sets(
    model: Any, tokenizer: PreTrainedTokenizerBase, forget: Data, retain: Data | None, ways: DataSpec, recipe: Recipe
) -> tuple[tuple[list[Example], list[Example]], list[str]]:
    """Return the two sets, and what there is to say of them."""
    lost, kept = _examples(forget, "forget"), _examples(() if retain is None else retain, "retain")
    if ways.overlap != "drop":
        check_disjoint(lost, kept)
    found = find_overlaps(lost, kept, ways.overlap, copied=ways.copied, alike=ways.alike, encoder=ways.encoder)
    kept, warnings = without_overlaps(kept, found), [found.summary()] if found.pairs else []
    given = dataclasses.replace(ways, forget="forget" if lost else "", retain="" if retain is None else "retain")
    if dataclasses.replace(recipe, data=given).needs_anchors:
        training = recipe.training
        anchors = stand_in(
            model, tokenizer, lost, ways.anchors, ways.samples, seed=training.seed, max_length=training.max_length
        )
        kept, warnings = anchors.examples, [anchors.summary()]
    return (lost, kept), warnings


def _examples(data: Data, what: str) -> list[Example]:
    if isinstance(data, (str, Path)):
        return load_examples(data)
    result: list[Example] = []
    for i, item in enumerate(data):
        if isinstance(item, Example):
            result.append(item)
        elif isinstance(item, Mapping):
            found = to_examples(item, f"{what}[{i}]")
            names = [str(i)] if len(found) == 1 else [f"{i}, answer {n}" for n in range(1, len(found) + 1)]
            result += [e if e.id else dataclasses.replace(e, id=name) for e, name in zip(found, names, strict=True)]
        else:
            raise ValueError(
                f"{what}[{i}] must be a soul.Example or a mapping such as question and answer, not {item!r}"
            )
    return result
