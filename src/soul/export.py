"""From a finished run to a folder that others can load: weights, tokenizer, a card, and proof that they are its own."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from soul.benchmarks.base import Benchmark
from soul.data.guard import KEY, SYSTEM, TEMPLATE
from soul.evaluate import EvaluationSpec, evaluate, spec_for
from soul.folderlock import alone_at
from soul.intact import json_object
from soul.lineage import lineage
from soul.machine import environment
from soul.models import ModelSpec, load_model, save_model
from soul.recipe import Recipe, read_recipe
from soul.report.card import CardFacts, Checked, model_card
from soul.report.record import RunRecord, read_run
from soul.run import default_benchmark
from soul.rundir import changed_files
from soul.stored import check_format, publish, sha256, write_json, write_text, writing
from soul.strict import json_value, read_text
from soul.types import Example, Row

CARD = "README.md"
MARKER = "soul_export.json"
"""Written last: a folder that holds it was loaded and measured again."""
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What to export of a run.

    Attributes:
        dtype: Dtype of the exported weights; that of the run by default. bf16 takes half the space and rounds: by how
            much likelihoods move is measured and said.
        adapter: Export the adapter alone, of a run that kept one (``adapter.merge: false``).
        card: Write a model card.
        show_data: Let the card quote what was asked and where the data came from, which may name people.
        examples: Examples of each split to measure again; 0 for all.
        tolerance: Largest difference of a likelihood that counts as the same, in nats a token (relative above 1);
            only where run and export are both fp32.
        rounding: Largest mean difference of a split where they are not.

    Raises:
        ValueError: A number is out of range.
    """

    dtype: Literal["", "float32", "bfloat16"] = ""
    adapter: bool = False
    card: bool = True
    show_data: bool = False
    examples: int = 64
    tolerance: float = 1e-4
    rounding: float = 0.1

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ValueError(f"examples must be 0 (all) or more, not {self.examples}")
        if not (self.tolerance > 0 and self.rounding > 0):
            raise ValueError(f"tolerance and rounding must be above 0, not {self.tolerance} and {self.rounding}")


def export(run: Path, out: Path, spec: ExportSpec | None = None, *, progress: Progress | None = None) -> list[Checked]:
    """Write the model of ``run`` into ``out``, load it from there, and measure it again.

    The folder appears when its likelihoods agree with the rows that the run recorded, ``rows/after``; the same call on
    a folder of the same export returns what was found then. Where another card is asked for than it holds, that is
    written anew, or removed.

    Args:
        run: A finished, measured run directory.
        out: The folder to write.
        spec: What to export.
        progress: Called with (what, done, of).

    Returns:
        What was measured, by split.

    Raises:
        ValueError: ``run`` is not finished or was not measured, its data have changed, ``out`` holds other things or
            another card that was edited, or what was exported does not measure as the run did.

    Example:
        >>> export(Path("runs/request"), Path("exported"))  # doctest: +SKIP
    """
    with alone_at(out):
        return _export(run, out, spec or ExportSpec(), progress or _silent)


