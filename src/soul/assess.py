"""Measures a model on one benchmark or several, and leaves a record of each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from soul import config, processes
from soul.benchmarks.base import Benchmark, Measures, Rows
from soul.cautions import prompt_warnings
from soul.evaluate import EvaluationSpec, measure
from soul.folderlock import alone_in
from soul.models import OFFLINE, ModelSpec, load_model
from soul.origins import commit_of, read_origins
from soul.registry import BENCHMARKS
from soul.report.card import HIDDEN, hidden, unnamed
from soul.run import read_reference
from soul.rundir import add_scores, claim_evaluation, write_evaluation
from soul.stored import write_json, write_lines, write_text
from soul.truncation import truncation_warnings
from soul.types import Example

ALL = "all"
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark with its data loaded.

    Attributes:
        benchmark: What to measure.
        splits: Its examples.
        left_out: What of it cannot be measured, by part, and why.
    """

    benchmark: Benchmark
    splits: Mapping[str, Sequence[Example]]
    left_out: Mapping[str, str]


def prepare(names: Sequence[str], settings: Sequence[str], data: str = "") -> tuple[list[Task], dict[str, str]]:
    """Load the benchmarks asked for.

    Args:
        names: Names of benchmarks; ``"all"`` stands for every one whose data can be had.
        settings: ``key=value`` of a single benchmark; ``name.key=value`` where there are several.
        data: A folder that may hold local copies, where each benchmark says that it looks (``Benchmark.local``).

    Returns:
        What can be measured; and, where all were asked for, which benchmarks cannot, and why.

    Raises:
        ValueError: An unknown benchmark or setting, no such folder, or a benchmark named cannot be measured.

    Example:
        >>> prepare(["all"], ["tofu.forget=forget01"], "../data")  # doctest: +SKIP
    """
    folder = Path(data).expanduser() if data else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--data: there is no folder {data!r}")
    wanted = list(dict.fromkeys(names))
    everything = ALL in wanted
    known = BENCHMARKS.names() if everything else wanted
    own = _settings_of(known, settings)
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name in known:
        try:
            benchmark = build(name, own[name], folder)
            task = Task(benchmark, benchmark.splits(), benchmark.missing())
            if isinstance(benchmark, Measures):
                _check_parts(task)
            tasks.append(task)
        except ValueError as error:
            if not everything or own[name] or name in wanted:
                raise
            left_out[name] = str(error)
    if not tasks:
        raise ValueError("no benchmark can be measured. " + " ".join(f"{k}: {v}." for k, v in left_out.items()))
    return tasks, left_out


def build(name: str, settings: Sequence[str], folder: Path | None = None) -> Benchmark:
    """Return a benchmark from ``key=value`` settings; sources not given are taken from ``folder`` where it has them.

    Raises:
        ValueError: An unknown name or setting, or a value that is not allowed.
    """
    cls: Any = BENCHMARKS.get(name)
    tree = config.override({"name": name}, settings)
    if folder is not None:
        given = {f.name: tree.get(f.name, f.default) for f in dataclasses.fields(cls)}
        for key, path in cls.local.items():
            place = folder / path.format_map(given)
            if key not in tree and place.exists():
                tree[key] = str(place)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    absent = [key for key in required if key not in tree]
    if absent:
        raise ValueError(f"the {name} benchmark needs {', '.join(f'{key}=...' for key in absent)}")
    return config.component(BENCHMARKS, tree, name)


def _settings_of(names: Sequence[str], settings: Sequence[str]) -> dict[str, list[str]]:
    """Give each benchmark its settings: those with its name before them, and, where it is alone, all others."""
    own: dict[str, list[str]] = {name: [] for name in names}
    for setting in settings:
        head, dot, rest = setting.partition(".")
        if dot and head in own and "=" not in head:
            own[head].append(rest)
        elif len(names) == 1:
            own[names[0]].append(setting)
        else:
            raise ValueError(
                f"{setting!r} could be meant for any of {', '.join(names)}: write NAME.{setting}, e.g. "
                f"{names[0]}.{setting}"
            )
    return own


def _check_parts(task: Task) -> None:
    """Raise where all that a benchmark asks for is left out, which one that loads its data later would not say yet."""
    asked = getattr(task.benchmark, "asked", tuple)()
    if asked and set(asked) <= set(task.left_out):
        raise ValueError(". ".join(dict.fromkeys(task.left_out.values())))


