"""Whether what a run forgot is what it saw: knowledge at its end of forgotten questions that its steps visited or not.

    python experiments/contest_seen.py docs/results/contest-four/matrix.yaml docs/results/contest-four

A run of few steps sees a part of the forget set. Of every side's first chosen setting, mean over report requests: how
many of the measured questions were visited, knowledge ``K`` (:func:`soul.metrics.contest.knowledge`) before, at the
end of these and of the others, and of both in the retrained models. The batches are those of the contest: a function of
data, tokenizer and seed. Needs the contest's data and its model's tokenizer, and no weights.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from soul.contest.matrix import Matrix, Task, read_matrix
from soul.data.batches import PairSampler
from soul.data.general import refusals
from soul.data.sources import load_examples
from soul.metrics.contest import references_of, runs_of
from soul.pretrained import load_tokenizer
from soul.report.standings import ContestRecord
from soul.trainer import make_dataset


def visited(matrix: Matrix, task: Task, tokenizer: Any, optimizer: str, objective: str, request: str) -> set[int]:
    """Return which rows of the forget set a run of a side visits."""
    entry = matrix.entry(optimizer)
    forget, retain, curvature = (load_examples(task.source(n, request)) for n in ("forget", "retain", "curvature"))
    if entry.extra_retain:
        retain, curvature = [*retain, *curvature], []
    training = matrix.training
    asked = matrix.objective(objective, {})
    dataset = make_dataset(tokenizer, forget, retain, asked, training, refusals(), curvature)
    sampler = PairSampler(dataset, training.batch_size)
    found: set[int] = set()
    left = (entry.steps or training.max_steps) * training.accumulation
    epoch = 0
    while left:
        sampler.set_epoch(epoch)
        for batch in itertools.islice(sampler, left):
            found.update(anchor for _, anchor, _ in batch)
            left -= 1
        epoch += 1
    return found


def main() -> None:
    """Calculate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path)
    parser.add_argument("folder", type=Path, help="folder of the contest")
    args = parser.parse_args()
    matrix, record = read_matrix(args.matrix), ContestRecord(args.folder)
    print("| side | visited | K before | visited, at the end | others, at the end | retrained: visited | others |")
    print("|---|---|---|---|---|---|---|")
    for _, objective, standings in record.squares(relative=False, settings=1):
        for s in standings:
            task = matrix.tasks[s.cell.task]
            tokenizer = load_tokenizer(task.model)
            rows = []
            for request in s.lost:
                whole = {(e.prompt, e.answer): i for i, e in enumerate(load_examples(task.source("forget", request)))}
                source = task.source("forgotten" if task.forgotten else "forget", request)
                places = [whole[e.prompt, e.answer] for e in load_examples(source)]
                saw = visited(matrix, task, tokenizer, s.cell.optimizer, objective, request)
                (run,) = (x for x in runs_of(record.lines, s.cell, "report", request) if x["point"] == s.chosen[0])
                end = [m for m in run["measures"] if m["share"] == 1.0][-1]["values"]["knowledge"]
                known = references_of(record.lines, s.cell.task, request, full=True)
                columns = (known["before"]["knowledge"], end, known["gold"]["knowledge"])
                parts = [
                    [[c[i] for i, at in enumerate(places) if (at in saw) == w] for c in columns] for w in (True, False)
                ]
                rows.append((len(parts[0][0]) / len(places), parts))
            if not rows or any(not part[0] for _, parts in rows for part in parts):
                continue  # all of it was visited

            def mean(which: int, column: int, rows: list[Any] = rows) -> str:
                return f"{statistics.mean(statistics.mean(parts[which][column]) for _, parts in rows):.3f}"

            before = statistics.mean(statistics.mean(parts[0][0] + parts[1][0]) for _, parts in rows)
            share = f"{statistics.mean(share for share, _ in rows):.0%}"
            cells = (mean(0, 1), mean(1, 1), mean(0, 2), mean(1, 2))
            print(f"| {s.cell.optimizer} ({objective}) | {share} | {before:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
