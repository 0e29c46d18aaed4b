"""Whether two contests are one: what their trials have in common, and what a line on record was run with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from soul import config
from soul.contest.matrix import Matrix, Task, read_matrix


def check_line(file: Path, line: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Refuse a line on record that is not what would be run now, as far as both say what they are.

    Args:
        file: Where the line is, for the message.
        line: The line; ``of`` in it says what was run.
        now: What would be run.
        remedy: What to do where they differ.

    Raises:
        ValueError: It had other settings, other data, or another model at the same path.
    """
    was, is_now = config.flat(line.get("of", {})), config.flat(now)
    for name in was:  # of a setting that only one version has nothing is known
        if name in is_now and config.plain(was[name]) != config.plain(is_now[name]):
            raise ValueError(
                f"{file}: {line['key']} was run with {name} {was[name]!r}, and would be run with {is_now[name]!r} now: "
                f"{remedy}"
            )


def check_same(file: Path, matrix: Matrix, remedy: str) -> None:
    """Refuse a matrix whose trials are not those of an earlier one.

    More points, cells, requests or settings may join a contest; what its trials have in common may not change.

    Args:
        file: The earlier matrix.
        matrix: The one to be held now.
        remedy: What to do where they differ, as the message's end.

    Raises:
        ValueError: They differ, or the earlier one cannot be read.
    """
    try:
        earlier = read_matrix(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): {remedy}") from error
    trained, before = config.plain(matrix.training), config.plain(earlier.training)
    pairs = [("training", before, trained), ("seed", earlier.seed, matrix.seed)]
    free = {"points", "settings"}
    budgets = [{k: v for k, v in config.plain(x.budget).items() if k not in free} for x in (earlier, matrix)]
    pairs.append(("budget", *budgets))
    pairs += [
        (f"tasks.{n}.{k}", getattr(t, k), getattr(matrix.tasks[n], k))
        for n, t in earlier.tasks.items()
        if n in matrix.tasks
        for k in (f.name for f in dataclasses.fields(Task) if f.name not in ("tune", "report"))
    ]
    pairs.append(("evaluation", earlier.evaluation, matrix.evaluation))
    pairs += [
        (f"objectives.{name}", earlier.objective(name, {}), matrix.objective(name, {}))
        for name in earlier.objective_names
        if name in matrix.objective_names
    ]
    pairs += [
        (f"attacks.{name}", earlier.attackers[name], attack)
        for name, attack in matrix.attackers.items()
        if name in earlier.attackers
    ]
    wide = {"objectives": [], "points": 0, "settings": 0}
    old, new = ({e.name: dataclasses.replace(e, **wide) for e in m.optimizers} for m in (earlier, matrix))
    pairs += [(f"optimizers.{name}", old[name], entry) for name, entry in new.items() if name in old]
    for name, was, now in pairs:
        if was != now:
            raise ValueError(
                f"{file.parent} holds trials of another contest ({name} was {was!r} there and is {now!r} now): {remedy}"
            )