@dataclasses.dataclass(frozen=True)
class Assessment:
    """How to measure.

    Attributes:
        model: The model; published scores are those of fp32 weights.
        evaluation: Batch sizes and lengths.
        reference: Run of a retained model, or the folder of an assessment that holds one for each benchmark.
        precision: ``"bfloat16"`` measures again with weights in bf16 and records the difference.
        publish: Also write what others may read, without texts that are private (:meth:`Benchmark.public_rows`).
    """

    model: ModelSpec
    evaluation: EvaluationSpec = dataclasses.field(default_factory=EvaluationSpec)
    reference: str = ""
    precision: str = ""
    publish: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("", "bfloat16"):
            raise ValueError(f"--precision must be bfloat16, or left out; got {self.precision!r}")
        if self.reference and not [
            *Path(self.reference).glob("rows/after"),
            *Path(self.reference).glob("*/rows/after"),
        ]:
            read_reference(self.reference)  # says what a reference is
        if self.precision and self.model.dtype != "float32":
            raise ValueError(
                "--precision compares with fp32, so model.dtype must stay float32: leave one of the two out"
            )

    def __call__(
        self, tasks: Sequence[Task], out: Path, progress: Progress | None = None, *, keep_going: bool = False
    ) -> tuple[list[Path], dict[str, str]]:
        """Measure, and write a record of each benchmark as it is done.

        The same call goes on where it was interrupted: splits that are done are read back.

        Args:
            tasks: What to measure, see :func:`prepare`.
            out: The record's folder; with several benchmarks, that of a folder for each.
            progress: Called with (what, done, of).
            keep_going: Leave out a benchmark that turns out not to be measurable, rather than stop.

        Returns:
            The folders of the records; and what was left out on the way, and why.

        Raises:
            ValueError: The model cannot be loaded, a folder holds another evaluation, the reference does not fit, or
                nothing could be measured.
        """
        several = len(tasks) > 1
        references = {t.benchmark.name: self._reference(t.benchmark.name, several) for t in tasks}
        folders = {t.benchmark.name: out / t.benchmark.name if several else out for t in tasks}
        with contextlib.ExitStack() as held:
            for folder in folders.values():
                held.enter_context(alone_in(folder))
            return self._assess(tasks, folders, references, progress, keep_going=keep_going)

    def _assess(
        self,
        tasks: Sequence[Task],
        folders: Mapping[str, Path],
        references: Mapping[str, Rows | None],
        progress: Progress | None,
        *,
        keep_going: bool,
    ) -> tuple[list[Path], dict[str, str]]:
        loaded = load_model(self.model)
        for task in tasks:
            folder = folders[task.benchmark.name]
            what = (self.model, task.benchmark, self.evaluation, commit_of(loaded[0]))
            claim = functools.partial(claim_evaluation, folder, *what)
            processes.from_main(claim)
        failed: dict[str, str] = {}

        def each(precision: str, pair: Any) -> None:
            for task in tasks:
                name = task.benchmark.name
                try:
                    if name not in failed:
                        self._record(task, pair, folders[name], references[name], precision, progress)
                except ValueError as error:
                    if not keep_going:
                        raise
                    failed[name] = str(error)

        each("", loaded)
        if self.precision:
            del loaded
            gc.collect()  # two copies of the weights may be one too many
            each(self.precision, load_model(dataclasses.replace(self.model, dtype="bfloat16")))
        done = [folder for name, folder in folders.items() if name not in failed]
        if not done:
            raise ValueError("no benchmark could be measured. " + " ".join(f"{k}: {v}." for k, v in failed.items()))
        return done, failed

    def _record(
        self,
        task: Task,
        loaded: tuple[Any, Any],
        folder: Path,
        reference: Rows | None,
        precision: str,
        progress: Progress | None,
    ) -> None:
        """Measure one benchmark and write its record; in another precision, add to the record that is there."""
        rows = self._measure(task, *loaded, folder / f"rows/{precision or 'after'}", progress)
        said = prompt_warnings(loaded[1])
        processes.from_main(lambda: self._write(task, rows, folder, reference, precision, said))

    def _write(
        self, task: Task, rows: Rows, folder: Path, reference: Rows | None, precision: str, said: list[str]
    ) -> None:
        benchmark = task.benchmark
        scores = benchmark.score(rows, reference)
        if precision:
            add_scores(folder, precision, scores)
        else:
            left_out = dict(task.left_out)
            if self.reference and reference is None:
                left_out["reference"] = f"{self.reference} holds no {benchmark.name}"
            model = self.model.path
            about = {"left_out": left_out, "versions": _versions(rows), "warnings": [*said, *truncation_warnings(rows)]}
            write_evaluation(folder, model, benchmark, scores, **about)
        if self.publish:
            _publish(benchmark, rows, folder, keep=bool(precision))

    def _measure(self, task: Task, model: Any, tokenizer: Any, folder: Path, progress: Progress | None) -> Rows:
        name = task.benchmark.name
        tick = None if progress is None else lambda what, done, of: progress(f"{name}, {what}", done, of)
        return measure(
            task.benchmark,
            model,
            tokenizer,
            splits=task.splits,
            spec=self.evaluation,
            folder=folder,
            progress=tick,
        )

    def _reference(self, name: str, several: bool) -> Rows | None:
        """Return the rows of the retained model on one benchmark; None where an assessment has none of it."""
        folder = Path(self.reference)
        if self.reference and (folder / name / "rows/after").is_dir():
            return read_reference(str(folder / name))
        if several and self.reference and not (folder / "rows/after").is_dir():
            return None
        if several and self.reference:
            raise ValueError(
                f"{self.reference} is one evaluation, and several benchmarks were asked for: give the folder of an "
                "evaluation of the retained model on the same benchmarks"
            )
        return read_reference(self.reference)


