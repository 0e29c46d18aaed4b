"""A run directory: whose it is, what it holds, and how that is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soul import config, processes
from soul.benchmarks.base import Benchmark
from soul.evaluate import EvaluationSpec
from soul.machine import changes, environment
from soul.models import ModelSpec
from soul.origins import ORIGINS, Origins, began_with, of_model, read_origins
from soul.recipe import Recipe, read_recipe
from soul.stored import check_format, sha256, write_json, write_text
from soul.strict import json_value, plain_number, read_text, yaml_tree
from soul.types import Score

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
_WINDOW, _REVISION = "training.accumulation", "model.revision"
_NOT_SAME = "an uninterrupted run may end with other bytes"
_OF_MODEL = ("config.json", "adapter_config.json")
_RESULTS = ("checkpoints", "log.jsonl", "model", "record.json", "scores.json")


def check_folder(out: Path, recipe: Recipe) -> None:
    """Make sure that ``out`` can take this recipe's run, or go on with it; a folder without results is free.

    Raises:
        ValueError: The folder cannot be written, or holds the results of another recipe, or of no run at all.
    """
    _make(out)
    file = out / "recipe.yaml"
    found = [name for name in _RESULTS if (out / name).exists()]
    weights = [f.name for f in sorted(out.iterdir()) if f.name in _OF_MODEL or f.suffix == ".safetensors"]
    if weights:  # whoever loads the folder would get that model, and not the one that is to come
        raise ValueError(f"{out} is a model's folder (it holds {', '.join(weights[:3])}): choose another --out")
    ours = any((out / name).is_file() for name in (ENVIRONMENT, ORIGINS))
    if not file.is_file():
        if found:
            raise ValueError(
                f"{out} holds {', '.join(found)} but no recipe.yaml, so it is no run: choose another --out"
            )
    elif not ours:  # a recipe that somebody wrote, beside whatever else is theirs
        raise ValueError(f"{out} holds a recipe.yaml that no run wrote: choose another --out")
    elif holds_results(out):
        other = _difference(file, recipe)
        if other:
            raise ValueError(f"{out} holds a run of another recipe{other}: choose another --out, or delete that folder")
        if _trained(out) and not (out / "record.json").is_file():
            _check_window(out, read_recipe(file), recipe)


def _trained(out: Path) -> bool:
    return any((out / name).exists() for name in _RESULTS)


def _renewed(earlier: Recipe, now: Recipe, *, whole: bool) -> Recipe:
    """Return the recipe a run began with, with what may have been set anew; all of it where nothing was trained."""
    if whole:
        return dataclasses.replace(now, model=dataclasses.replace(now.model, revision=earlier.model.revision))
    batches = {name: getattr(now.evaluation, name) for name in ("generation_batch", "max_tokens")}
    return dataclasses.replace(
        earlier,
        label=now.label,
        reference_run=now.reference_run,
        evaluation=dataclasses.replace(earlier.evaluation, **batches),
        training=dataclasses.replace(earlier.training, save_steps=now.training.save_steps),
    )


def holds_results(out: Path) -> bool:
    """Say whether a run in ``out`` has measured or trained anything yet."""
    return any((out / name).exists() for name in (*_RESULTS, "rows"))


def claim_folder(out: Path, recipe: Recipe) -> None:
    """Write the recipe into a folder that :func:`check_folder` found fit."""
    text, file = config.dump(recipe), out / "recipe.yaml"
    if not file.is_file() or _difference(file, recipe):
        (out / ENVIRONMENT).unlink(missing_ok=True)
        write_text(file, text)
    elif config.dump(read_recipe(file)) != text:
        if not _trained(out):
            (out / ENVIRONMENT).unlink(missing_ok=True)  # with it, how many processes the steps were divided over
        write_text(file, config.dump(_renewed(read_recipe(file), recipe, whole=not _trained(out))))
    note_environment(out)


def note_environment(out: Path) -> None:
    """Write down what is at work here, the first time, and where it goes on under other conditions; warn of these."""
    file, now = out / ENVIRONMENT, environment()
    first = _environment(file)
    if not first:
        write_json(file, {"format": 1, **now})
        return
    later = first.get("later", [])
    if not all(changes(earlier, now) for earlier in (first, *later)):  # known already
        return
    write_json(file, {**first, "later": [*later, now]})
    log.warning("%s goes on under other conditions (%s): %s", out, changes([first, *later][-1], now), _NOT_SAME)


def environment_warnings(out: Path) -> list[str]:
    """Say under what other conditions than the first a run in ``out`` went on."""
    first = _environment(out / ENVIRONMENT)
    steps = [first, *first.get("later", [])]
    found = [changes(earlier, now) for earlier, now in itertools.pairwise(steps)]
    return [f"it went on under other conditions ({change}): {_NOT_SAME}" for change in found if change]


def _environment(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found.get("later", [])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and what went before is not compared") from error
    check_format("environment", found, file)
    return found


def _check_window(out: Path, earlier: Recipe, now: Recipe) -> None:
    """Make sure that a run goes on with as many examples in a step as it began with."""
    begun, here = _environment(out / ENVIRONMENT).get("processes", 1), processes.count()
    window = earlier.training.accumulation * begun
    if window != now.training.accumulation * here:
        fitting = f"set training.accumulation to {window // here}" if window % here == 0 else "choose another number"
        raise ValueError(
            f"{out} was begun in {begun} processes with training.accumulation {earlier.training.accumulation}, and "
            f"here are {here} with {now.training.accumulation}: its steps would have other examples; {fitting}"
        )


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error


_FREE = ("label", "reference_run", "evaluation.generation_batch", "evaluation.max_tokens", "training.save_steps")
"""What changes neither a model nor a row: it may be set anew until a run is finished."""
_BEFORE = ("model", "data", "benchmark", "evaluation")
"""What rows that were measured before training are of; the rest may be another while there are only these."""


def _difference(file: Path, recipe: Recipe) -> str:
    """Say in what the recipe in ``file`` differs, or return an empty text where it means the same.

    Of a run that has only been measured so far, how it will train is left aside; until it is finished, what changes no
    number. Accumulation is left aside: with another number of processes another one means the same. So does the commit
    that a run began with, in place of what its recipe names.
    """
    try:
        earlier = config.flat(read_recipe(file))  # settings not named there have their defaults
    except ValueError:
        return " (which cannot be read)"
    now = config.flat(recipe)
    out = file.parent
    trained = _trained(out)
    finished = all((out / name).is_file() for name in ("record.json", "scores.json"))
    for key in [*now, *earlier]:
        if (key in _FREE and not finished) or (not trained and key.split(".")[0] not in _BEFORE):
            continue
        if key == _REVISION and began_with(file.parent, recipe.model.revision):
            continue
        if now.get(key) != earlier.get(key) and key != _WINDOW:
            return f" ({key} was {earlier.get(key)!r} there and is {now.get(key)!r} now)"
    return ""


def claim_evaluation(
    out: Path, model: ModelSpec, benchmark: Benchmark, evaluation: EvaluationSpec, commit: str = ""
) -> None:
    """Take a folder for an evaluation, or go on with the one that it holds.

    Args:
        out: The folder.
        model: What is measured.
        benchmark: By what.
        evaluation: How.
        commit: The hub's commit of the model as loaded, where it came from there.

    Raises:
        ValueError: The folder cannot be written, holds another evaluation, or one of what the model was earlier.
    """
    _make(out)
    file = out / "recipe.yaml"
    # a definition that changed would otherwise join rows measured by the old one
    version = f"{benchmark.name} {benchmark.version}"
    tree = {"model": model, "benchmark": benchmark, "evaluation": evaluation, "version": version}
    if file.is_file() and not _same_evaluation(file, tree):
        raise ValueError(
            f"{out} holds another evaluation, or one by another version than {version}: choose another --out, or "
            "delete that folder"
        )
    earlier = read_origins(out)
    origins = Origins(model=of_model(model.path, earlier), commit=commit)
    if file.is_file():
        origins.check(out, {"model": model.path})
        changed = max((mark["modified"] for mark in origins.model.values()), default=0)
        if earlier is None and changed > file.stat().st_mtime_ns:  # by an earlier version, which kept no digests
            raise ValueError(
                f"{model.path} was changed after {out} measured it: choose another --out, or delete that folder"
            )
    else:
        if any((out / name).exists() for name in _RESULTS):
            raise ValueError(f"{out} holds other things: choose another --out")
        origins.write(out)
        write_text(file, config.dump(tree))
    note_environment(out)


def _same_evaluation(file: Path, tree: Mapping[str, Any]) -> bool:
    """Say whether a file holds the same evaluation; settings of the model that are not named there have defaults."""
    text = read_text(file)
    if text == config.dump(tree):
        return True
    try:
        earlier = yaml_tree(text, str(file))
        model = config.parse(ModelSpec, earlier["model"], "model")
    except (ValueError, KeyError, TypeError):
        return False
    if began_with(file.parent, tree["model"].revision):
        model = dataclasses.replace(model, revision=tree["model"].revision)
    return _of_numbers({**earlier, "model": model}) == _of_numbers(tree)


def _of_numbers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's settings without those that change no number."""
    return {key: value for key, value in config.flat(config.plain(tree)).items() if key not in _FREE}


