"""A contest's folder read: what each cell showed, by either utility."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soul.metrics.contest import Cell, choose, points_of, read_lines, references_of, runs_of
from soul.metrics.frontier import forgetting_at, lost_area
from soul.metrics.stats import ks_margin, ks_two_sided
from soul.strict import read_text, yaml_tree


@dataclasses.dataclass(frozen=True)
class Standing:
    """What one cell showed.

    Attributes:
        cell: The cell.
        order: ``first`` or ``second``.
        tuned: Trials by state.
        tuning_loss: Lost area of the chosen trials on the tuning requests; nan where none are chosen yet.
        offered: Lost area of all trials together there.
        chosen: Numbers of the chosen trials; empty before tuning is done.
        lost: Lost area by report request.
        at95: Forgetting at a utility of .95 by report request.
        warm: Median seconds of a run, those that its curvature took left out, since some find it in the cache: of the
            runs on report requests, which come last, and of trials before there are any.
        cold: The same and the seconds of the pilot's curvature, which the cache had not.
        memory: Largest peak memory in bytes.
    """

    cell: Cell
    order: str
    tuned: dict[str, int]
    tuning_loss: float
    offered: float
    chosen: list[int]
    lost: dict[str, float]
    at95: dict[str, float]
    warm: float
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

    def standing(self, cell: Cell, *, relative: bool = False, settings: int = 0) -> Standing:
        """Return what a cell showed so far, by either utility, with so many settings (0: as many as go on)."""
        task = self.tasks[cell.task]
        points, most = self.sizes(cell)
        most = settings or most
        tuned = [x for r in task["tune"] for x in runs_of(self.lines, cell, "tune", r) if x["point"] < points]
        chosen = choose(self.lines, cell, task["tune"], points, most, relative=relative) or []
        known, judged = (
            [r for r in task[phase] if len(references_of(self.lines, cell.task, r, full=False)) == 2]
            for phase in ("tune", "report")
        )

        def tuning(numbers: list[int] | None) -> float:
            losses = [lost_area(points_of(self.lines, cell, "tune", r, numbers, relative=relative)) for r in known]
            return float(np.mean(losses)) if losses else float("nan")

        reported = {r: runs_of(self.lines, cell, "report", r) for r in judged}
        whole = {
            r: points_of(self.lines, cell, "report", r, chosen, relative=relative)
            for r, x in reported.items()
            if chosen and {line["point"] for line in x}.issuperset(chosen)
        }
        runs = [x for x in [*tuned, *(x for many in reported.values() for x in many)] if x["state"] == "done"]
        timed = [x for x in runs if x["kind"] == "report"] or runs
        pilots = [x for r in task["tune"] for x in runs_of(self.lines, cell, "pilot", r)]
        took = [x["seconds"]["train"] - x["seconds"]["curvature"] for x in timed]
        warm = statistics.median(took) if took else float("nan")
        return Standing(
            cell=cell,
            order=str(self.entries[cell.optimizer]["order"]),
            tuned={s: sum(x["state"] == s for x in tuned) for s in ("done", "stopped", "lost")},
            tuning_loss=tuning(chosen) if chosen else float("nan"),
            offered=tuning(None),
            chosen=chosen,
            lost={r: lost_area(offered) for r, offered in whole.items()},
            at95={r: forgetting_at(offered, 0.95) for r, offered in whole.items()},
            warm=warm,
            cold=warm + max((x["seconds"]["curvature"] for x in pilots), default=0.0),
            memory=max((x["peak_memory_bytes"] for x in runs), default=0),
        )

    def sizes(self, cell: Cell) -> tuple[int, int]:
        """Return how many trials a cell is to have, and how many of them go on."""
        entry, budget = self.entries[cell.optimizer], self.budget
        return int(entry.get("points") or budget["points"]), int(entry.get("settings") or budget["settings"])

    def trial_losses(self, standing: Standing, *, relative: bool = False) -> list[float]:
        """Return the lost area of each trial alone, the mean over the tuning requests; empty before all are done."""
        cell = standing.cell
        tune = self.tasks[cell.task]["tune"]
        return [
            float(np.mean([lost_area(points_of(self.lines, cell, "tune", r, [i], relative=relative)) for r in tune]))
            for i in range(self.sizes(cell)[0] if standing.chosen else 0)
        ]

    def cells(self, task: str, objective: str) -> list[Cell]:
        """Return the cells of a square: of the entries that take part under its objective, in the order of the file."""
        return [
            Cell(task, objective, name)
            for name, entry in self.entries.items()
            if objective in (entry.get("objectives") or self.objectives)
        ]

    def squares(self, *, relative: bool = False, settings: int = 0) -> list[tuple[str, str, list[Standing]]]:
        """Return the standings of each (task, objective), with so many settings a cell (0: as many as go on)."""

        def standings(task: str, objective: str) -> list[Standing]:
            return [self.standing(c, relative=relative, settings=settings) for c in self.cells(task, objective)]

        return [(t, o, standings(t, o)) for t in self.tasks for o in self.objectives]

    def distances(self, standing: Standing, request: str) -> list[tuple[float, float, float]]:
        """Return, for the final models of a cell's chosen trials, how far each is from the retrained one.

        Of each, TOFU's KS statistic, its margin and its p-value. A run that was lost, or whose truth ratios are no
        numbers, is as far as can be: 1, at a p-value of 0.
        """
        cell = standing.cell
        gold = references_of(self.lines, cell.task, request, full=True).get("gold", {}).get("log_truth_ratios")
        found = []
        for line in runs_of(self.lines, cell, "report", request):
            if line["point"] not in standing.chosen:
                continue
            final = [m["values"] for m in line["measures"] if m["share"] == 1.0 and line["state"] == "done"]
            mine = final[-1].get("log_truth_ratios") if final else None
            if gold and mine:
                statistic, p = ks_two_sided(mine, gold)
                found.append((statistic, ks_margin(len(mine), len(gold)), p))
            elif gold:
                found.append((1.0, 0.0, 0.0))
        return found


def rivals(standings: Sequence[Standing]) -> list[Standing]:
    """Return the first-order sides, the best first, by the mean lost area.

    Of those on as many requests as any of them: a side that was on the easiest alone is no one's rival.
    """
    first = [s for s in standings if s.order == "first" and s.lost]
    most: set[str] = max((set(s.lost) for s in first), key=len, default=set())
    return sorted((s for s in first if set(s.lost) == most), key=lambda s: statistics.mean(s.lost.values()))