def _publish(benchmark: Benchmark, rows: Rows, folder: Path, *, keep: bool = False) -> None:
    """Write the record as others may read it; with ``keep``, only its scores anew."""
    public = folder / "public"
    if not keep:
        shutil.rmtree(public, ignore_errors=True)
        for split, found in benchmark.public_rows(rows).items():
            write_lines(public / f"rows/after/{split}.jsonl", found)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    model = _told(recipe["model"]["path"], folder)
    for name in ("scores.json", "environment.json", "record.json"):
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(public / name, _public(tree, private=benchmark.private_text, local=not model))
    if benchmark.private_text:
        recipe = unnamed(recipe, model)
    else:
        recipe = _unlocated({**recipe, "model": unnamed({"model": recipe["model"]}, model)["model"]})
    write_text(public / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def _told(path: str, folder: Path) -> str:
    """Return a model's path where others know it too, as a short name or a hub id; a local one may name a person."""
    origins = read_origins(folder)
    return path if path in OFFLINE or (origins and origins.commit and not origins.model) else ""


def _public(tree: dict[str, Any], *, private: bool, local: bool) -> dict[str, Any]:
    """Return a record without the command line and, where texts are private, without what settings and reasons name.

    Nor what a ``local`` model is called, or where on this machine anything is.
    """
    kept = _uncommanded(tree)
    names = (
        *(("settings", "left_out", "warnings") if private else ()),
        *(("label", "asked", "model") if local else ()),
    )
    kept |= {name: hidden(kept[name]) for name in names if name in kept}
    return {name: _unlocated(value) if name in _TOLD else value for name, value in kept.items()}


_TOLD = ("settings", "left_out", "warnings")
"""Parts of a record that may say where this machine keeps something."""


def _unlocated(value: Any) -> Any:
    """Return a tree without the texts that are, or quote, a path on this machine."""
    if isinstance(value, dict):
        return {k: _unlocated(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unlocated(v) for v in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if any(map(_is_here, (value, *value.split()))) else value


def _is_here(text: str) -> bool:
    name = text.strip("'\"(),:;").rstrip("/")
    try:
        return "/" in text and name != "" and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or of nobody's home
        return False


def _uncommanded(value: Any) -> Any:
    """Return a tree without the command lines in it: of this sitting, and of later ones that went on with it."""
    if isinstance(value, dict):
        return {k: _uncommanded(v) for k, v in value.items() if k != "command"}
    return [_uncommanded(v) for v in value] if isinstance(value, list) else value


def _versions(rows: Rows) -> dict[str, Any]:
    """Return, by split and subject, the versions that another library's rows name."""
    found: dict[str, Any] = {}
    for split, items in rows.items():
        for row in items:
            made: Any = row.get("harness")
            if made is not None:
                names = ("lm_eval", "task_version", "num_fewshot")
                found.setdefault(split, {})[row["subject"]] = {name: made[name] for name in names}
    return found
