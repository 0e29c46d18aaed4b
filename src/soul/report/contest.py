"""The report of a contest, from its folder alone: ``matrix.yaml`` and ``trials.jsonl`` in, tables and figures out."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup

from soul.metrics.contest import Cell, choose, knowledge, points_of, read_lines, references_of, runs_of
from soul.metrics.frontier import FLOOR, Point, forgetting_at, lost_area, ratio_interval
from soul.metrics.stats import ks_margin, ks_two_sided
from soul.report import plots
from soul.report.page import frame
from soul.stored import write_text
from soul.strict import read_text, yaml_tree
from soul.visible import clean, one_line

TIE = 0.01
"""Lost areas of a request closer than this are a tie."""
SATURATED = 0.03
"""A cell whose best first-order lost area is below this says little."""
Table = tuple[str, list[str], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class Standing:
    """What one cell showed.

    Attributes:
        cell: The cell.
        order: ``first`` or ``second``.
        tuned: Trials by state.
        tuning_loss: Lost area of the chosen trials on the tuning requests; of all trials so far, where none are chosen.
        chosen: Numbers of the chosen trials; empty before tuning is done.
        lost: Lost area by report request.
        at95: Forgetting at a utility of .95 by report request.
        seconds: Median seconds of a run but for the passes before its first step, which a cache may spare: of the runs
            on report requests, which come last, and of trials before there are any.
        cold: Seconds of the first curvature passes where the cache had nothing.
        memory: Largest peak memory in bytes.
    """

    cell: Cell
    order: str
    tuned: dict[str, int]
    tuning_loss: float
    chosen: list[int]
    lost: dict[str, float]
    at95: dict[str, float]
    seconds: float
    cold: float
    memory: int


class ContestRecord:
    """A contest's folder, read.

    Raises:
        ValueError: There is no contest in the folder, or its record is broken.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "matrix.yaml"
        if not file.is_file():
            raise ValueError(f"{folder} holds no matrix.yaml, so it is no contest: give the --out of `soul bench`")
        try:
            self.matrix: dict[str, Any] = yaml_tree(read_text(file), str(file))
            self.label = str(self.matrix["label"])
            self.entries = {
                str(e["label"] or e.get("name") or e["method"]["name"]): e for e in self.matrix["optimizers"]
            }
            self.objectives = [str(o.get("label") or o["name"]) for o in self.matrix["objectives"]]
            self.tasks: dict[str, Any] = self.matrix["tasks"]
            self.budget: dict[str, Any] = self.matrix["budget"]
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a contest's matrix ({error})") from error
        self.lines = read_lines(folder / "trials.jsonl")

    def standing(self, cell: Cell, *, relative: bool = False) -> Standing:
        """Return what a cell showed so far, by either utility."""
        task, budget = self.tasks[cell.task], self.budget
        tuned = [x for r in task["tune"] for x in runs_of(self.lines, cell, "tune", r) if x["point"] < budget["points"]]
        sizes = budget["points"], budget["settings"]
        chosen = choose(self.lines, cell, task["tune"], *sizes, relative=relative) or []
        known = [r for r in task["tune"] if len(references_of(self.lines, cell.task, r, full=False)) == 2]
        numbers = chosen or None
        losses = [lost_area(points_of(self.lines, cell, "tune", r, numbers, relative=relative)) for r in known]
        reported = {r: runs_of(self.lines, cell, "report", r) for r in task["report"]}
        whole = {
            r: points_of(self.lines, cell, "report", r, chosen, relative=relative)
            for r, x in reported.items()
            if chosen and {line["point"] for line in x}.issuperset(chosen)
        }
        runs = [x for x in [*tuned, *(x for many in reported.values() for x in many)] if x["state"] == "done"]
        timed = [x for x in runs if x["kind"] == "report"] or runs
        pilots = [x for r in task["tune"] for x in runs_of(self.lines, cell, "pilot", r)]
        return Standing(
            cell,
            str(self.entries[cell.optimizer]["order"]),
            {s: sum(x["state"] == s for x in tuned) for s in ("done", "stopped", "lost")},
            float(np.mean(losses)) if losses else 1.0,
            chosen,
            {r: lost_area(points) for r, points in whole.items()},
            {r: forgetting_at(points, 0.95) for r, points in whole.items()},
            statistics.median([x["seconds"]["train"] - x["seconds"]["curvature"] for x in timed])
            if timed
            else float("nan"),
            max((x["seconds"]["curvature"] for x in pilots), default=0.0),
            max((x["peak_memory_bytes"] for x in runs), default=0),
        )

    def squares(self, *, relative: bool = False) -> list[tuple[str, str, list[Standing]]]:
        """Return the standings of each (task, objective)."""
        return [
            (task, objective, [self.standing(Cell(task, objective, name), relative=relative) for name in self.entries])
            for task in self.tasks
            for objective in self.objectives
        ]

    def distances(self, cell: Cell, request: str) -> list[tuple[float, float]]:
        """Return, for each run's final model, TOFU's KS statistic against the retrained one, and its margin."""
        gold = references_of(self.lines, cell.task, request, full=True).get("gold", {}).get("log_truth_ratios")
        found = []
        for line in runs_of(self.lines, cell, "report", request):
            final = [m["values"] for m in line["measures"] if m["share"] == 1.0]
            if gold and final and final[-1].get("log_truth_ratios"):
                mine = final[-1]["log_truth_ratios"]
                found.append((ks_two_sided(mine, gold)[0], ks_margin(len(mine), len(gold))))
        return found


