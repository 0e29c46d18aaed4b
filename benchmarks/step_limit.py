"""How near a training step comes to its arithmetic: by what is trained, objective, length and precision.

    python benchmarks/step_limit.py --tofu ../shared/data/tofu --wikitext ../shared/data/wikitext2/wiki.test.tokens

``benchmarks/throughput.py`` compares one job with other ways to do it; this one walks over the jobs of this library
alone. Short examples are TOFU's (4 + 4 a step), long ones WikiText cut at 1,024 tokens (1 + 1 a step), all of which
are answer. Each cell runs in a process of its own and all take turns over several rounds. ``--quick`` is a smoke run
of two cells, whose numbers mean nothing.

Arithmetic, with ``body`` the weights of the model's linear layers without the head and without adapters, ``D`` the
width of attention, ``n`` a row's length and two operations a multiplication and addition::

    forward = 2 (body * tokens + head * answer tokens) + sum over rows of 2 layers D n^2     (a token sees half of n)
    needed  = 3 forward where weights are trained, 2 forward + the attention's third where only adapters are

The backward pass forms the gradient of the inputs, as dear as the forward pass, and once more that of the weights,
which LoRA saves; attention has two inputs, so its gradient is twice its forward pass in any case. References are cached
before the first step and not counted; the adapters' own products are left out. ``times the limit`` is seconds over
``needed / peak``, with the matrix-multiply peak of the same precision, measured in the same process before and after.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from _machine import Clock, Matrices, Step, Work, cpu_name, gemm_peak, in_own_process, table
from _paths import Laps, TimedTrainer
from soul.adapters import AdapterSpec, add_adapter
from soul.console import quiet
from soul.data.general import refusals
from soul.data.sources import load_examples
from soul.machine import peak_memory, reset_peak_memory
from soul.models import ModelSpec, load_model
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import make_dataset
from soul.training import TrainingSpec
from soul.types import Example

GIGA, MIB = 1e9, 1 << 20
LONG = 1024
CHARACTERS = 8 * LONG  # more than enough to fill a long example


@dataclasses.dataclass(frozen=True)
class Cell:
    """One job.

    Attributes:
        trained: All weights, or adapters on all linear layers.
        objective: The loss.
        length: TOFU's questions, or passages of 1,024 tokens.
        precision: Of the products.
        compiled: Whether blocks are compiled (``training.compile``).
    """

    trained: Literal["full", "LoRA"]
    objective: str
    length: Literal["short", "long"]
    precision: Literal["bfloat16", "float32"]
    compiled: bool = False


CELLS = (
    *(Cell("full", name, "short", "bfloat16") for name in ("grad_diff", "npo", "simnpo", "po", "kl", "undial")),
    Cell("LoRA", "grad_diff", "short", "bfloat16"),
    Cell("LoRA", "npo", "short", "bfloat16"),
    Cell("full", "grad_diff", "short", "float32"),
    Cell("LoRA", "grad_diff", "short", "float32"),
    Cell("full", "grad_diff", "long", "bfloat16"),
    Cell("full", "npo", "long", "bfloat16"),
    Cell("LoRA", "grad_diff", "long", "bfloat16"),
    Cell("full", "grad_diff", "long", "float32"),
    Cell("full", "grad_diff", "short", "bfloat16", compiled=True),
    Cell("LoRA", "grad_diff", "short", "bfloat16", compiled=True),
    Cell("full", "grad_diff", "short", "float32", compiled=True),
    Cell("full", "grad_diff", "long", "bfloat16", compiled=True),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A cell's run.

    Attributes:
        seconds: Median of its steps.
        tokens: Real tokens of a step, on average.
        needed: Operations of a step, on average.
        padded: Positions that went through the model, over real tokens.
        peak: The matrix-multiply rate in the cell's precision.
        memory: Peak memory in bytes.
        parts: Median seconds by part.
        cores: Processors it had.
    """

    seconds: float
    tokens: float
    needed: float
    padded: float
    peak: float
    memory: int
    parts: dict[str, float]
    cores: float


def examples_of(args: argparse.Namespace, length: str) -> tuple[list[Example], list[Example]]:
    """Return what to forget and what to keep.

    Raises:
        ValueError: A file is missing.
    """
    if length == "long":
        file = Path(args.wikitext)
        if not file.is_file():
            raise ValueError(f"no {file}: --wikitext takes a file of plain text")
        text = file.read_text(encoding="utf-8")
        count = 2 * (args.steps + 1)
        if len(text) < count * CHARACTERS:
            raise ValueError(f"{file} has {len(text):,} characters, and {count * CHARACTERS:,} are needed")
        rows = [
            Example("", text[i * CHARACTERS : (i + 1) * CHARACTERS], id=str(i), chat=False, ends=False)
            for i in range(count)
        ]
        return rows[::2], rows[1::2]
    found = []
    for name in ("forget01", "retain99"):
        file = Path(args.tofu) / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"no {file}: --tofu takes a folder with TOFU's files, such as forget01.json")
        found.append(load_examples(file))
    return found[0], found[1][::99]


def operations(step: Step, rows: Sequence[int], matrices: Matrices, config: Any, *, adapters: bool) -> float:
    """Return the operations that a step needs; ``rows`` are the lengths of its rows."""
    weights = 2 * (matrices.body * step.tokens + matrices.head * step.answers)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = sum(2 * config.num_hidden_layers * width * n * n for n in rows)
    return (2 if adapters else 3) * weights + 3 * attention


