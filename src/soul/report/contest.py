"""The report of a contest, from its folder alone: ``matrix.yaml`` and ``trials.jsonl`` in, tables and figures out."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup

from soul.metrics.contest import points_of, references_of, runs_of, sides
from soul.metrics.frontier import FLOOR, Point, ratio_interval
from soul.metrics.stats import expected_best
from soul.report import plots
from soul.report.page import frame
from soul.report.standings import ContestRecord, Standing, rivals
from soul.stored import write_text
from soul.visible import clean, one_line

_VERDICT = ["optimizer", "order", "trials", "settings", "requests", "lost area", "ratio to rival", "won / tied / lost"]
_VERDICT += ["forgetting at .95", "s a run, less its curvature", "s with the pilot's curvature", "peak GB"]
TIE = 0.01
"""Lost areas of a request closer than this are a tie."""
SATURATED = 0.03
"""A cell whose best first-order lost area is below this says little."""
Table = tuple[str, list[str], list[list[str]]]
Pair = tuple[float, float]


def verdict(standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell: lost area, and its ratio to the best first-order side on the same requests.

    The upper end of a second-order side's interval takes the best first-order side of each resample; for all else it is
    the best of all requests.
    """

    def mean(s: Standing) -> float:
        return statistics.mean(s.lost.values())

    firsts = rivals(standings)
    rows = []
    for s in sorted((s for s in standings if s.lost), key=mean):
        ratio, wins, name = "-", "-", s.cell.optimizer
        if firsts and s is firsts[0]:
            name += " (rival)"
        elif firsts:
            ratio, wins = against(s, *(firsts[:1] if s.order == "first" else firsts))
        spread = f"{mean(s):.3f} ({min(s.lost.values()):.3f} to {max(s.lost.values()):.3f})"
        cost = [f"{s.warm:.0f}", f"{s.cold:.0f}", f"{s.memory / 1e9:.1f}"]
        counts = [str(sum(s.tuned.values())), str(len(s.chosen)), str(len(s.lost))]
        rows.append([name, s.order, *counts, spread, ratio, wins, f"{statistics.mean(s.at95.values()):.2f}", *cost])
    return rows


def against(s: Standing, other: Standing, *further: Standing) -> tuple[str, str]:
    """Return a side's lost area in shares of another's, with the interval, and the requests it won, tied and lost.

    Of several others the one that loses least counts (:func:`ratio_interval`), and the first for what is won.
    """
    shared = [r for r in s.lost if all(r in o.lost for o in (other, *further))]
    if not shared:
        return "-", "-"
    value, low, high = ratio_interval(
        [s.lost[r] for r in shared], *([o.lost[r] for r in shared] for o in (other, *further))
    )
    apart = [s.lost[r] - other.lost[r] for r in shared]
    won, lost = sum(d < -TIE for d in apart), sum(d > TIE for d in apart)
    wins = f"{won} / {len(shared) - won - lost} / {lost}"
    if math.isnan(value):
        return "neither loses", wins
    if math.isinf(value):
        return "the rival loses nothing", wins
    spread = "" if math.isnan(low) else f" [{low:.2f}, {'no bound' if math.isinf(high) else f'{high:.2f}'}]"
    return f"{value:.2f}{spread}", wins


