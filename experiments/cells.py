"""What tables of objective x optimizer x rate share: cells one after the other, a line of record each, a rule."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from soul import config
from soul.cli import progress_bars
from soul.console import quiet
from soul.evaluate import measure
from soul.machine import environment
from soul.metrics.stats import harmonic_mean
from soul.models import ModelSpec, load_model
from soul.recipe import Recipe, recipe_from_tree
from soul.report import view
from soul.run import execute, score_dict
from soul.stored import write_json
from soul.strict import read_number
from soul.types import LostModelError

OBJECTIVES: dict[str, dict[str, Any]] = {"grad_diff": {}, "npo": {"beta": 0.1}, "po": {}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "signum": {},
    "kfac": {"damping": 0.1, "curvature": {"warm_start": 4, "interval": 0, "general_text": 2}},
}
RATES = {"adamw": (3e-5, 6e-5, 1.2e-4), "signum": (2e-5, 4e-5, 8e-5), "kfac": (6e-4, 1.2e-3, 2.4e-3)}
"""Three a rule, a factor of 2 apart, around those of the demo (``docs/results/demo-tuning.json``)."""

MARK = "<!-- from here on written by the script -->"
Line = dict[str, Any]
Values = dict[tuple[str, str], Line]
"""Scores by (split, metric)."""
Tick = Callable[[str, int, int], None]
"""Called with (what, done, of)."""
Cell = tuple[str, Line, Callable[[], Recipe]]
"""Name, what stands in its line beside what is measured, and recipe."""
Judge = Callable[[Values, dict[str, Values]], dict[str, float]]
"""From a cell's scores and those of the models before, to the parts whose harmonic mean is the criterion."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the cells of one table share.

    Attributes:
        name: ``copyright`` or ``detox``.
        recipe: The recipe whose data, training and evaluation all cells have.
        overrides: Changes to it, as on the command line.
        benchmark: The benchmark and its settings.
        before: Models measured first, by what the table calls them; the last one is the one that forgets.
        judge: What decides between rates.
        columns: Of the table: heading to (split, metric).
        runs: Where work is done.
        results: Where records and table go.
        rates: Rates of each optimizer.
        objectives: Settings of each objective.
    """

    name: str
    recipe: Path
    benchmark: dict[str, Any]
    before: dict[str, str]
    judge: Judge
    columns: dict[str, tuple[str, str]]
    runs: Path
    results: Path
    overrides: Sequence[str] = ()
    rates: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=lambda: RATES)
    objectives: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: OBJECTIVES)

    @property
    def records(self) -> Path:
        """The file with a line for each model measured."""
        return self.results / self.name / "cells.jsonl"

    def cell(self, objective: str, optimizer: str, lr: float) -> Recipe:
        """Return the recipe of a cell."""
        tree = config.override(config.read_yaml(self.recipe), list(self.overrides))
        kept = {k: v for k, v in tree["objective"].items() if k.startswith("retain")}
        return recipe_from_tree(
            tree
            | {"label": f"{objective} + {optimizer}", "model": list(self.before.values())[-1]}
            | {"objective": {"name": objective, **kept, **self.objectives[objective]}}
            | {"optimizer": {"name": optimizer, "lr": lr, **OPTIMIZERS[optimizer]}}
            | {"benchmark": self.benchmark}
        )


def read_lines(file: Path) -> list[Line]:
    """Return the whole lines of a record; none where there is no file yet, and not one that a kill cut short."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def add_line(file: Path, line: Line) -> None:
    """Add a line to a record."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text.endswith("\n"):  # a kill cut the last line short
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def by_name(scores: Sequence[Line]) -> Values:
    """Return scores by split and metric."""
    return {(score["split"], score["metric"]): score for score in scores}


def run_cells(plan: Plan, only: str = "", most: int = 0) -> None:
    """Do every cell that has no line yet; an interrupted one goes on where it stopped.

    Args:
        plan: The cells.
        only: Of these cells, those whose ``objective-optimizer-rate`` begins so.
        most: Stop after so many; 0 for all.
    """
    todo: list[Cell] = [
        (f"{o}-{rule}-{lr:g}", {"objective": o, "optimizer": rule}, functools.partial(plan.cell, o, rule, lr))
        for o in plan.objectives
        for rule, rates in plan.rates.items()
        for lr in rates
    ]
    with progress_bars() as tick:
        measure_all_before(plan, tick)
        run_each(plan, todo, only, most, tick)


def run_each(plan: Plan, todo: Sequence[Cell], only: str, most: int, tick: Tick) -> None:
    """Do those of some cells that have no line yet; see :func:`run_cells`."""
    done = 0
    for title, head, recipe in todo:
        known = {line["cell"] for line in read_lines(plan.records)}
        if title in known or not title.startswith(only) or (most and done >= most):
            continue
        line = run_cell(plan, recipe(), title, lambda w, d, n, t=title: tick(f"{t}: {w}", d, n))
        add_line(plan.records, {"cell": title, **head, **line})
        done += 1


def measure_all_before(plan: Plan, tick: Tick) -> None:
    """Measure the models that have forgotten nothing."""
    for name, model in plan.before.items():
        measure_before(plan, name, model, lambda w, d, n, name=name: tick(f"{name}: {w}", d, n))


def measure_before(plan: Plan, name: str, model: str, tick: Tick) -> None:
    """Measure a model that has forgotten nothing."""
    if name in {line["cell"] for line in read_lines(plan.records)}:
        return
    recipe = plan.cell(next(iter(plan.objectives)), "adamw", 1e-5)  # of which only benchmark and evaluation count
    assert recipe.benchmark is not None
    rows = measure(
        recipe.benchmark,
        *load_model(ModelSpec(model)),
        spec=recipe.evaluation,
        folder=plan.runs / "before" / name,
        progress=tick,
    )
    add_line(plan.records, {"cell": name, "scores": [score_dict(s) for s in recipe.benchmark.score(rows)]})
    write_json(plan.results / plan.name / "environment.json", environment())


def run_cell(plan: Plan, recipe: Recipe, title: str, tick: Tick) -> Line:
    """Forget, measure, keep the line, drop the weights."""
    out = plan.runs / "cells" / title
    before = plan.runs / "before" / list(plan.before)[-1]
    if not (out / "rows/before").is_dir():
        shutil.copytree(before, out / "rows/before")  # the same model on the same questions: measured once
    line: Line = {"lr": recipe.optimizer.lr, "seed": recipe.training.seed, "threads": torch.get_num_threads()}
    try:
        execute(recipe, out, progress=tick)
    except LostModelError as error:  # a rate that loses the model is a result, too
        shutil.rmtree(out / "model", ignore_errors=True)
        return line | {"lost": str(error)}
    shutil.rmtree(out / "model")
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))["after"]
    return line | {"steps": record["steps"], "seconds": record["seconds"], "scores": scores}


def chosen(plan: Plan) -> tuple[dict[str, Values], list[Line]]:
    """Return the scores of the models before, and all cells with their criterion and whether their rate was chosen.

    The rate with the largest criterion is a pair's; of equal ones the smallest.
    """
    lines = read_lines(plan.records)
    before = {line["cell"]: by_name(line["scores"]) for line in lines if line["cell"] in plan.before}
    cells = [line for line in lines if line["cell"] not in plan.before]
    for line in cells:
        line["parts"] = plan.judge(by_name(line["scores"]), before) if "scores" in line else {}
        line["criterion"] = harmonic_mean(list(line["parts"].values())) if line["parts"] else 0.0
    for line in cells:
        pair = [c for c in cells if (c["objective"], c["optimizer"]) == (line["objective"], line["optimizer"])]
        line["best"] = line is min(pair, key=lambda c: (-c["criterion"], c["lr"]))
    return before, cells


def number(score: Line | None) -> str:
    """Return a score with its interval as text."""
    if score is None:
        return "-"
    value, low, high = (read_number(score[name]) for name in ("value", "low", "high"))

    def short(x: float) -> str:
        if not math.isfinite(x):
            return view.number(x)
        return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 1e4 else f"{x:.1e}"

    known = not (math.isnan(low) or math.isnan(high)) and math.isfinite(value)
    return short(value) + (f" [{short(low)}, {short(high)}]" if known else "")


def tables(plan: Plan) -> str:
    """Return the tables as Markdown: the models before and each pair at its rate, then every cell."""
    before, cells = chosen(plan)
    out = [f"| model | lr | {' | '.join(plan.columns)} |", "|---|---|" + "---|" * len(plan.columns)]
    best = {f"{c['objective']} + {c['optimizer']}": c for c in cells if c["best"]}
    shown = [(name, "", found) for name, found in before.items()]
    shown += [(name, f"{c['lr']:g}", by_name(c.get("scores", []))) for name, c in best.items()]
    for name, lr, found in shown:
        out.append(f"| {name} | {lr} | {' | '.join(number(found.get(key)) for key in plan.columns.values())} |")
    parts = next((list(c["parts"]) for c in cells if c["parts"]), [])
    out += ["", f"| objective | optimizer | lr | {' | '.join([*parts, 'criterion'])} | steps | seconds | chosen |"]
    out.append("|---|---|---|" + "---|" * (len(parts) + 4))
    for c in cells:
        found = [f"{c['parts'][part]:.3f}" if c["parts"] else "lost" for part in parts]
        values = " | ".join([*found, f"{c['criterion']:.3f}"])
        seconds = f"{c['seconds']['train'] + c['seconds']['evaluate']:.0f}" if "seconds" in c else "-"
        mark = "yes" if c["best"] else ""
        head = f"| {c['objective']} | {c['optimizer']} | {c['lr']:g} |"
        out.append(f"{head} {values} | {c.get('steps', '-')} | {seconds} | {mark} |")
    first = next(iter(next(iter(before.values())).values())) if before else None
    told = intervals(first) if first else ""
    return "\n".join([*out, "", told]).rstrip() + "\n"


def intervals(score: Mapping[str, Any]) -> str:
    """Say how the intervals of a table were made, by one of its scores."""
    plain = score["method"].endswith("groups)")
    few = ", plain percentiles, too narrow where groups are few: of two they cover about half" if plain else ""
    return f"Intervals: {100 * score['level']:g} %, {score['method']}, seed {score['seed']}{few}."


def write_tables(plan: Plan, title: str) -> Path:
    """Write the tables into ``results/name.md`` below the mark; what a person wrote above it stays."""
    file = plan.results / f"{plan.name}.md"
    told = file.read_text(encoding="utf-8").partition(MARK)[0] if file.is_file() else f"# {title}\n\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{told}{MARK}\n\n{tables(plan)}", encoding="utf-8")
    return file


def start(threads: int) -> None:
    """Compute on so many threads, and let libraries be quiet."""
    torch.set_num_threads(threads)
    quiet()
