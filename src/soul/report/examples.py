"""Answers before and after, example by example, gathered over runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from soul.report.record import RunRecord
from soul.report.view import kind_of, split_label, split_order
from soul.types import Row


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one model said to a prompt.

    Attributes:
        name: The model.
        run: Number of the run it came out of, from 1; 0 for a model as it came.
        text: The generated text; None where none was generated.
        probability: Probability of the true answer, geometric mean over tokens; None where it was not asked for.
    """

    name: str
    run: int
    text: str | None
    probability: float | None


@dataclasses.dataclass(frozen=True)
class ExampleView:
    """One example, and the answer of each model to it."""

    prompt: str
    truth: str
    subject: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class SplitView:
    """The examples shown of one split, and how many there are."""

    title: str
    kind: str
    total: int
    examples: tuple[ExampleView, ...]


def _answer(name: str, run: int, row: Row) -> Answer:
    chance = math.exp(-row["nll"]) if row["nll"] > -700 else math.nan
    return Answer(name, run, row.get("generated"), chance if row["tokens"] or not math.isnan(chance) else None)


def splits_of(runs: Sequence[RunRecord], limit: int = 20) -> tuple[SplitView, ...]:
    """Return up to ``limit`` examples of each split, with the answers of every run that measured them.

    An example is one across runs if its id, prompt and true answer agree. Its answer before is shown once where
    the runs agree on it.
    """
    names = {split for run in runs for split in (*run.rows_before, *run.rows_after)}
    views = []
    for split in sorted(names, key=split_order):
        found = _gather(runs, split)
        examples = tuple(
            ExampleView(row["prompt"], row["answer"], row["subject"], tuple(sorted(answers, key=lambda a: a.run)))
            for row, answers in list(found.values())[:limit]
        )
        if examples:
            views.append(SplitView(split_label(split), kind_of(split), len(found), examples))
    return tuple(views)


def _gather(runs: Sequence[RunRecord], split: str) -> dict[tuple[object, ...], tuple[Row, list[Answer]]]:
    """Return each example of ``split`` with its answers, in the order in which runs and rows come."""
    found: dict[tuple[object, ...], tuple[Row, list[Answer]]] = {}
    for index, run in enumerate(runs, start=1):
        after = run.label if len(runs) > 1 else "After"
        for name, number, stage in (("Before", 0, run.rows_before), (after, index, run.rows_after)):
            for position, row in enumerate(stage.get(split, ())):
                # ids may be empty: the position keeps such examples apart
                key = (row["id"] or position, row["prompt"], row["answer"])
                answers = found.setdefault(key, (row, []))[1]
                known = [answer for answer in answers if answer.run == number]
                if not known:
                    answers.append(_answer(name, number, row))
                elif number == 0 and all(answer.text != row.get("generated") for answer in known):
                    answers.append(_answer(f"Before: {run.label}", number, row))
    return found


def prominent(splits: Sequence[SplitView]) -> tuple[tuple[SplitView, ExampleView], ...]:
    """Return the first forgotten and the first kept example, and more only where a run did not measure those."""
    chosen: list[tuple[SplitView, ExampleView]] = []
    for kind in ("forget", "kept"):
        split = next((split for split in splits if split.kind == kind), None)
        covered: set[int] = set()
        for example in split.examples if split else ():
            runs = {answer.run for answer in example.answers}
            if split and not runs <= covered:
                covered |= runs
                chosen.append((split, example))
    return tuple(chosen)