def tuning(record: ContestRecord, standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell: its trials, what they lose on the tuning requests, and the settings chosen."""
    rows = []
    for s in sorted(standings, key=lambda s: s.offered):
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
                f"{s.offered:.3f}",
                f"{s.tuning_loss:.3f}" if s.chosen else "-",
                "; ".join(said) or "(tuning goes on)",
                f"{s.warm:.0f}",
            ]
        )
    return rows


def budgets(
    record: ContestRecord, standings: Sequence[Standing], *, relative: bool
) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of what the best of fewer trials loses on the tuning requests, in expectation."""
    losses = {s.cell.optimizer: record.trial_losses(s, relative=relative) for s in standings}
    most = max(map(len, losses.values()), default=0)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    rows = [
        [name, *(f"{expected_best(found, n):.3f}" if n <= len(found) else "-" for n in sizes)]
        for name, found in sorted(losses.items(), key=lambda pair: min(pair[1], default=math.inf))
        if found
    ]
    return ["optimizer", *(f"best of {n}" for n in sizes)], rows


def win_rates(record: ContestRecord, standings: Sequence[Standing]) -> list[list[str]]:
    """Return a row for each cell whose rule clips: the share of coordinates that moved less than the clip allows."""
    rows = []
    for s in standings:
        requests = record.tasks[s.cell.task]["report"]
        runs = [x for r in requests for x in runs_of(record.lines, s.cell, "report", r) if x["point"] in s.chosen]
        rates = [x["win_rate"] for x in runs if x["win_rate"] is not None]
        if rates:
            spread = f"{statistics.mean(rates):.3f} ({min(rates):.3f} to {max(rates):.3f})"
            rows.append([s.cell.optimizer, str(len(rates)), spread])
    return rows


def tables(record: ContestRecord) -> list[Table]:
    """Return all tables as (title, head, rows)."""
    found: list[Table] = []
    most = max(record.sizes(cell)[1] for t in record.tasks for o in record.objectives for cell in record.cells(t, o))
    for relative in (False, True):
        for task, objective, standings in record.squares(relative=relative):
            how = f"{task}, {objective}" + (", each part of utility by its own before" if relative else "")
            rows = verdict(standings)
            if rows:
                title = f"{how}: on the report requests{'' if relative else _saturated(standings)}"
                found.append((title, _VERDICT, rows))
            alone = [record.standing(s.cell, relative=relative, settings=1) for s in standings] if most > 1 else []
            if any(s.lost for s in alone):
                found.append(
                    (f"{how}: on the report requests, with one setting of each alone", _VERDICT, verdict(alone))
                )
            head = ["optimizer", "whole", "stopped", "lost", "lost area, all trials", "the chosen", "chosen"]
            head += ["s a run, less its curvature"]
            rows = tuning(record, standings)
            if rows:
                found.append((f"{how}: tuning", head, rows))
            head, rows = budgets(record, standings, relative=relative)
            if rows:
                title = f"{how}: lost area of the best of so many trials on the tuning requests, expected"
                title += " (stopped trials by what they reached)" if any(s.tuned["stopped"] for s in standings) else ""
                found.append((title, head, rows))
    for task, objective, standings in record.squares():
        rows = distances(record, standings)
        if rows:
            title = f"{task}, {objective}: KS statistic to the retrained model"
            found.append((title, ["optimizer", "mean", "runs", "of these told apart (p < .05)"], rows))
        rows = win_rates(record, standings)
        if rows:
            title = f"{task}, {objective}: win rate, the share of coordinates that are not clipped"
            found.append((title, ["optimizer", "runs", "mean (least to most)"], rows))
        head, rows = attacked(record, task, objective)
        if any(not row[0].startswith("(") for row in rows):
            found.append((f"{task}, {objective}: knowledge of the forget set after attacks", head, rows))
    rows = precision(record)
    if rows:
        head = ["measure", "models", "mean difference", "largest difference"]
        found.append(("Measured in training's precision, against the weights' own", head, rows))
    return found


def _saturated(standings: Sequence[Standing]) -> str:
    """Return what to add to a title where the best first-order side leaves too little to tell."""
    least = next((statistics.mean(s.lost.values()) for s in rivals(standings)), 1.0)
    return f" (saturated: the best first-order side loses less than {SATURATED})" if least < SATURATED else ""


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
        found = [d for r in requests for d in record.distances(s, r)]
        if found:
            rejected = sum(p < 0.05 for _, _, p in found)
            mean, margin = statistics.mean(d for d, _, _ in found), max(m for _, m, _ in found)
            rows.append([s.cell.optimizer, f"{mean:.3f} (one run's: +- {margin:.2f})", str(len(found)), str(rejected)])
    return rows


def attacked(record: ContestRecord, task: str, objective: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of what attacks bring back: knowledge ``K`` of the forget set, before -> after.

    A row for the model before, the retrained one and each side's best setting; means over the report requests that all
    of these were attacked on. Examples that an attacker had are left out, before and after: they are learned, not
    recovered. They stand in a column of their own, since an attack that does not even teach these is none, and so do
    unseen answers, since an attack that ruins the model brings nothing back either.
    """
    titles = {("before", -1): "(before)", ("gold", -1): "(retrained)", **_sides(record, task, objective)}
    known: dict[str, dict[str, dict[str, Pair]]] = {}
    for x in record.lines:
        if x["kind"] == "attack" and x["task"] == task and x.get("objective") in (None, objective):
            name = titles.get((x.get("optimizer") or x["which"], x.get("point", -1)))
            whole = x["measures"][-1]["values"] if x.get("measures") else None
            if "which" in x:
                whole = references_of(record.lines, task, x["request"], full=True).get(x["which"])
            if name and whole and "knowledge" in whole:  # records of earlier versions lack it
                judged = {k: pair for how, v in x["attacked"].items() for k, pair in _judged(how, whole, v).items()}
                known.setdefault(name, {})[x["request"]] = judged
    shared = set.intersection(*(set(many) for many in known.values())) if known else set()
    found = [one for many in known.values() for r, one in many.items() if r in shared]
    names = [n for n in found[0] if all(n in one for one in found)] if found else []
    rows = []
    for who in sorted(known if names else (), key=lambda name: (not name.startswith("("), name)):
        pairs = [[known[who][r][name] for r in sorted(shared)] for name in names]
        means = [tuple(statistics.mean(side) for side in zip(*many, strict=True)) for many in pairs]
        rows.append([who, str(len(shared)), *(f"{before:.3f} -> {after:.3f}" for before, after in means)])
    return ["model", "requests", *names], rows


def _sides(record: ContestRecord, task: str, objective: str) -> dict[tuple[str, int], str]:
    """Return each side's best setting, as (optimizer, point), with what tables call it.

    Of the cells that are through with all report requests: a control on some of them holds up nothing.
    """
    standings = [record.standing(cell) for cell in record.cells(task, objective)]
    requests = record.tasks[task]["report"]
    whole = {s.cell: s.chosen for s in standings if len(s.lost) == len(requests)}
    best = sides(record.lines, whole, {name: str(e["order"]) for name, e in record.entries.items()}, requests)
    return {(cell.optimizer, number): cell.optimizer for cell, number in best.values()}


def _judged(name: str, untouched: Mapping[str, Any], attacked: Mapping[str, Any]) -> dict[str, Pair]:
    """Return an attack's columns, before and after; none where the attacker had every example.

    Knowledge of the examples that it did not have, of those that it had, and the probability of unseen answers.
    """
    had = set(attacked["had"])
    if len(had) == len(untouched["knowledge"]):
        return {}

    def known(own: bool) -> Pair:
        before, after = (
            statistics.mean(value for i, value in enumerate(side["knowledge"]) if (i in had) == own)
            for side in (untouched, attacked)
        )
        return before, after

    found = {name: known(own=False)} | ({f"{name}: the attacker's own": known(own=True)} if had else {})
    return found | {f"{name}: unseen": (untouched["unseen_probability"], attacked["unseen_probability"])}


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


def mean_attained(found: Sequence[Sequence[Point]], grid: np.ndarray) -> np.ndarray:
    """Return the mean over requests of what is attained, and at least the floor: above it lies the mean lost area."""
    return np.mean([np.maximum(attained(points, grid), FLOOR) for points in found], axis=0)


def frontier_plot(record: ContestRecord, task: str, objective: str, name: str) -> str:
    """Return the frontiers of a square: utility against forgetting, mean over requests, one line an optimizer.

    On the report requests where all sides have some, else on those that are tuned on.
    """
    standings = [record.standing(cell) for cell in record.cells(task, objective)]
    kind = "report" if all(s.lost for s in standings) else "tune"
    grid = np.linspace(0, 1, 201)
    with matplotlib.rc_context(plots._STYLE):
        figure, axes = plots._axes(6.4, 4.4)
        for i, s in enumerate(standings, 1):
            requests = list(s.lost) if kind == "report" else record.tasks[task]["tune"]
            found = [
                points_of(record.lines, s.cell, kind, r, s.chosen or None)
                for r in requests
                if len(references_of(record.lines, task, r, full=kind == "report")) == 2
            ]
            if any(found):
                mean = mean_attained(found, grid)
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
            for i, name in enumerate((s.cell.optimizer for s in standings), 1)
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
