"""How near `soul plan` comes to what is then measured: peak memory and seconds a step, at 135M parameters.

    python benchmarks/plan_accuracy.py --tofu ../shared/data/tofu --threads 2

Each run is planned and then made, in a process of its own that reads no other's memory: TOFU's ``forget01`` to forget,
``retain99`` to keep, in full and with LoRA, under several optimizers. Peak memory is the process's high-water mark from
the moment the model is loaded; a step's time is the mean over all but the first, so that curvature passes count as
often as they come. Plan and run take turns in one process, so that both meet the machine in the same state. Wanted:
memory within 15 %, time within 30 %. ``--quick`` is a smoke run of two cells, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from _machine import cpu_name, in_own_process, table
from soul.machine import peak_memory, reset_peak_memory
from soul.recipe import Recipe, recipe_from_tree

GB = 1e9
ADAPTERS: dict[str, dict[str, Any] | None] = {"full": None, "LoRA": {"r": 8}}
OPTIMIZERS = ("adamw", "signum", "sophia", "kfac", "whiten", "muon")
QUICK = ("adamw",)
WANTED = {"memory": 0.15, "time": 0.30}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A plan beside its run.

    Attributes:
        trained: ``full`` or ``LoRA``.
        optimizer: The rule.
        planned_bytes: Peak memory by the plan.
        measured_bytes: Peak memory of the run.
        planned_seconds: Seconds a step by the plan, curvature passes amortised.
        measured_seconds: Mean seconds of the steps after the first.
        parts: The plan's seconds by what they are spent on.
        moment: The moment that the plan takes for the peak.
    """

    trained: str
    optimizer: str
    planned_bytes: int
    measured_bytes: int
    planned_seconds: float
    measured_seconds: float
    parts: dict[str, float]
    moment: str


def recipe_of(args: argparse.Namespace, trained: str, optimizer: str) -> Recipe:
    """Return the run of a cell.

    Raises:
        ValueError: The folder lacks TOFU's files.
    """
    tofu = Path(args.tofu)
    for name in ("forget01", "retain99"):
        if not (tofu / f"{name}.json").is_file():
            raise ValueError(f"no {tofu / name}.json: --tofu takes a folder with TOFU's files")
    return recipe_from_tree(
        {
            "model": {"path": args.model, "device": "cpu"},
            "adapter": ADAPTERS[trained],
            "data": {"forget": str(tofu / "forget01.json"), "retain": f"{tofu / 'retain99.json'},limit=200"},
            "objective": args.objective,
            "optimizer": {"name": optimizer, "lr": 1e-6},  # a step takes as long, and none loses the model
            "training": {"batch_size": args.batch, "max_steps": args.steps + 1, "save_steps": 0, "warmup": 0.0},
        }
    )


def measure(args: argparse.Namespace, trained: str, optimizer: str) -> Outcome:
    """Plan a run, then make it."""
    from soul.adapters import add_adapter
    from soul.console import quiet
    from soul.inputs import load_request
    from soul.models import load_model
    from soul.plan import find_machine, find_work, make_plan
    from soul.run import tokenise, train

    quiet()
    torch.set_num_threads(args.threads)
    recipe = recipe_of(args, trained, optimizer)
    plan = make_plan(recipe, find_machine(recipe), find_work(recipe))
    model, tokenizer = load_model(recipe.model)
    dataset = tokenise(tokenizer, recipe, load_request(recipe.data))
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, recipe.training.seed)
    os.environ["SOUL_CACHE"] = tempfile.mkdtemp()  # every curvature pass is really made
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        train(model, dataset, recipe, out, lambda *_: None)
        steps = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert plan.time is not None
    return Outcome(
        trained,
        optimizer,
        plan.memory.peak,
        peak_memory(),
        plan.time.step,
        statistics.mean(step["seconds"] for step in steps[1:]),
        plan.time.parts,
        plan.memory.moment,
    )


def report(found: Sequence[Outcome], args: argparse.Namespace) -> str:
    """Return the table of ratios, planned over measured."""
    rows = []
    for o in found:
        memory, seconds = o.planned_bytes / o.measured_bytes, o.planned_seconds / o.measured_seconds
        rows.append(
            [
                o.trained,
                o.optimizer,
                f"{o.planned_bytes / GB:.2f}",
                f"{o.measured_bytes / GB:.2f}",
                f"{memory:.2f}{'' if abs(memory - 1) <= WANTED['memory'] else ' (!)'}",
                f"{o.planned_seconds:.2f}",
                f"{o.measured_seconds:.2f}",
                f"{seconds:.2f}{'' if abs(seconds - 1) <= WANTED['time'] else ' (!)'}",
            ]
        )
    head = ["trained", "optimizer", "GB planned", "GB measured", "ratio", "s planned", "s measured", "ratio"]
    machine = f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}."
    return f"{machine}\n{args.objective}, {args.batch} pairs a step, {args.steps} steps.\n\n{table(head, rows)}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare soul plan with what is measured.")
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--model", default="smollm2-135m", help="short name, hub id or folder")
    parser.add_argument("--objective", default="grad_diff")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--trained", nargs="+", choices=tuple(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a smoke run: its numbers mean nothing")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.threads) < 1:
        parser.error("--batch, --steps and --threads must be 1 or more")
    if args.quick:
        args.optimizers, args.steps = list(QUICK), 2
    return args


def main() -> int:
    """Measure every cell in a process of its own and print the table."""
    args = parse()
    found: list[Outcome] = []
    try:
        for trained in args.trained:
            for optimizer in args.optimizers:
                found.append(in_own_process(measure, args, trained, optimizer))
                print(f"{trained}, {optimizer}: done", file=sys.stderr, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(found, args))
    if args.json:
        cells = [dataclasses.asdict(o) for o in found]
        args.json.write_text(json.dumps({"threads": args.threads, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