def rival(standings: Sequence[Standing], value: Callable[[Standing], float]) -> Standing | None:
    """Return the best first-order side: the least mean of what ``value`` gives."""
    first = [s for s in standings if s.order == "first"]
    return min(first, key=value) if first else None


def verdict(standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell: lost area, and its ratio to the best first-order side on the same requests."""

    def mean(s: Standing) -> float:
        return statistics.mean(s.lost.values()) if s.lost else float("inf")

    best = rival(standings, mean)
    rows = []
    for s in sorted(standings, key=mean):
        if not s.lost:
            continue
        shared = [r for r in s.lost if best and r in best.lost]
        ratio = wins = "-"
        if best and s is not best and shared:
            mine, other = [s.lost[r] for r in shared], [best.lost[r] for r in shared]
            value, low, high = ratio_interval(mine, other)
            ratio = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            difference = [a - b for a, b in zip(mine, other, strict=True)]
            won, lost = sum(d < -TIE for d in difference), sum(d > TIE for d in difference)
            wins = f"{won} / {len(shared) - won - lost} / {lost}"
        name = s.cell.optimizer + (" (rival)" if s is best else "")
        spread = f"{mean(s):.3f} ({min(s.lost.values()):.3f} to {max(s.lost.values()):.3f})"
        cost = [f"{s.seconds:.0f}", f"{s.cold:.0f}", f"{s.memory / 1e9:.1f}"]
        rows.append(
            [name, s.order, str(len(s.lost)), spread, ratio, wins, f"{statistics.mean(s.at95.values()):.2f}", *cost]
        )
    return rows


def tuning(record: ContestRecord, standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell: its trials, what they lose on the tuning requests, and the settings chosen."""
    rows = []
    for s in sorted(standings, key=lambda s: s.tuning_loss):
        if not sum(s.tuned.values()):
            continue
        requests = record.tasks[s.cell.task]["tune"]
        lines = {x["point"]: x for r in requests for x in runs_of(record.lines, s.cell, "tune", r)}
        said = []
        for i in s.chosen:
            tuned = lines[i]["settings"]
            said.append(", ".join(f"{k} {v:.3g}" for k, v in tuned.items()))
        states = [str(s.tuned[k]) for k in ("done", "stopped", "lost")]
        rows.append(
            [
                s.cell.optimizer,
                *states,
                f"{s.tuning_loss:.3f}",
                "; ".join(said) or "(tuning goes on)",
                f"{s.seconds:.0f}",
            ]
        )
    return rows


def tables(record: ContestRecord) -> list[Table]:
    """Return all tables as (title, head, rows)."""
    found: list[Table] = []
    for relative in (False, True):
        for task, objective, standings in record.squares(relative=relative):
            how = f"{task}, {objective}" + (", each part of utility by its own before" if relative else "")
            head = ["optimizer", "order", "requests", "lost area", "ratio to rival", "won / tied / lost"]
            head += ["forgetting at .95", "s a run but curvature", "s cold curvature", "peak GB"]
            rows = verdict(standings)
            if rows:
                found.append((f"{how}: on the report requests", head, rows))
            head = ["optimizer", "whole", "stopped", "lost", "lost area", "chosen", "s a run but curvature"]
            rows = tuning(record, standings)
            if rows:
                found.append((f"{how}: tuning", head, rows))
    for task, objective, standings in record.squares():
        rows = distances(record, standings)
        if rows:
            title = f"{task}, {objective}: KS statistic to the retrained model"
            found.append((title, ["optimizer", "mean", "runs"], rows))
        head, rows = attacked(record, task, objective)
        if any(not row[0].startswith("(") for row in rows):
            found.append((f"{task}, {objective}: knowledge of the forget set after attacks", head, rows))
    rows = precision(record)
    if rows:
        head = ["measure", "models", "mean difference", "largest difference"]
        found.append(("Measured in training's precision, against the weights' own", head, rows))
    return found


def precision(record: ContestRecord) -> list[list[str]]:
    """Return a row for each measure: how far the precision of training moves it from that of the weights."""
    apart: dict[str, list[float]] = {}
    for x in record.lines:
        own = x.get("exact")
        fast = x.get("full") or (x["measures"][-1]["values"] if x.get("measures") else None)
        if own and fast:
            for name, value in own.items():
                if isinstance(value, float) and isinstance(fast.get(name), float):
                    apart.setdefault(name, []).append(fast[name] - value)
    return [
        [name, str(len(d)), f"{statistics.mean(d):+.4f}", f"{max(abs(v) for v in d):.4f}"] for name, d in apart.items()
    ]


def distances(record: ContestRecord, standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell: how far its final models are from retrained ones in TOFU's truth ratio."""
    rows = []
    for s in standings:
        requests = record.tasks[s.cell.task]["report"]
        found = [d for r in requests for d in record.distances(s.cell, r)]
        if found:
            mean, margin = statistics.mean(d for d, _ in found), max(m for _, m in found)
            rows.append([s.cell.optimizer, f"{mean:.3f} (one run's: +- {margin:.2f})", str(len(found))])
    return rows


def attacked(record: ContestRecord, task: str, objective: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of what attacks bring back: knowledge ``K`` of the forget set, mean over report requests.

    A row for the model before, the retrained one and each side's best cell; a column without attack, then one for each.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for x in record.lines:
        if x["kind"] == "attack" and x["task"] == task and x.get("objective") in (None, objective):
            whole = x["measures"][-1]["values"] if x.get("measures") else None
            if whole is None and "which" in x:
                whole = references_of(record.lines, task, x["request"], full=True).get(x["which"])
            values = {name: knowledge(v, full=True) for name, v in x.get("attacked", {}).items()}
            if whole is not None and values:
                name = x.get("optimizer") or {"before": "(before)", "gold": "(retrained)"}[x["which"]]
                found.setdefault(name, []).append({"none": knowledge(whole, full=True), **values})
    names = sorted({name for many in found.values() for one in many for name in one} - {"none"})
    rows = []
    for who in sorted(found, key=lambda name: (not name.startswith("("), name)):
        means = [statistics.mean(one[name] for one in found[who] if name in one) for name in ("none", *names)]
        rows.append([who, str(len(found[who])), *(f"{m:.3f}" for m in means)])
    return ["model", "requests", "no attack", *names], rows


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Say that a record is broken where a line of it lacks what its kind has."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if str(folder) in str(error):  # says what is wrong by itself
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder}: matrix.yaml and trials.jsonl are not those of one whole contest ({reason:.200}); "
            "only `soul bench` writes them"
        ) from error


def contest_tables(folder: Path) -> str:
    """Return the tables of a contest as Markdown.

    Raises:
        ValueError: ``folder`` is no contest, or its record is broken.
    """
    with _readable(folder):
        record = ContestRecord(folder)
        found = tables(record)
    parts = [f"# {one_line(record.label, 200)}", f"{len(record.lines)} jobs on record."]
    for title, head, rows in found:
        lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join(lines))
    return clean("\n\n".join(parts), limit=200_000) + "\n"


