"""The report requests of several contests together, of the sides that all of them have.

    python experiments/contest_together.py docs/results/contest-twelve docs/results/contest-fresh [--settings 1]

Prints, for each objective and by either utility, what `soul report` prints of one contest: every side's lost area, its
ratio to the best first-order side's with the paired bootstrap interval over all requests, and how many of these it won,
tied and lost. The contests must have chosen the same settings, as one does that took the other's trials over.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from soul.metrics.contest import Cell
from soul.report.contest import verdict
from soul.report.standings import ContestRecord, Standing

HEAD = """\
| side | settings | requests | lost area | of the rival's | won / tied / lost |
|---|---|---|---|---|---|"""


def standings_of(square: list[tuple[str, str, list[Standing]]], task: str, objective: str) -> dict[Cell, Standing]:
    """Return a contest's standings of one task and objective, by cell."""
    return {s.cell: s for t, o, many in square for s in many if (t, o) == (task, objective)}


def joined(parts: list[Standing]) -> Standing:
    """Return what one side showed on the requests of all contests.

    Raises:
        ValueError: It was given other settings in one of them, or a request is in two.
    """
    first = parts[0]
    if any(part.chosen != first.chosen for part in parts):
        chosen = "; ".join(str(part.chosen) for part in parts)
        raise ValueError(f"{first.cell.optimizer} under {first.cell.objective} has other settings in each: {chosen}")
    requests = [request for part in parts for request in part.lost]
    if len(set(requests)) < len(requests):
        raise ValueError(f"a request is in more than one of the contests: {', '.join(requests)}")
    lost = {request: value for part in parts for request, value in part.lost.items()}
    at95 = {request: value for part in parts for request, value in part.at95.items()}
    return dataclasses.replace(first, lost=lost, at95=at95)


def main() -> None:
    """Join and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of contests")
    parser.add_argument(
        "--settings", type=int, default=0, help="with so many settings of each (default: as the matrices say)"
    )
    args = parser.parse_args()
    records = [ContestRecord(folder) for folder in args.folders]
    for relative in (False, True):
        squares = [record.squares(relative=relative, settings=args.settings) for record in records]
        for task, objective, standings in squares[0]:
            sides = [standings_of(square, task, objective) for square in squares]
            cells = [s.cell for s in standings if all(s.cell in side and side[s.cell].lost for side in sides)]
            if not cells:
                continue
            try:
                rows = verdict([joined([side[cell] for side in sides]) for cell in cells])
            except ValueError as error:
                parser.error(str(error))
            print(f"\n{task}, {objective}" + (", each part of utility by its own before" if relative else ""))
            print(HEAD)
            for name, _, _, settings, requests, lost, ratio, wins, *_ in rows:
                print(f"| {name} | {settings} | {requests} | {lost} | {ratio} | {wins} |")


if __name__ == "__main__":
    main()