class _Rows(TimedTrainer):
    """Notes the lengths of a step's rows too."""

    lengths: list[list[int]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.lengths.append(inputs["attention_mask"].sum(-1).tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def measure(cell: Cell, args: argparse.Namespace) -> Found:
    """Train for a few steps."""
    quiet()
    torch.set_num_threads(args.threads)
    seconds = 0.02 if args.quick else 1.0
    dtype = getattr(torch, cell.precision)
    before = gemm_peak(dtype, seconds, time.perf_counter)
    model: Any
    model, tokenizer = load_model(ModelSpec(args.model, device="cpu"))
    matrices, config = Matrices.of(model), model.config
    clock = Clock(Work(model), time.perf_counter)
    if cell.trained == "LoRA":
        model = add_adapter(model, AdapterSpec())
    forget, retain = examples_of(args, cell.length)
    objective = OBJECTIVES.get(cell.objective)()
    training = TrainingSpec(
        batch_size=1 if cell.length == "long" else 4,
        max_steps=args.steps + 1,
        save_steps=0,
        precision=cell.precision,
        max_length=LONG,
        compile=cell.compiled,
    )
    dataset = make_dataset(tokenizer, forget, retain, objective, training, refusals())
    laps = Laps(clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Rows(
            model,
            training.arguments(folder),
            dataset=dataset,
            objective=objective,
            optimizer=OPTIMIZERS.get("adamw")(),
            training=training,
            callbacks=[laps],
        )
        trainer.clock, trainer.lengths = clock, []
        reset_peak_memory()
        clock.restart()
        trainer.train()
        memory = peak_memory()
    pairs = list(zip(laps.steps, trainer.lengths, strict=True))[1:]
    steps = [step for step, _ in pairs]
    needed = [operations(s, rows, matrices, config, adapters=cell.trained == "LoRA") for s, rows in pairs]
    return Found(
        statistics.median(s.seconds for s in steps),
        statistics.mean(s.tokens for s in steps),
        statistics.mean(needed),
        sum(s.body for s in steps) / sum(s.tokens for s in steps),
        max(before, gemm_peak(dtype, seconds, time.perf_counter)),
        memory,
        {
            name: statistics.median(s.parts.get(name, 0.0) for s in steps)
            for name in ("forward", "backward", "optimizer")
        },
        statistics.mean(s.cores for s in steps),
    )


def report(found: dict[Cell, list[Found]], args: argparse.Namespace) -> str:
    """Return the table; the limit is by each cell's median peak."""
    rows = []
    for cell, runs in found.items():
        peak = statistics.median(run.peak for run in runs)
        times = sorted(run.seconds * peak / run.needed for run in runs)
        middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        rows.append(
            [
                cell.trained,
                cell.objective,
                cell.length,
                cell.precision + (", compiled" if cell.compiled else ""),
                f"{middle.seconds:.2f}",
                *(f"{middle.parts[name]:.2f}" for name in ("forward", "backward", "optimizer")),
                f"{middle.needed / GIGA:.0f}",
                f"{peak / GIGA:.0f}",
                f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})",
                f"{middle.padded:.2f}",
                f"{max(run.memory for run in runs) / MIB:.0f}",
                f"{statistics.median(run.cores for run in runs):.2f}",
            ]
        )
    head = ["trained", "objective", "examples", "precision", "s a step", "forward", "backward", "optimizer"]
    head += ["GFLOP needed", "peak GFLOP/s", "times the limit", "positions a token", "peak MiB", "cores got"]
    rounds = len(next(iter(found.values())))
    return "\n".join(
        [
            f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}; wall clock; "
            f"load at the end {os.getloadavg()[0]:.1f}.",
            f"{rounds} rounds; medians of {args.steps} steps, AdamW; of the limit median (min to max) over rounds.",
            "",
            table(head, rows),
        ]
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure training steps against their arithmetic.")
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--wikitext", required=True, help="a file of plain text")
    parser.add_argument("--model", default="smollm2-135m", help="short name, hub id or folder")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each cell takes")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a smoke run of two cells: its numbers mean nothing")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    args = parser.parse_args(argv)
    if min(args.rounds, args.steps, args.threads) < 1:
        parser.error("--rounds, --steps and --threads must be 1 or more")
    if args.quick:
        args.rounds, args.steps = 1, 1
    return args


def main() -> int:
    """Measure every cell in turn and print the table."""
    args = parse()
    try:
        for length in ("short", "long"):
            examples_of(args, length)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = (CELLS[0], Cell("LoRA", "npo", "long", "float32")) if args.quick else CELLS
    found: dict[Cell, list[Found]] = {cell: [] for cell in cells}
    for turn in range(args.rounds):
        for cell in cells:
            run = in_own_process(measure, cell, args)
            found[cell].append(run)
            print(
                f"round {turn + 1}, {' '.join(map(str, dataclasses.astuple(cell)))}: {run.seconds:.2f} s",
                file=sys.stderr,
            )
    print(report(found, args))
    if args.json:
        raw = [dataclasses.asdict(cell) | dataclasses.asdict(run) for cell, runs in found.items() for run in runs]
        args.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