def attained(points: Sequence[Point], grid: np.ndarray) -> np.ndarray:
    """Return the best utility among points that forget at least so much, for each value of the grid."""
    return np.array([max((u for f, u in points if f >= least), default=0.0) for least in grid])


def frontier_plot(record: ContestRecord, task: str, objective: str, name: str) -> str:
    """Return the frontiers of a square: utility against forgetting, mean over requests, one line an optimizer.

    On the report requests where all sides have some, else on those that are tuned on.
    """
    standings = [record.standing(Cell(task, objective, entry)) for entry in record.entries]
    kind = "report" if all(s.lost for s in standings) else "tune"
    grid = np.linspace(0, 1, 201)
    with matplotlib.rc_context(plots._STYLE):
        figure, axes = plots._axes(6.4, 4.4)
        for i, s in enumerate(standings, 1):
            requests = list(s.lost) if kind == "report" else record.tasks[task]["tune"]
            curves = [
                attained(points_of(record.lines, s.cell, kind, r, s.chosen or None), grid)
                for r in requests
                if len(references_of(record.lines, task, r, full=kind == "report")) == 2
            ]
            if any((curve > 0).any() for curve in curves):
                mean = np.maximum(np.mean(curves, axis=0), FLOOR)
                style, color = "-" if s.order == "second" else "--", plots.color_of(i)
                axes.plot(grid, mean, style, color=color, drawstyle="steps-pre", linewidth=1.8)
                end = int(np.flatnonzero(mean > FLOOR)[-1]) if (mean > FLOOR).any() else 0
                place: dict[str, Any] = {"textcoords": "offset points", "fontweight": "bold", "color": color}
                axes.annotate(str(i), (grid[end], mean[end]), (3, 3), **place)
        axes.set(xlim=(0, 1.02), ylim=(FLOOR, 1.01), xlabel="forgetting", ylabel="utility")
        return plots._svg(figure, name)


