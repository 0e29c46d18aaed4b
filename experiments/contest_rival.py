"""A contest's report requests against a rival of one's choice, where `soul report` takes the best first-order side.

    python experiments/contest_rival.py docs/results/contest-scarce lion [--settings 1]

Prints, for each objective and by either utility, every side's lost area and its ratio to the rival's with the paired
bootstrap interval over requests, how many of these it won, tied and lost, and how probable answers that nobody saw are
at the end of its run, by request.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from soul.metrics.contest import runs_of
from soul.report.contest import against
from soul.report.standings import ContestRecord, Standing


def unseen(record: ContestRecord, standing: Standing, request: str) -> float:
    """Return the mean probability of unseen answers at the end of the chosen runs on a request."""
    runs = [x for x in runs_of(record.lines, standing.cell, "report", request) if x["point"] in standing.chosen]
    ends = [[m for m in x["measures"] if m["share"] == 1.0][-1]["values"]["unseen_probability"] for x in runs]
    return statistics.mean(ends)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the contest")
    parser.add_argument("rival", help="what tables call it")
    parser.add_argument(
        "--settings", type=int, default=0, help="with so many settings of each (default: as the matrix says)"
    )
    args = parser.parse_args()
    record = ContestRecord(args.folder)
    if args.rival not in record.entries:
        parser.error(f"{args.folder} knows no {args.rival!r}; it has: {'; '.join(record.entries)}")
    for relative in (False, True):
        for task, objective, standings in record.squares(relative=relative, settings=args.settings):
            by_name = {s.cell.optimizer: s for s in standings if s.lost}
            if args.rival not in by_name:
                continue
            print(f"\n{task}, {objective}" + (", each part of utility by its own before" if relative else ""))
            print("| side | lost area | of the rival's | won / tied / lost | unseen answers |\n|---|---|---|---|---|")
            for name, s in sorted(by_name.items(), key=lambda pair: statistics.mean(pair[1].lost.values())):
                ratio, wins = against(s, by_name[args.rival])
                kept = ", ".join(f"{unseen(record, s, r):.2f}" for r in s.lost)
                print(f"| {name} | {statistics.mean(s.lost.values()):.3f} | {ratio} | {wins} | {kept} |")


if __name__ == "__main__":
    main()
