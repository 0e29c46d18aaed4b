"""A run directory: whose it is, what it holds, and how that is written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from soul import config
from soul.benchmarks.base import Benchmark
from soul.evaluate import EvaluationSpec
from soul.machine import environment
from soul.models import ModelSpec
from soul.recipe import Recipe, recipe_from_tree
from soul.types import Score

_RESULTS = ("checkpoints", "log.jsonl", "model", "record.json", "scores.json")


def check_folder(out: Path, recipe: Recipe) -> None:
    """Make sure that ``out`` can take this recipe's run, or go on with it; a folder without results is free.

    Raises:
        ValueError: The folder cannot be written, or holds the results of another recipe, or of no run at all.
    """
    _make(out)
    file = out / "recipe.yaml"
    found = [name for name in _RESULTS if (out / name).exists()]
    if not file.is_file():
        if found:
            raise ValueError(
                f"{out} holds {', '.join(found)} but no recipe.yaml, so it is no run: choose another --out"
            )
    elif found or (out / "rows").exists():
        other = _difference(file, recipe)
        if other:
            raise ValueError(f"{out} holds a run of another recipe{other}: choose another --out, or delete that folder")


def claim_folder(out: Path, recipe: Recipe) -> None:
    """Write the recipe into a folder that :func:`check_folder` found fit."""
    text = config.dump(recipe)
    if not (out / "recipe.yaml").is_file() or _difference(out / "recipe.yaml", recipe):
        (out / "recipe.yaml").write_text(text, encoding="utf-8")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error


def _difference(file: Path, recipe: Recipe) -> str:
    """Say in what the recipe in ``file`` differs, or return an empty text where it means the same."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        earlier = config.flat(recipe_from_tree(tree))  # settings that it does not name have their defaults
    except (ValueError, OSError, yaml.YAMLError, AttributeError, TypeError):
        return " (which cannot be read)"
    now = config.flat(recipe)
    for key in [*now, *earlier]:
        if now.get(key) != earlier.get(key):
            return f" ({key} was {earlier.get(key)!r} there and is {now.get(key)!r} now)"
    return ""


def last_checkpoint(folder: Path) -> str | None:
    """Return the checkpoint of the latest step; one that a kill cut short lacks its state, which is written last."""
    steps: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            steps[int(json.loads(state.read_text(encoding="utf-8"))["global_step"])] = state.parent
    return str(steps[max(steps)]) if steps else None


def claim_evaluation(out: Path, model: ModelSpec, benchmark: Benchmark, evaluation: EvaluationSpec) -> None:
    """Take a folder for an evaluation, or go on with the one that it holds.

    Raises:
        ValueError: The folder cannot be written, holds another evaluation, or one of what the model was earlier.
    """
    _make(out)
    file = out / "recipe.yaml"
    # a definition that changed would otherwise join rows measured by the old one
    version = f"{benchmark.name} {benchmark.version}"
    text = config.dump({"model": model, "benchmark": benchmark, "evaluation": evaluation, "version": version})
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{out} holds another evaluation, or one by another version than {version}: choose another --out, or "
            "delete that folder"
        )
    if file.is_file() and any(w.stat().st_mtime > file.stat().st_mtime for w in _weights(Path(model.path))):
        raise ValueError(
            f"{model.path} was changed after {out} measured it: choose another --out, or delete that folder"
        )
    if not file.is_file():
        if any((out / name).exists() for name in _RESULTS):
            raise ValueError(f"{out} holds other things: choose another --out")
        file.write_text(text, encoding="utf-8")


def _weights(model: Path) -> list[Path]:
    return [*model.glob("*.safetensors"), *model.glob("model/*.safetensors"), *([model] if model.is_file() else [])]


def write_evaluation(
    out: Path,
    model: str,
    benchmark: Benchmark,
    scores: Sequence[Score],
    *,
    left_out: Mapping[str, str] | None = None,
    versions: Mapping[str, Any] | None = None,
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
    """
    here = environment()
    record = {
        "format": 2,
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "settings": config.plain(benchmark),
        "after": [score_dict(s) for s in scores],
        "left_out": dict(left_out or {}),
        **({"versions": dict(versions)} if versions else {}),
        "environment": here,
    }
    write_json(out / "scores.json", record)
    write_json(out / "environment.json", here)
    label = f"{model} on {benchmark.name}"
    notes = [f"not measured: {part} ({reason})" for part, reason in (left_out or {}).items()]
    about = {"label": label, "asked": f"Measure {label}.", "model": model, "warnings": notes}
    write_json(out / "record.json", {"format": 1, **about})


def add_scores(out: Path, name: str, scores: Sequence[Score]) -> None:
    """Add scores of the same examples, measured in another precision, to the record of an evaluation."""
    record = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    write_json(out / "scores.json", {**record, name: [score_dict(s) for s in scores]})


def score_dict(score: Score) -> dict[str, Any]:
    """Return a score as plain values; nan and infinities become None, which JSON has a word for."""
    values = dataclasses.asdict(score)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)
