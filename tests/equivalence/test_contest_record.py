"""The committed contests, calculated again from the rules' words (docs/results/contest.md) by code that shares none."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean

from soul.report.standings import ContestRecord, rivals

RESULTS = Path(__file__).parents[2] / "docs/results"
KNOWN = ("paraphrased_probability", "extraction_strength", "paraphrased_rougeL")
KEPT = ("unseen_probability", "real_authors_probability", "world_facts_probability")


class Again:
    """A record's areas; the third measure of knowledge is of reports alone."""

    def __init__(self, folder: Path) -> None:
        self.lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        self.references = {(x["request"], x["which"]): x for x in self.lines if x["kind"] == "reference"}

    def points(self, line: dict[str, Any], *, relative: bool) -> list[tuple[float, float]]:
        full = line["kind"] == "report"
        before, gold = (self.references[line["request"], w]["full" if full else "thin"] for w in ("before", "gold"))
        know = [np.mean([v[name] for name in KNOWN[: 3 if full else 2]]) for v in (before, gold)]
        found = []
        for values in (measure["values"] for measure in line["measures"]):
            now = np.mean([values[name] for name in KNOWN[: 3 if full else 2]])
            forgotten = float(np.clip((know[0] - now) / (know[0] - know[1]), 0, 1))
            text = min(1.0, math.exp(before["text_nll"] - values["text_nll"]))
            if relative:
                kept = hmean([*(min(1.0, values[name] / before[name]) for name in KEPT), text])
            else:
                sides = [hmean([*(v[name] for name in KEPT), t]) for v, t in ((values, text), (before, 1.0))]
                kept = min(1.0, sides[0] / sides[1])
            found.append((forgotten, float(kept)))
        return found

    def lost(self, cell: Any, kind: str, request: str, numbers: tuple[int, ...], *, relative: bool) -> float:
        of = (kind, request, cell.objective, cell.optimizer)
        names = ("kind", "request", "objective", "optimizer")
        runs = [x for x in self.lines if tuple(x.get(n) for n in names) == of and x["point"] in numbers]
        points = [p for run in runs for p in self.points(run, relative=relative)]
        steps = sorted({0.0, 1.0, *(f for f, _ in points)})
        parts = itertools.pairwise(steps)
        area = sum((b - a) * max(0.0, max((u for f, u in points if f >= b), default=0.0) - 0.5) for a, b in parts)
        return 1 - area / 0.5


@pytest.mark.parametrize(
    ("folder", "cells"), [("contest-twelve", 10), ("contest-fresh", 10), ("contest-four", 4), ("contest-controls", 8)]
)
@pytest.mark.parametrize("relative", [False, True])
def test_lost_areas_are_those_of_the_rules(folder, cells, relative):
    record, again = ContestRecord(RESULTS / folder), Again(RESULTS / folder)
    judged = [s for _, _, many in record.squares(relative=relative) for s in many if s.lost]
    assert len(judged) >= cells
    for s in judged:
        chosen = tuple(s.chosen)
        for request, lost in s.lost.items():
            assert again.lost(s.cell, "report", request, chosen, relative=relative) == pytest.approx(lost, abs=1e-9)
        (tune,) = record.tasks[s.cell.task]["tune"]
        sets = itertools.combinations(range(record.sizes(s.cell)[0]), len(chosen))
        least = min(again.lost(s.cell, "tune", tune, numbers, relative=relative) for numbers in sets)
        assert again.lost(s.cell, "tune", tune, chosen, relative=relative) == pytest.approx(least, abs=1e-9)


def test_the_rivals_of_the_page_are_those_of_the_record():
    found = {o: rivals(many)[0].cell.optimizer for _, o, many in ContestRecord(RESULTS / "contest-twelve").squares()}
    assert found == {"npo": "lion, the curvature's examples to retain", "grad_diff": "lion"}
