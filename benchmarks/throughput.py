"""How fast this library unlearns and evaluates, beside the released way and a plain one, and beside the arithmetic.

    python benchmarks/throughput.py --tofu ../shared/data/tofu

The job: GradDiff with retain weight 1 on 40 questions to forget (TOFU's ``forget01``) and 40 to keep, 4 + 4 a step;
then seven likelihoods a question (the answer, its paraphrase, five wrong ones) and greedy answers. The paths are
described in ``benchmarks/_paths.py``. Each runs in a process of its own, so that its peak memory is its own, and all
take turns over several rounds, since machines are noisy. About ten minutes on two cores; ``--quick`` is a smoke run.

Arithmetic, with ``body`` the weights of all linear layers but the head and ``head`` those of the head::

    needed = 6 (body * real tokens + head * answer tokens)          a training step; 2 in place of 6 without gradients
    done   = 6 (body * padded tokens + head * positions it ran on)  what the path really put through the model

``times the limit`` is seconds over ``needed / peak``; ``share of peak`` is ``done / seconds / peak``. ``peak`` is the
matrix-multiply rate that the same processes measured before and after their work (the median of each one's best), in
bf16 where the path multiplies in bf16 and in fp32 where in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import _paths
from _machine import Step, cpu_name, gemm_peak, in_own_process, table
from soul.data.sources import load_examples
from soul.machine import has_bf16

GIGA, MIB = 1e9, 1 << 20
KEPT_EVERY = 99  # of the 3,960 questions of retain99: 40, of all authors
Found = dict[str, list[_paths.Measured]]


def make_job(args: argparse.Namespace) -> _paths.Job:
    """Read TOFU's files.

    Raises:
        ValueError: The folder lacks a file.
    """

    def read(name: str) -> list[Any]:
        file = Path(args.tofu) / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"no {file}: --tofu takes a folder with TOFU's files, such as forget01.json")
        return load_examples(file)

    forget, retain, judged = read("forget01"), read("retain99"), read("forget01_perturbed")
    count = 8 if args.quick else 40
    retain = retain[:: max(1, min(KEPT_EVERY, len(retain) // count))]
    sizes = {"steps": 2, "new_tokens": 8, "asked": 4} if args.quick else {}
    return _paths.Job(
        args.model,
        tuple(forget[:count]),
        tuple(retain[:count]),
        tuple(judged[: 4 if args.quick else 16]),
        threads=1 if args.processor_time else 0,
        processor_time=args.processor_time,
        **sizes,
    )


def work(way: type[_paths.Way], job: _paths.Job, seconds: float) -> tuple[_paths.Measured, dict[str, float]]:
    """Measure one path, and the machine's peaks before and after it."""
    path = way(job)  # sets the number of threads

    def best() -> dict[str, float]:
        return {name: gemm_peak(getattr(torch, name), seconds, job.now) for name in ("float32", "bfloat16")}

    before, done, after = best(), path.measure(), best()
    return done, {name: max(before[name], after[name]) for name in before}


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return ``median (min to max)``."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


@dataclasses.dataclass(frozen=True)
class Round:
    """One path's training in one round, a step on average."""

    seconds: float
    tokens: float
    needed: float
    done: float
    cores: float

    @classmethod
    def of(cls, measured: _paths.Measured) -> Round:
        """Average the steps."""
        steps, matrices = measured.steps, measured.matrices

        def mean(value: Callable[[Step], float]) -> float:
            return sum(map(value, steps)) / len(steps)

        return cls(
            mean(lambda s: s.seconds),
            mean(lambda s: s.tokens),
            mean(lambda s: matrices.operations(s.tokens, s.answers, training=True)),
            mean(lambda s: matrices.operations(s.body, s.head, training=True)),
            mean(lambda s: s.cores),
        )


def trained(found: Found) -> Found:
    """Return the paths that were trained too."""
    return {title: measured for title, measured in found.items() if all(m.steps for m in measured)}


def training_table(found: Found, peak: float) -> str:
    """Return seconds, tokens, arithmetic and memory of a step."""
    rows = []
    for title, measured in trained(found).items():
        rounds = [Round.of(m) for m in measured]
        rows.append(
            [
                title,
                spread([r.seconds for r in rounds]),
                f"{middle([r.tokens / r.seconds for r in rounds]):.0f}",
                f"{middle([r.done / r.seconds / peak for r in rounds]):.0%}",
                f"{middle([r.needed for r in rounds]) / GIGA:.0f}",
                f"{middle([r.seconds * peak / r.needed for r in rounds]):.2f}",
                f"{max(m.train_peak for m in measured) / MIB:.0f}",
                f"{middle([r.cores for r in rounds]):.2f}",
            ]
        )
    head = ["training", "s a step", "real tokens/s", "share of peak", "GFLOP needed", "times the limit"]
    return table([*head, "peak MiB", "cores got"], rows)


def parts_table(found: Found) -> str:
    """Return where a step's time goes."""
    names = ("curvature", "forward", "backward", "clipping", "optimizer")
    rows = []
    for title, measured in trained(found).items():
        steps = [step for m in measured for step in m.steps]
        # medians are of steps; the curvature pass comes at one step in ten, and counts as a share of each
        parts = {n: middle([s.parts.get(n, 0.0) for s in steps]) for n in names}
        parts["curvature"] = sum(s.parts.get("curvature", 0.0) for s in steps) / len(steps)
        rest = middle([s.seconds - sum(s.parts.values()) for s in steps])
        rows.append([title, *(f"{parts[n]:.3f}" for n in names), f"{rest:.3f}"])
    return table(["seconds of a step", *names, "other"], rows)