_BOUND = ("recipe.yaml", "scores.json", "rows/*/*.jsonl")
"""What a finished run's record vouches for, beside itself."""


def file_digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of what a run's report is made of, by name, for ``record.json``."""
    found = sorted(file for pattern in _BOUND for file in out.glob(pattern))
    return {str(file.relative_to(out)): sha256(file) for file in found}


def changed_files(out: Path) -> list[str]:
    """Return the files of a finished run that are gone or not what they were; none of a run that kept no digests."""
    record = json_value(read_text(out / "record.json"), str(out / "record.json"), lenient=True)
    kept = record.get("files", {}) if isinstance(record, dict) else {}
    if not isinstance(kept, dict):
        return ["record.json"]
    return [name for name, was in kept.items() if not (out / name).is_file() or sha256(out / name) != was]


def write_evaluation(
    out: Path,
    model: str,
    benchmark: Benchmark,
    scores: Sequence[Score],
    *,
    left_out: Mapping[str, str] | None = None,
    versions: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the record of an evaluation, which reports read like that of a run.

    ``scores.json`` says by itself what was measured: the benchmark, the version of its definition, its settings, what
    was left out and why, and on what machine.

    Args:
        out: The folder.
        model: Name of the model.
        benchmark: What was measured.
        scores: Its scores, of fp32 weights unless the recipe says otherwise.
        left_out: Parts that could not be measured, and why.
        versions: Versions of what another library measured, by split.
        warnings: What else a reader should know.
    """
    here = environment()
    record = {
        "format": 2,
        **measured_by(benchmark),
        "after": [score_dict(s) for s in scores],
        "left_out": dict(left_out or {}),
        **({"versions": dict(versions)} if versions else {}),
        "environment": here,
    }
    write_json(out / "scores.json", record)
    label = f"{model} on {benchmark.name}"
    notes = [f"not measured: {part} ({reason})" for part, reason in (left_out or {}).items()]
    notes += [*warnings, *environment_warnings(out)]
    about = {"label": label, "asked": f"Measure {label}.", "model": model, "warnings": notes}
    write_json(out / "record.json", {"format": 1, **about})


def measured_by(benchmark: Benchmark) -> dict[str, Any]:
    """Return what scores are scores of: the benchmark, the version of its definition, and its settings."""
    return {"benchmark": benchmark.name, "version": benchmark.version, "settings": config.plain(benchmark)}


def add_scores(out: Path, name: str, scores: Sequence[Score]) -> None:
    """Add scores of the same examples, measured in another precision, to the record of an evaluation."""
    record = json_value(read_text(out / "scores.json"), str(out / "scores.json"), lenient=True)
    write_json(out / "scores.json", {**record, name: [score_dict(s) for s in scores]})


def score_dict(score: Score) -> dict[str, Any]:
    """Return a score as plain values: nan and infinities as :func:`soul.strict.plain_number`, no interval as None."""
    values = {k: plain_number(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(score).items()}
    return values | {k: None for k in ("low", "high") if math.isnan(getattr(score, k))}
