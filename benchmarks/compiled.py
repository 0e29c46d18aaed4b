"""What compiling decoder blocks for training steps gains (``training.compile``).

    python benchmarks/compiled.py --tofu ../shared/data/tofu

Forward and backward passes of eight of TOFU's questions, in bf16 as in training, compiled and not in turns: a round
makes one pass over all batches of each, and a ratio is within a round. The seconds of the first passes, in which code
is compiled, are given apart; torch keeps what it compiled on disk, so that a second start takes less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _machine import autocast, cpu_name, table
from soul.adapters import AdapterSpec, add_adapter
from soul.attention import ShortAttention
from soul.compiled import CompiledBlocks
from soul.console import quiet
from soul.data.batches import collate_rows
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.models import ModelSpec, load_model

ROWS = 8
Batch = Mapping[str, torch.Tensor]


def passes(model: Any, batches: Sequence[Batch]) -> float:
    """Make a forward and a backward pass over each batch and return the seconds a batch."""
    started = time.perf_counter()
    for batch in batches:
        with ShortAttention():
            with autocast():
                loss = -forward_answers(model, batch).token_logps().mean()
            loss.backward()
        model.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) / len(batches)


def measure(args: argparse.Namespace, *, lora: bool) -> list[str]:
    """Return a row of the table."""
    model: Any
    model, tokenizer = load_model(ModelSpec(args.model, device="cpu"))
    if lora:
        model = add_adapter(model, AdapterSpec())
    model.train()
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e) for e in load_examples(Path(args.tofu) / "forget01.json")]
    batches = [collate_rows(rows[i : i + ROWS], pad_id=template.pad) for i in range(0, len(rows), ROWS)]
    compiled = CompiledBlocks(model)
    with compiled:
        first = passes(model, batches) * len(batches)
    passes(model, batches)
    plain, fast = [], []
    for _ in range(args.rounds):
        plain.append(passes(model, batches))
        with compiled:
            fast.append(passes(model, batches))
    ratios = [a / b for a, b in zip(plain, fast, strict=True)]
    return [
        "LoRA" if lora else "full",
        f"{statistics.median(plain):.2f}",
        f"{statistics.median(fast):.2f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{first - len(batches) * statistics.median(fast):.0f}",
    ]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure what compiling decoder blocks gains.")
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--model", default="smollm2-135m", help="short name, hub id or folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads must be 1 or more")
    if not (Path(args.tofu) / "forget01.json").is_file():
        print(
            f"error: no {Path(args.tofu) / 'forget01.json'}: --tofu takes a folder with TOFU's files", file=sys.stderr
        )
        return 2
    quiet()
    torch.set_num_threads(args.threads)
    rows = [measure(args, lora=lora) for lora in (False, True)]
    print(
        f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}; {args.rounds} rounds, median (min to max).\n"
    )
    head = ["trained", "s a pass", "compiled", "times faster", "s to compile"]
    print(table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
