"""Reads a run directory into one validated value; writes nothing."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from soul.stored import check_format
from soul.strict import json_objects, json_value, number_fault, read_number, read_text
from soul.types import Row, Score


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition that the run was asked to meet, whether it did, and what was measured, if recorded."""

    name: str
    passed: bool
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """All that a run left behind, except its weights.

    Attributes:
        label: Short name of the run.
        asked: What was to be forgotten, in words.
        objective: Name of the objective.
        optimizer: Name of the optimizer.
        method: Name of the method that took the place of both.
        model: Name of the model.
        steps: Optimizer steps taken, if recorded.
        seconds: Wall-clock seconds of each phase.
        peak_memory_bytes: Largest memory in use, if recorded.
        stopped: Why its training ended, in a sentence, where a rule could end it.
        warnings: What the run wanted its reader to know.
        checks: Conditions and their outcome.
        n_forget: Items to forget, if recorded.
        n_retain: Items to keep, if recorded.
        recipe: The resolved recipe, verbatim; empty if absent.
        environment: Versions, machine and command.
        log: One mapping a step, ordered by step; only its numbers.
        before: Scores of the model as it came, empty if not measured.
        after: Scores of the unlearned model, empty if not measured.
        rows_before: Measured examples of each split, before.
        rows_after: The same examples, after.
        measured: What the scores are of: the benchmark, the version of its definition, its settings; empty where an
            older record does not say.
    """

    label: str
    asked: str = ""
    objective: str = ""
    optimizer: str = ""
    method: str = ""
    model: str = ""
    steps: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int | None = None
    stopped: str = ""
    warnings: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    n_forget: int | None = None
    n_retain: int | None = None
    recipe: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    log: tuple[Mapping[str, float], ...] = ()
    before: tuple[Score, ...] = ()
    after: tuple[Score, ...] = ()
    rows_before: Mapping[str, tuple[Row, ...]] = dataclasses.field(default_factory=dict)
    rows_after: Mapping[str, tuple[Row, ...]] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_run(path: Path | str) -> RunRecord:
    """Return what the run directory ``path`` records.

    Only ``record.json`` must exist; a run that only evaluated has no log and one set of scores.

    Raises:
        ValueError: If ``path`` is not a run directory or a file in it is broken.

    Example:
        >>> read_run("nowhere")
        Traceback (most recent call last):
        ValueError: nowhere is not a run directory: there is no such folder
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is not a run directory: there is no such folder")
    if not (root / "record.json").is_file():
        raise ValueError(f"{root} is not a run directory: it has no record.json")
    before, after, unknown, measured = _read_scores(root / "scores.json")
    rows_before, rows_after = (_read_rows(root / "rows" / stage) for stage in ("before", "after"))
    for split in rows_before.keys() & rows_after.keys():
        if [row["id"] for row in rows_before[split]] != [row["id"] for row in rows_after[split]]:
            raise ValueError(f"{root}: rows/before/{split}.jsonl and rows/after/{split}.jsonl hold different examples")
    recipe = root / "recipe.yaml"
    fields = _read_record(root / "record.json", default_label=root.resolve().name)
    fields["warnings"] += unknown
    return RunRecord(
        **fields,
        recipe=read_text(recipe) if recipe.is_file() else "",
        environment=_read_environment(root / "environment.json"),
        log=_read_log(root / "log.jsonl"),
        before=before,
        after=after,
        rows_before=rows_before,
        rows_after=rows_after,
        measured=measured,
    )


def read_runs(paths: Sequence[Path | str]) -> list[RunRecord]:
    """Return records that are read side by side.

    Runs of one name are told apart by their folders. Where scores are of another benchmark, version or settings than
    the first run's, a warning says so: a name in the head of a column may mean two things.

    Raises:
        ValueError: As :func:`read_run`.
    """
    runs = [read_run(path) for path in paths]
    names = collections.Counter(run.label for run in runs)
    found = []
    for path, run in zip(paths, runs, strict=True):
        label = f"{run.label} ({Path(path).resolve().name})" if names[run.label] > 1 else run.label
        apart = _apart(runs[0].measured, run.measured)
        said = f"not measured as the first run was ({'; '.join(apart)}): numbers in one column do not compare"
        found.append(dataclasses.replace(run, label=label, warnings=run.warnings + ((said,) if apart else ())))
    return found


def _apart(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return how two sets of scores were measured otherwise, in words; nothing where a record does not say."""
    if not (first and other):
        return []
    flat = [{**{k: v for k, v in m.items() if k != "settings"}, **m.get("settings", {})} for m in (first, other)]
    names = ["benchmark"] if flat[0].get("benchmark") != flat[1].get("benchmark") else list(flat[0] | flat[1])
    return [
        f"{name} {flat[1].get(name)!s:.60}, there {flat[0].get(name)!s:.60}"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _parse(text: str, where: str) -> dict[str, Any]:
    value = json_value(text, where, lenient=True)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold an object, not {type(value).__name__}")
    return value


def _get(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any, where: str) -> Any:
    """Return ``data[key]``, or ``default`` where it is absent or null."""
    value = data.get(key)
    if value is None:
        return default
    # True is an int to Python, never to the person who wrote the record
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise ValueError(f"{where}: {key} must be {expected}, not {value!r:.80}")
    _check_size(value, key, where)
    return value


def _check_size(value: Any, key: str, where: str) -> None:
    if isinstance(value, int) and number_fault(value):
        raise ValueError(f"{where}: {key:.60} {number_fault(value)} ({value!r:.40})")


def _number(data: Mapping[str, Any], key: str, where: str, default: float = math.nan) -> float:
    """Return a float, which may be nan or infinite (:func:`soul.strict.plain_number`); null stands for the default."""
    value = data.get(key)
    found = read_number(value) if isinstance(value, str) else value
    return float(_get({key: found}, key, (int, float), default, where))


def _read_record(path: Path, default_label: str) -> dict[str, Any]:
    data, where = _parse(read_text(path), str(path)), str(path)
    check_format("record", data, path)
    fields: dict[str, Any] = {"label": _get(data, "label", str, "", where).strip() or default_label}
    for key in ("asked", "objective", "optimizer", "method", "model"):
        fields[key] = _get(data, key, str, "", where)
    for key in ("steps", "peak_memory_bytes", "n_forget", "n_retain"):
        fields[key] = _get(data, key, int, None, where)
    seconds = _get(data, "seconds", dict, {}, where)
    fields["seconds"] = {phase: _number(seconds, phase, f"{where}: seconds") for phase in seconds}
    stopped = _get(data, "stopped", dict, {}, where)
    fields["stopped"] = _get(stopped, "sentence", str, "", f"{where}: stopped")
    fields["warnings"] = tuple(str(item) for item in _get(data, "warnings", list, [], where))
    fields["checks"] = tuple(_check(item, where) for item in _get(data, "checks", list, [], where))
    return fields


def _check(item: object, where: str) -> Check:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not isinstance(item.get("passed"), bool):
        raise ValueError(f"{where}: a check needs a name and passed (true or false), not {item!r:.80}")
    value = None if item.get("value") is None else _number(item, "value", f"{where}: check {item['name']}")
    return Check(item["name"], item["passed"], value)


def _read_environment(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    data = _parse(read_text(path), str(path))
    check_format("environment", data, path)
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        for key, value in data.items()
        if key != "format"
    }


def _read_log(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    steps: dict[int, dict[str, float]] = {}
    for where, line in json_objects(path, lenient=True):
        step = _get(line, "step", int, None, where)
        if step is None:
            raise ValueError(f"{where} has no step")
        for key, value in line.items():
            _check_size(value, key, where)
        numbers = {
            key: math.nan if value is None else float(value)
            for key, value in line.items()
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        }
        steps[step] = numbers  # a resumed run may write a step twice; what it did last is what counts
    return tuple(steps[step] for step in sorted(steps))


def _read_scores(path: Path) -> tuple[tuple[Score, ...], tuple[Score, ...], tuple[str, ...], dict[str, Any]]:
    """Return the scores before and after, what to say of those whose value is null, and what they are scores of."""
    if not path.is_file():
        return (), (), (), {}
    data = _parse(read_text(path), str(path))
    check_format("scores", data, path)
    kept: dict[str, tuple[Score, ...]] = {}
    unknown: list[str] = []
    for stage in ("before", "after"):
        items = _get(data, stage, list, [], str(path))
        scores = [_score(item, f"{path}: {stage}") for item in items]
        seen: set[tuple[str, str]] = set()
        for score, item in zip(scores, items, strict=True):
            if (score.metric, score.split) in seen:
                raise ValueError(f"{path}: {stage} holds {score.metric} of split {score.split!r} twice")
            seen.add((score.metric, score.split))
            if item["value"] is None:
                what = f"{score.metric} on {score.split}" if score.split else score.metric
                unknown.append(f"{stage}, {what} has no value: not measured, or no finite number in an older record")
        kept[stage] = tuple(s for s, item in zip(scores, items, strict=True) if item["value"] is not None)
    kinds = {"benchmark": str, "version": int, "settings": dict}
    measured = {k: _get(data, k, kind, None, str(path)) for k, kind in kinds.items() if data.get(k) is not None}
    return kept["before"], kept["after"], tuple(unknown), measured


def _score(item: object, where: str) -> Score:
    if not isinstance(item, dict) or not isinstance(item.get("metric"), str) or "value" not in item:
        raise ValueError(f"{where}: a score needs a metric and a value, not {item!r:.80}")
    where = f"{where}: {item['metric']}"
    return Score(
        metric=item["metric"],
        split=_get(item, "split", str, "", where),
        value=_number(item, "value", where),
        n=_get(item, "n", int, 0, where),
        low=_number(item, "low", where),
        high=_number(item, "high", where),
        method=_get(item, "method", str, "none", where),
        level=_number(item, "level", where, 0.95),
        seed=_get(item, "seed", int, 0, where),
        better=_get(item, "better", str, "", where),
    )


def _read_rows(folder: Path) -> dict[str, tuple[Row, ...]]:
    if not folder.is_dir():
        return {}
    return {
        path.stem: tuple(_row(line, where) for where, line in json_objects(path, lenient=True))
        for path in sorted(folder.glob("*.jsonl"))
    }


def _row(line: dict[str, Any], where: str) -> Row:
    row = dict(line)
    for key in ("id", "prompt", "answer"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{where} needs {key}, a string")
    row["subject"] = _get(row, "subject", str, "", where)
    row["nll"] = _number(row, "nll", where)
    row["tokens"] = _get(row, "tokens", int, 0, where)
    if row.get("generated") is None:
        row.pop("generated", None)
    else:
        _get(row, "generated", str, "", where)
    if "rougeL_recall" in row:
        row["rougeL_recall"] = _number(row, "rougeL_recall", where)
    return cast(Row, row)
