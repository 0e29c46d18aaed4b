"""From a contest's record to points, chosen settings and scores: pure functions of its lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from soul import stored
from soul.metrics.frontier import Point, forgetting, lost_area, relative_utility, utility

Line = Mapping[str, Any]
Values = Mapping[str, Any]
THIN = ("paraphrased_probability", "extraction_strength")
FULL = (*THIN, "paraphrased_rougeL")
"""What knowledge of the forget set is the mean of; thin measurements generate nothing."""
_KEPT = "_probability"
_NOT_KEPT = ("forget_probability", "paraphrased_probability", "seen_probability")


class Cell(NamedTuple):
    """One square of the matrix: who is judged on what."""

    task: str
    objective: str
    optimizer: str


def knowledge(values: Values, *, full: bool) -> float:
    """Return ``K``, what a model knows of the forget set: the mean of its measures."""
    return float(np.mean([_number(values[name]) for name in (FULL if full else THIN)]))


def _number(value: float | None) -> float:
    """Return nan for None, which stands for it in a record."""
    return math.nan if value is None else value


def point(values: Values, references: Mapping[str, Values], *, full: bool, relative: bool = False) -> Point:
    """Return forgetting and utility of a measurement (:mod:`soul.metrics.frontier`).

    Utility is of unseen retained answers, of facts and of general text; forgetting of the paraphrased question's answer
    (its probability and, in full, ROUGE-L) and of extraction strength.

    Args:
        values: The measurement.
        references: Those of the models ``before`` and ``gold``.
        full: Whether it was made in full.
        relative: Measure utility by :func:`soul.metrics.frontier.relative_utility`.
    """
    before, gold = references["before"], references["gold"]
    names = [n for n in before if n.endswith(_KEPT) and n not in _NOT_KEPT] + ["text_nll"]
    f = forgetting(*(knowledge(v, full=full) for v in (values, before, gold)))
    measure = relative_utility if relative else utility
    return f, measure({n: _number(values[n]) for n in names}, {n: before[n] for n in names})


def references_of(lines: Sequence[Line], task: str, request: str, *, full: bool) -> dict[str, Values]:
    """Return what the models ``before`` and ``gold`` measure on a request."""
    kind = "full" if full else "thin"
    return {
        x["which"]: x[kind] for x in lines if x["kind"] == "reference" and (x["task"], x["request"]) == (task, request)
    }


def runs_of(lines: Sequence[Line], cell: Cell, kind: str, request: str) -> list[Line]:
    """Return a cell's lines of a kind (``pilot``, ``tune``, ``report``) on a request."""
    return [
        x
        for x in lines
        if x["kind"] == kind
        and (x["task"], x["request"]) == (cell.task, request)
        and (x["objective"], x["optimizer"]) == (cell.objective, cell.optimizer)
    ]


def points_of(
    lines: Sequence[Line],
    cell: Cell,
    kind: str,
    request: str,
    numbers: Sequence[int] | None = None,
    *,
    relative: bool = False,
) -> list[Point]:
    """Return all points that a cell's runs (those of some ``numbers``) offer on a request."""
    full = kind == "report"
    references = references_of(lines, cell.task, request, full=full)
    return [
        point(measure["values"], references, full=full, relative=relative)
        for line in runs_of(lines, cell, kind, request)
        if numbers is None or line["point"] in numbers
        for measure in line["measures"]
    ]


def choose(
    lines: Sequence[Line],
    cell: Cell,
    requests: Sequence[str],
    points: int,
    settings: int,
    *,
    relative: bool = False,
) -> list[int] | None:
    """Return the trials whose joint frontier loses least area on the tuning requests; None before all are done.

    Every set of at most ``settings`` trials is tried, and the mean over requests counts. Of equals the smaller set is
    taken, so that a further trial joins only where it gains something, and of those the one that comes first.

    Args:
        lines: The record.
        cell: Whose trials.
        requests: Requests that are tuned on.
        points: Trials of a cell.
        settings: How many to choose, at most.
        relative: Measure utility by :func:`soul.metrics.frontier.relative_utility`.
    """
    for request in requests:
        if len(references_of(lines, cell.task, request, full=False)) < 2:
            return None
        if len({x["point"] for x in runs_of(lines, cell, "tune", request) if x["point"] < points}) < points:
            return None
    by = {(r, i): points_of(lines, cell, "tune", r, [i], relative=relative) for r in requests for i in range(points)}

    def loss(numbers: tuple[int, ...]) -> float:
        return float(np.mean([lost_area([p for i in numbers for p in by[r, i]]) for r in requests]))

    sets = (numbers for size in range(1, settings + 1) for numbers in itertools.combinations(range(points), size))
    return list(min(sets, key=lambda numbers: round(loss(numbers), 9)))  # rounding tells no two areas apart


def sides(
    lines: Sequence[Line], cells: Mapping[Cell, Sequence[int]], orders: Mapping[str, str], requests: Sequence[str]
) -> dict[str, tuple[Cell, int]]:
    """Return, for each order, the cell that loses least area on the report requests, and its better setting.

    An order that none of the cells is of is left out, as where an objective has entries of one order only.

    Args:
        lines: The record.
        cells: Cells of one task and objective, with the settings that went on to the report requests.
        orders: ``first`` or ``second``, by optimizer.
        requests: The report requests, all done.
    """

    def loss(cell: Cell, numbers: Sequence[int]) -> float:
        return float(np.mean([lost_area(points_of(lines, cell, "report", r, numbers)) for r in requests]))

    found: dict[str, tuple[Cell, int]] = {}
    for order in sorted(set(orders.values())):
        side = [cell for cell in cells if orders[cell.optimizer] == order]
        if not side:
            continue
        best = min(side, key=lambda cell: loss(cell, cells[cell]))
        found[order] = best, min(cells[best], key=lambda number: loss(best, [number]))
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a record, the first of each job.

    Raises:
        ValueError: A line is no JSON object with a ``key``, or of a newer version.
    """
    if not file.is_file():
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in stored.read_lines(file):
        stored.check_format("trial", line, file)
        if not isinstance(line.get("key"), str):
            raise ValueError(f"{file} holds a line that is not of a contest's record: it has no key")
        found.setdefault(line["key"], line)
    return list(found.values())
