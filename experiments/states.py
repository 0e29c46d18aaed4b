"""What keeping an optimizer's averages in bf16 changes in quality, beside what another order of the data changes.

    soul bench recipes/contests/tofu20-states.yaml --out docs/results/contest-states
    python experiments/states.py docs/results/contest-states

For each rule and deletion request: the lost area of the contest with averages in bf16, and with the data in another
order, minus that of the plain run. Prints a Markdown table, and the means of the differences and of their sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from soul.metrics.contest import Cell, points_of
from soul.metrics.frontier import lost_area
from soul.stored import read_lines

VARIANTS = ("bf16 averages", "another order")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="folder of the contest")
    folder: Path = parser.parse_args().record
    lines = list(read_lines(folder / "trials.jsonl"))
    reports = [line for line in lines if line["kind"] == "report"]
    (task, objective), *others = {(line["task"], line["objective"]) for line in reports}
    assert not others, "one task and one objective"
    requests = sorted({line["request"] for line in reports})

    def lost(optimizer: str, request: str) -> float:
        return lost_area(points_of(lines, Cell(task, objective, optimizer), "report", request))

    print("| rule | other than plain | " + " | ".join(requests) + " | mean | mean size |")
    print("|---" * (len(requests) + 4) + "|")
    for rule in ("lion", "sophia"):
        for variant in VARIANTS:
            gaps = [lost(f"{rule}, {variant}", request) - lost(rule, request) for request in requests]
            cells = [*gaps, sum(gaps) / len(gaps)]
            size = sum(map(abs, gaps)) / len(gaps)
            print(f"| {rule} | {variant} | " + " | ".join(f"{value:+.3f}" for value in cells) + f" | {size:.3f} |")


if __name__ == "__main__":
    main()
