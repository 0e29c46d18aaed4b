"""Runs one after another: deletion requests, each on the model that the one before left, and one recipe's seeds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from soul import processes
from soul.recipe import Recipe
from soul.run import execute
from soul.stored import publish, writing

Progress = Callable[[str, int, int], None]


def run_sequence(
    recipe: Recipe, requests: Sequence[str], out: Path, *, progress: Progress | None = None, evaluate_it: bool = True
) -> list[Path]:
    """Forget one source after another, and measure after each: MUSE's sustainability (arXiv 2407.06460, section 3).

    Request ``k`` is a run of its own, in ``out/request-k``: the recipe, with the ``k``-th source to forget and, from
    the second on, the model that request ``k - 1`` left. References (NPO's) and the stopping rule's budget are of that
    model, and what the requests before took away is not given back: a retain set that holds it is refused
    (:func:`soul.inputs.keep_forgotten`). What was measured after one request is what is measured before the
    next, and is not measured twice. The same call continues what was interrupted.

    Args:
        recipe: The run; its ``data.forget`` is not looked at.
        requests: What to forget, a source each (see :func:`soul.data.sources.load_examples`).
        out: Folder of the runs.
        progress: Called with (what, done, of).
        evaluate_it: Measure before the first request and after each; otherwise only train and save.

    Returns:
        The run directories, in order.

    Raises:
        ValueError: There is no request, the same one is given twice, an adapter is kept apart from its weights, or a
            run is refused (:func:`soul.run.execute`).

    Example:
        >>> run_sequence(recipe, ["sust_1.jsonl", "sust_2.jsonl"], Path("runs/sust"))  # doctest: +SKIP
    """
    if not requests:
        raise ValueError("a sequence needs at least one source to forget")
    twice = [source for i, source in enumerate(requests) if source in requests[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} is to be forgotten twice: a sequence is of different requests")
    if recipe.adapter is not None and not recipe.adapter.merge:
        raise ValueError("a sequence changes the same weights again and again: set adapter.merge=true")
    folders: list[Path] = []
    for k, source in enumerate(requests, 1):
        folder = out / f"request-{k}"
        step = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, forget=source))
        if folders:
            step = dataclasses.replace(step, model=recipe.model.at(folders[-1] / "model"))
            measured = folders[-1] / "rows/after"
            wanted = evaluate_it and measured.is_dir() and not (folder / "rows/before").exists()
            if wanted and processes.is_main():
                # without a benchmark of the whole sequence, what was forgotten before is no part of this one's report
                _copy(measured, folder / "rows/before", without="" if recipe.benchmark else "forget*")
        execute(step, folder, progress=_named(progress, k, len(requests)), evaluate_it=evaluate_it)
        folders.append(folder)
    return folders


def run_seeds(
    recipe: Recipe, seeds: Sequence[int], out: Path, *, progress: Progress | None = None, evaluate_it: bool = True
) -> list[Path]:
    """Run a recipe with each seed, in ``out/seed-N``; the model before is measured once, for all of them.

    Returns:
        The run directories, in the order of ``seeds``, which :func:`soul.report.write_report` shows together.

    Raises:
        ValueError: A run is refused (:func:`soul.run.execute`).

    Example:
        >>> run_seeds(recipe, [0, 1, 2], Path("runs/request"))  # doctest: +SKIP
    """
    folders: list[Path] = []
    for k, seed in enumerate(seeds, 1):
        folder = out / f"seed-{seed}"
        measured = out / f"seed-{seeds[0]}" / "rows/before"  # of a finetuning without a benchmark there are none
        wanted = evaluate_it and measured.is_dir() and not (folder / "rows/before").exists()
        if wanted and processes.is_main():
            _copy(measured, folder / "rows/before", without="")
        step = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=seed))
        execute(step, folder, progress=_named(progress, k, len(seeds), "seed"), evaluate_it=evaluate_it)
        folders.append(folder)
    return folders


def sequence_scores(folders: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """Return the scores before the first request, and after each.

    Raises:
        ValueError: A run was not measured.
    """
    found = []
    for folder in folders:
        if not (folder / "scores.json").is_file():
            raise ValueError(f"{folder} has no scores.json: run the sequence with measurements")
        found.append(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    return [found[0]["before"], *(scores["after"] for scores in found)] if found else []


def _copy(source: Path, target: Path, *, without: str) -> None:
    """Copy a folder, but for files of a name, so that it is either whole or absent."""
    part = target.with_name(f"{target.name}.part")
    with writing(target):
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(without))
        publish(part, target)


def _named(progress: Progress | None, k: int, of: int, kind: str = "request") -> Progress | None:
    return progress and (lambda what, done, n: progress(f"{kind} {k}/{of}, {what}", done, n))