def _export(run: Path, out: Path, spec: ExportSpec, tick: Progress) -> list[Checked]:
    record, recipe = _finished(run)
    if spec.adapter and not (run / "model" / "adapter_config.json").is_file():
        raise ValueError(f"{run} kept no adapter (its recipe has adapter.merge: true, or none): leave out --adapter")
    dtype = spec.dtype or recipe.model.dtype
    how: dict[str, Any] = {"dtype": dtype, "adapter": spec.adapter}
    described = {"run": sha256(run / "record.json"), **how}
    asked = {"card": spec.card, "show_data": spec.card and spec.show_data}

    origin = dataclasses.asdict(lineage(recipe.model.path, recipe.model.revision, run)) if spec.card else {}

    def card(checked: Sequence[Checked]) -> str:
        if not spec.card:
            return ""
        said = list(carried(run / "model").values())
        facts = CardFacts(out.resolve().name, **origin, **how, checked=checked, carried=said, show_data=spec.show_data)
        return model_card(record, facts)

    if (out / MARKER).is_file():
        marker = _earlier(out, described)
        checked = [Checked(**found) for found in marker["checked"]]
        if any(marker.get(key) != value for key, value in asked.items()):
            _recard(out, marker | asked, card(checked))
        return checked
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds other things: choose another --out")
    benchmark = recipe.benchmark or default_benchmark(recipe)
    measured = spec_for(benchmark, recipe.evaluation) if benchmark else recipe.evaluation
    picked = _picked(run, benchmark, record, spec.examples, dropping=recipe.data.overlap == "drop")
    part = out.with_name(f".{out.name}.soul-export.part")  # no name that a person gives: it is cleared away
    try:
        tick("writing", 0, 1)
        _write(run / "model", part, dataclasses.replace(recipe.model, dtype=dtype), spec.adapter)
        tick("writing", 1, 1)
        checked = _measure(part, dataclasses.replace(recipe.model, dtype=dtype), measured, picked, tick)
        _compare(checked, spec, exact=dtype == recipe.model.dtype == "float32")
        if spec.card:
            write_text(part / CARD, card(checked))
        files = {str(file.relative_to(part)): sha256(file) for file in sorted(part.rglob("*")) if file.is_file()}
        found = [dataclasses.asdict(c) for c in checked]
        kept = {"checked": found, "files": files, "soul": environment()["soul"]}
        write_json(part / MARKER, {"format": 1} | described | asked | kept)
        if out.exists():
            out.rmdir()  # it is empty
        publish(part, out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return checked


def carried(model: Path) -> dict[str, str]:
    """Return what a saved tokenizer says before every question, by the setting that made it."""
    file = model / "tokenizer_config.json"
    kept = json_object(file) if file.is_file() else {}
    named = {KEY: ("method.prompt", "prompt"), SYSTEM: ("model.system", "system turn")}
    return dict(named[key] for key in named if kept.get(key) not in (None, "", TEMPLATE))


def _silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def _finished(run: Path) -> tuple[RunRecord, Recipe]:
    record = read_run(run)
    if not (run / "model").is_dir() or not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} holds no model of its own: give the run directory of `soul unlearn` or `finetune`")
    recipe = read_recipe(run / "recipe.yaml")
    if not record.rows_after:
        how = (
            "give its command again without --no-evaluate"
            if recipe.benchmark or recipe.data.forget
            else "a run without a forget set is measured where its recipe names a benchmark, which takes another --out"
        )
        raise ValueError(f"{run} was not measured, so there is nothing to check an export by: {how}")
    changed = changed_files(run)
    if changed:
        raise ValueError(
            f"{run} was changed since it was finished ({', '.join(changed)}): what would be exported is not what was "
            "measured; restore it, or run it again into another --out"
        )
    return record, recipe


def ended(run: Path) -> str:
    """Return how a run ended, in a sentence, where a rule could end it: what is exported may not have forgotten all."""
    return read_run(run).stopped


def read_marker(out: Path) -> dict[str, Any]:
    """Return what was written down when ``out`` was exported.

    Raises:
        ValueError: It is broken, or of a later version.
    """
    marker = json_value(read_text(out / MARKER), str(out / MARKER), lenient=True)
    if isinstance(marker, dict):
        check_format("export", marker, out / MARKER)
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        raise ValueError(f"{out / MARKER} is broken: delete that folder, and export again")
    return marker


