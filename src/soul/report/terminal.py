"""Renders run records for a terminal. Text goes in as ``Text``, so that no word of a model is read as markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soul.report import examples, view
from soul.report.record import RunRecord
from soul.report.seeds import Spread, by_seed
from soul.types import Score
from soul.visible import clean, one_line

_STATES = {"good": "bold green", "bad": "bold red", "none": "dim"}
_SHOWN = 400
_CELL = 16  # columns that a metric takes: "0.313 to 0.682" and what divides it from the next


def render_terminal(runs: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print a report about one run, or several side by side.

    Args:
        runs: Records of :func:`soul.report.read_run`; at least one.
        console: Where to print; standard output by default.

    Raises:
        ValueError: If ``runs`` is empty.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    console = console or Console()
    for run in runs:
        _verdict(run, console, shared=len({run.asked for run in runs}) == 1 and run is not runs[0])
    for table in view.tables_of(runs):
        console.print()
        wide = (len(table.metrics) + 1) * _CELL > console.width
        console.print(_turned(table) if wide else _scores(table))
    for name, spreads in by_seed(runs):
        console.print(_over_seeds(name, spreads))
    intervals = view.interval_note(runs)
    if intervals:
        console.print(Text(clean(intervals), style="dim"))
    console.print()
    console.print(_cost(runs))
    for split, example in examples.prominent(examples.splits_of(runs, limit=20)):
        _example(split.title, example, console)
    console.print(Text("\nWhat this does not prove", style="bold"))
    for limit in view.limits(runs, seeds=bool(by_seed(runs))):
        console.print(Text(f"- {limit}", style="dim"))


def _verdict(run: RunRecord, console: Console, *, shared: bool) -> None:
    """Print what a run was asked, unless the reader has ``shared`` it already, and what it achieved."""
    state, words = view.check_summary(run)
    console.print()
    console.print(Text.assemble((one_line(run.label), "bold"), "  ", (words, _STATES[state])))
    if run.asked and not shared:
        console.print(Text(clean(run.asked)))
    if run.stopped:
        console.print(Text(clean(run.stopped), style="bold"))
    for sentence in view.sentences(run):
        console.print(Text(clean(sentence)))
    for check in run.checks:
        mark, style = ("passed", "green") if check.passed else ("failed", "red")
        value = "" if check.value is None else f" ({view.number(check.value)})"
        console.print(Text.assemble("  ", (mark, style), f"  {one_line(check.name, 200)}{value}"))
    for warning in run.warnings:
        console.print(Text(f"  note: {clean(warning)}", style="yellow"))


def _grid(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _scores(source: view.Table) -> Table:
    table = _grid(one_line(source.title))
    table.add_column("model", overflow="fold")
    for name, better in source.metrics:
        hint = f"\n{one_line(better)} is better" if better else ""
        table.add_column(Text(one_line(name) + hint), justify="right")
    for model, cells in source.rows:
        table.add_row(Text(one_line(model.name)), *(_cell(cell, "\n") for cell in cells))
    return table


def _turned(source: view.Table) -> Table:
    """Return a row for each metric, where there are more of them than fit side by side."""
    table = _grid(one_line(source.title))
    table.add_column("metric", overflow="fold")
    table.add_column("better", style="dim")
    for model, _ in source.rows:
        table.add_column(Text(one_line(model.name)), justify="right", overflow="fold")
    for i, (name, better) in enumerate(source.metrics):
        table.add_row(
            Text(one_line(name)), Text(one_line(better)), *(_cell(cells[i], "  ") for _, cells in source.rows)
        )
    return table


def _over_seeds(name: str, spreads: Sequence[Spread]) -> Table:
    table = _grid(f"{one_line(name)}: mean over seeds, 95 % interval of the mean (Student's t), standard deviation")
    table.add_column("metric", overflow="fold")
    for head in ("better", "before", "mean", "interval", "sd"):
        table.add_column(head, justify="right")
    for s in spreads:
        low, high = view.number(s.mean - s.half), view.number(s.mean + s.half)
        cells = (s.better, view.number(s.before), view.number(s.mean), f"{low} to {high}", view.number(s.sd))
        table.add_row(Text(one_line(s.title)), *(Text(one_line(cell)) for cell in cells))
    return table


def _cell(score: Score | None, between: str) -> Text:
    if score is None:
        return Text("—", style="dim")
    under = between.join(part for part in (view.interval(score), f"n = {score.n}") if part)
    return Text.assemble(view.number(score.value), between, (under, "dim"))


def _cost(runs: Sequence[RunRecord]) -> Table:
    phases = view.phases_of(runs)
    table = _grid("Cost")
    table.add_column("run", overflow="fold")
    for name in ("steps", *(one_line(phase) for phase in phases), "peak memory"):
        table.add_column(Text(name), justify="right")
    for run in runs:
        steps = "—" if run.steps is None else str(run.steps)
        spent = [view.duration(run.seconds.get(phase)) for phase in phases]
        table.add_row(
            *(Text(cell) for cell in (one_line(run.label), steps, *spent, view.memory(run.peak_memory_bytes)))
        )
    return table


def _example(title: str, example: examples.ExampleView, console: Console) -> None:
    table = _grid(f"{one_line(title)}: {clean(example.prompt, _SHOWN)}")
    table.show_header = False
    table.add_column("model", style="dim", max_width=24, overflow="fold")
    table.add_column("answer", overflow="fold")
    for answer in example.answers:
        said = "(no text was generated)" if answer.text is None else clean(answer.text, _SHOWN)
        chance = f"\nprobability of the true answer {view.number(answer.probability)}"
        table.add_row(Text(one_line(answer.name)), Text.assemble(said, (chance, "dim")))
    table.add_row(Text("True answer"), Text(clean(example.truth, _SHOWN), style="italic"))
    console.print()
    console.print(table)
