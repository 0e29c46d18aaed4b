"""What second order costs in a contest: the same runs, taken in turns, with and without curvature in the cache.

    python experiments/contest_cost.py recipes/contests/tofu20-scarce.yaml docs/results/contest-scarce --rounds 5

Each round trains every side once at the setting that the contest chose, on its first report request, without measuring:
a side with curvature first with an empty cache, then again with what that left there. Rounds alternate their order. A
line of ``cost.jsonl`` in the contest's folder is a run; an interrupted experiment goes on with the next round. Prints,
for each objective and side, the median seconds and the median over rounds of its ratio to the reference side of the
same round, with the least and the largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from soul.cli import progress_bars
from soul.console import quiet
from soul.contest.jobs import Contest, Job
from soul.contest.matrix import Matrix, read_matrix
from soul.contest.trial import do
from soul.machine import environment
from soul.metrics.contest import Cell, choose
from soul.stored import append_line, read_lines

SIDES = ("lion", "adamw", "sophia", "kfac, every 4th step", "kfac")
Line = dict[str, Any]


def jobs(contest: Contest, matrix: Matrix, objective: str, sides: list[str]) -> dict[str, Job]:
    """Return the report run of each side at its chosen setting, on the first report request."""
    task = next(iter(matrix.tasks))
    found = {}
    for name in sides:
        cell = Cell(task, objective, name)
        chosen = choose(contest.book.lines(), cell, matrix.tasks[task].tune, *matrix.sizes(name))
        if not chosen:
            raise ValueError(f"{name} is not tuned under {objective}: run the contest first")
        found[name] = Job("report", task, matrix.tasks[task].report[0], cell, chosen[0])
    return found


def one_round(contest: Contest, sides: dict[str, Job], number: int, tick: Any) -> list[Line]:
    """Run every side, those with curvature twice, and return a line for each run."""
    names = list(sides) if number % 2 == 0 else list(sides)[::-1]
    found = []
    for name in names:
        run = dataclasses.replace(contest.run_of(sides[name]), checkpoints=(), interpolate=(), full=False)
        curved = run.optimizer is not None and run.optimizer.needs_curvature
        with tempfile.TemporaryDirectory() as cache:
            os.environ["SOUL_CACHE"] = cache
            for state in ("cold", "warm") if curved else ("cold",):
                line = do(run, lambda _what, d, n: tick(name, d, n))  # noqa: B023 - called before the name changes
                found.append({"round": number, "side": name, "cache": state, "seconds": line["seconds"]})
    return found


def table(lines: list[Line], rival: str, objective: str) -> list[str]:
    """Return the Markdown table of an objective."""
    named = (
        f"`{objective}`",
        "curvature",
        "runs",
        "s a run",
        "of these curvature",
        f"ratio to {rival} (least to most)",
    )
    rows = ["| " + " | ".join(named) + " |"]
    rows.append("|---" * 6 + "|")
    took = {(x["side"], x["cache"], x["round"]): x["seconds"] for x in lines}
    for side, cache in dict.fromkeys((x["side"], x["cache"]) for x in sorted(lines, key=lambda x: x["round"])):
        mine = {r: s for (name, state, r), s in took.items() if (name, state) == (side, cache)}
        ratios = [s["train"] / took[rival, "cold", r]["train"] for r, s in mine.items()]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds = [statistics.median(s[part] for s in mine.values()) for part in ("train", "curvature")]
        curved = any(name == side and state == "warm" for name, state, _ in took)
        cells = [side, cache if curved else "none", str(len(mine)), *(f"{s:.1f}" for s in seconds), spread]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path)
    parser.add_argument("folder", type=Path, help="folder of the contest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objectives", nargs="*", metavar="NAME", help="by default the contest's first")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), metavar="NAME")
    args = parser.parse_args()
    quiet()
    record = args.folder / "cost.jsonl"
    lines: list[Line] = list(read_lines(record)) if record.is_file() else []
    if lines and {x["side"] for x in lines} != set(args.sides):
        parser.error(
            f"{record} is of other --sides ({'; '.join(sorted({x['side'] for x in lines}))}): name these, or move it"
        )
    matrix = read_matrix(args.matrix)
    contest = Contest(matrix, args.folder)
    first = matrix.objective_names[0]
    wanted: list[str] = args.objectives or [first]
    if unknown := set(wanted) - set(matrix.objective_names):
        parser.error(f"the contest has no {', '.join(sorted(unknown))}; it has {', '.join(matrix.objective_names)}")
    sides = {objective: jobs(contest, matrix, objective, args.sides) for objective in wanted}
    where = {"threads": torch.get_num_threads(), "processor": environment()["processor"]}
    with progress_bars() as tick:
        for number, objective in itertools.product(range(args.rounds), wanted):
            if any(x["round"] == number and x.get("objective", first) == objective for x in lines):
                continue
            new = one_round(contest, sides[objective], number, tick)
            new = [{"format": 1, "objective": objective, **line, **where} for line in new]
            for line in new:  # a round that was cut short is taken again
                append_line(record, line)
            lines += new
    found = ([x for x in lines if x.get("objective", first) == objective] for objective in wanted)
    print("\n\n".join("\n".join(table(x, args.sides[0], name)) for name, x in zip(wanted, found, strict=True)))


if __name__ == "__main__":
    main()