def write_contest(folder: Path, out: Path) -> Path:
    """Write one self-contained HTML page about a contest and return its path.

    Raises:
        ValueError: ``folder`` is no contest, or ``out`` cannot be written.
    """
    with _readable(folder):
        record = ContestRecord(folder)
        body = _body(record)
    style = "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1f2937}"
    style += "table{border-collapse:collapse;font-size:13px}td,th{padding:.3em .7em;border-bottom:1px solid #e5e7eb;"
    style += "text-align:left}svg{max-width:100%;height:auto}\n"
    write_text(out, frame(record.label, style + plots.color_rules("color"), body))
    return out


def write_frontiers(folder: Path, out: Path) -> list[Path]:
    """Write the frontiers of each square as a figure of its own, ``frontier-1.svg`` and so on in the matrix's order.

    Raises:
        ValueError: ``folder`` is no contest, or ``out`` cannot be written.
    """
    with _readable(folder):
        record = ContestRecord(folder)
        squares = [(task, objective) for task in record.tasks for objective in record.objectives]
        figures = [frontier_plot(record, *square, f"frontier{k}") for k, square in enumerate(squares)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}; choose another --figures") from error
    files = [out / f"frontier-{k}.svg" for k in range(1, len(figures) + 1)]
    for file, figure in zip(files, figures, strict=True):
        write_text(file, figure)
    return files


def _body(record: ContestRecord) -> Markup:
    parts = [Markup("<h1>{}</h1>").format(one_line(record.label, 200))]
    for k, (task, objective, standings) in enumerate(record.squares()):
        chips = [
            Markup('<b class="c{}">{}</b> {}').format((i - 1) % len(plots.COLORS), i, one_line(name))
            for i, name in enumerate(record.entries, 1)
        ]
        kind = "report" if all(s.lost for s in standings) else "tuning"
        said = Markup(
            "<p>Utility kept at each share forgotten, mean over the {} requests; second order is drawn solid. {}</p>"
        )
        parts.append(Markup("<h2>{}, {}</h2>").format(one_line(task), one_line(objective)))
        parts.append(Markup(frontier_plot(record, task, objective, f"frontier{k}")))  # noqa: S704 - numbers only
        parts.append(said.format(kind, Markup(" &middot; ").join(chips)))
    for title, head, rows in tables(record):
        cells = [Markup("").join(Markup("<td>{}</td>").format(clean(c)) for c in row) for row in rows]
        body = Markup("").join(Markup("<tr>{}</tr>").format(row) for row in cells)
        top = Markup("").join(Markup("<th>{}</th>").format(one_line(h)) for h in head)
        parts.append(Markup("<h2>{}</h2><table><tr>{}</tr>{}</table>").format(one_line(title, 200), top, body))
    return Markup("").join(parts)