def _earlier(out: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was written down when ``out`` was exported, if it holds the same and nobody touched it."""
    marker = read_marker(out)
    if any(marker.get(key) != value for key, value in described.items()):
        raise ValueError(f"{out} holds another export: choose another --out, or delete that folder")
    changed = [
        name
        for name, digest in marker["files"].items()
        if name != CARD and (not (out / name).is_file() or sha256(out / name) != digest)  # a card may be edited
    ]
    if changed:
        raise ValueError(f"{out} was changed since it was checked ({', '.join(changed)}): delete that folder")
    return marker


def _recard(out: Path, marker: Mapping[str, Any], text: str) -> None:
    """Write the card that is asked for now, or remove it where that is none, and put down both in the marker.

    Raises:
        ValueError: The card was edited: it is not ours to throw away, and may name what is not to be shown.
    """
    card, files = out / CARD, dict(marker["files"])
    was = files.pop(CARD, "")
    if card.is_file() and sha256(card) != was and card.read_bytes() != text.encode():  # a kill may leave the new one
        raise ValueError(
            f"{card} was edited, and may not be the card that is asked for now (--no-card, --show-data): delete it, or "
            "choose another --out"
        )
    if text:
        write_text(card, text)
        files[CARD] = sha256(card)
    else:
        with writing(card):
            card.unlink(missing_ok=True)
    write_json(out / MARKER, {**marker, "files": files})


Picked = dict[str, tuple[list[Example], list[Row]]]


def _picked(run: Path, benchmark: Benchmark | None, record: RunRecord, examples: int, *, dropping: bool) -> Picked:
    """Return examples of each split, spread evenly over it, with the rows that the run recorded for them.

    Raises:
        ValueError: The data are not those of the run any more, or none has a likelihood.
    """
    picked: Picked = {}
    for name, sources in (benchmark.splits() if benchmark else {}).items():
        rows = list(record.rows_after.get(name, ()))
        measured = [(r["prompt"], r["answer"]) for r in rows]
        if dropping and name == "kept":  # the run left out what it dropped from the retain set
            sources = [e for e in sources if (e.prompt, e.answer) in measured]
        if measured != [(e.prompt, e.answer) for e in sources]:
            raise ValueError(
                f"the data of split {name!r} are not those that {run} was measured on, so the export cannot be checked"
            )
        known = [i for i, row in enumerate(rows) if row.get("tokens") and not math.isnan(row["nll"])]
        step = max(1, -(-len(known) // examples)) if examples else 1
        if known:
            picked[name] = [sources[i] for i in known[::step]], [rows[i] for i in known[::step]]
    if not picked:
        raise ValueError(
            f"{run} has no likelihoods in rows/after to check an export by: measure it on another benchmark"
        )
    return picked


def _write(model_folder: Path, part: Path, spec: ModelSpec, adapter: bool) -> None:
    shutil.rmtree(part, ignore_errors=True)
    if adapter:
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model_folder, part)
        return
    model, tokenizer = load_model(spec.at(model_folder))
    save_model(model, tokenizer, part)


def _measure(
    folder: Path, spec: ModelSpec, evaluation: EvaluationSpec, picked: Picked, tick: Progress
) -> list[Checked]:
    """Load what was written and measure its likelihoods."""
    model, tokenizer = load_model(spec.at(folder))
    splits = {name: examples for name, (examples, _) in picked.items()}
    only = dataclasses.replace(evaluation, generate=False)
    rows = evaluate(model, tokenizer, splits, spec=only, progress=lambda what, d, n: tick(f"export, {what}", d, n))
    return [_checked(name, recorded, rows[name]) for name, (_, recorded) in picked.items()]


def _checked(split: str, recorded: Sequence[Row], found: Sequence[Row]) -> Checked:
    before, after = (sum(row["nll"] for row in rows) / len(rows) for rows in (recorded, found))
    apart = [
        abs(x - y) / max(1.0, abs(x)) if math.isfinite(x) and math.isfinite(y) else (0.0 if x == y else math.inf)
        for old, new in zip(recorded, found, strict=True)
        for x, y in zip(_likelihoods(old, new), _likelihoods(new, old), strict=True)
    ]
    return Checked(split, len(found), before, after, max(apart))


def _likelihoods(row: Row, other: Row) -> list[float]:
    """Return the row's likelihoods, of the kinds that the other has too."""
    values = [row["nll"]]
    if "paraphrased_nll" in row and "paraphrased_nll" in other:
        values.append(row["paraphrased_nll"])
    if "wrong_nll" in row and "wrong_nll" in other:
        values += row["wrong_nll"]
    return values


def _compare(checked: Sequence[Checked], spec: ExportSpec, *, exact: bool) -> None:
    """Make sure that what was exported says what the run's model said.

    Raises:
        ValueError: It does not.
    """
    for c in checked:
        apart, most = (c.largest, spec.tolerance) if exact else (abs(c.after - c.before), spec.rounding)
        if not apart <= most:
            raise ValueError(
                f"what was exported does not measure as the run did: on {c.split!r} the NLL is {c.after:.5f} where the "
                f"run has {c.before:.5f} ({'largest' if exact else 'mean'} difference {apart:.2g}, allowed {most:g}). "
                "Were the run's weights changed since, or its rows measured on other hardware? Nothing was kept."
            )