def evaluation_table(found: Found, peaks: dict[str, float]) -> str:
    """Return seconds an example and a generated token."""
    rows = []
    for way in _paths.WAYS:
        measured = found[way.title]
        if not way.evaluates:
            continue
        seconds = [m.likelihoods.seconds / m.judged for m in measured]
        done = measured[0]
        of = done.matrices.operations
        needed = of(done.likelihoods.tokens, done.likelihoods.answers, training=False) / done.judged
        rows.append(
            [
                way.title,
                spread(seconds, 3),
                way.evaluated_in,
                f"{needed / GIGA:.1f}",
                f"{middle(seconds) * peaks[way.evaluated_in] / needed:.2f}",
                spread([m.generation.seconds / m.generation.tokens for m in measured], 4),
                f"{max(m.evaluate_peak for m in measured) / MIB:.0f}",
                f"{middle([m.nll for m in measured]):.4f}",
            ]
        )
    head = ["evaluation", "s for 7 likelihoods", "precision", "GFLOP needed", "times the limit", "s a generated token"]
    return table([*head, "peak MiB", "NLL of the same answers"], rows)


def ratio_table(found: Found) -> str:
    """Return how many times longer the other paths take, round by round."""

    def seconds(title: str) -> list[tuple[float, ...]]:
        return [
            (
                Round.of(m).seconds if m.steps else 0.0,
                m.likelihoods.seconds / max(1, m.judged),
                m.generation.seconds / max(1, m.generation.tokens),
                float(m.train_peak),
            )
            for m in found[title]
        ]

    rows = []
    for other, ours in (
        (_paths.Released, _paths.Soul),
        (_paths.Plain, _paths.SoulAdamW),
        (_paths.Plain, _paths.Soul),
        (_paths.PlainBf16, _paths.SoulBf16),
    ):
        together = zip(seconds(other.title), seconds(ours.title), strict=True)
        ratios = [[a / b if b else 0.0 for a, b in zip(x, y, strict=True)] for x, y in together]
        told = [ours.trains, ours.evaluates, ours.evaluates, ours.trains]
        cells = [spread([r[i] for r in ratios], 2) if told[i] else "" for i in range(4)]
        rows.append([f"{other.title} / {ours.title}", *cells])
    return table(["ratio", "a step", "7 likelihoods", "a generated token", "peak memory in training"], rows)


def report(found: Found, peaks: dict[str, float], job: _paths.Job) -> str:
    """Return all tables."""
    rounds = len(next(iter(found.values())))
    matrices = found[_paths.Soul.title][0].matrices
    load = os.getloadavg()[0]
    lines = [
        f"{cpu_name()}, {job.threads or torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{'processor time' if job.processor_time else 'wall clock'}; load at the end {load:.1f}.",
        f"Matrix-multiply peak: bf16 {peaks['bfloat16'] / GIGA:.0f}, fp32 {peaks['float32'] / GIGA:.0f} GFLOP/s.",
        f"Model {Path(job.model).name}: {matrices.body / 1e6:.1f} M weights in the body's matrices, "
        f"{matrices.head / 1e6:.1f} M in the head.",
        f"{rounds} rounds; median over rounds (min to max) of a round's mean over {job.steps} steps "
        f"({job.slow_steps} of the released way), {len(job.judged)} examples ({job.slow_judged}) and "
        f"{job.asked} answers ({job.slow_judged}) of at most {job.new_tokens} tokens.",
        "",
        training_table(found, peaks["bfloat16" if has_bf16() else "float32"]),
        "",
        parts_table(found),
        "",
        evaluation_table(found, peaks),
        "",
        ratio_table(found),
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure speed and memory of unlearning and evaluation.")
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--model", default="smollm2-135m", help="short name, hub id or folder")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each path takes")
    parser.add_argument("--quick", action="store_true", help="one short round: a smoke run, its numbers mean nothing")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread and its processor time: for a machine that is busy"
    )
    parser.add_argument("--json", type=Path, help="also write all that was measured to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {args.rounds}")
    return args


def main() -> int:
    """Measure every path in turn and print the tables."""
    args = parse()
    try:
        job = make_job(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: Found = {way.title: [] for way in _paths.WAYS}
    peaks: list[dict[str, float]] = []
    for turn in range(1 if args.quick else args.rounds):
        for way in _paths.WAYS:
            measured, peak = in_own_process(work, way, job, 0.02 if args.quick else 1.0)
            found[way.title].append(measured)
            peaks.append(peak)
            said = f"{Round.of(measured).seconds:.2f} s a step" if way.trains else "evaluated"
            print(f"round {turn + 1}, {way.title}: {said}", file=sys.stderr, flush=True)
    machine = {name: middle([peak[name] for peak in peaks]) for name in peaks[0]}
    print(report(found, machine, job))
    if args.json:
        raw = {title: [dataclasses.asdict(m) for m in measured] for title, measured in found.items()}
        args.json.write_text(json.dumps({"peaks": peaks, "paths": raw}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
