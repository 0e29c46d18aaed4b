"""Up to which length gradients of attention by plain products beat the fused backward pass on this CPU.

    python benchmarks/attention.py
    python benchmarks/attention.py --step smollm2-135m --tofu ../shared/data/tofu    # a training step as well

Forward and backward pass of causal attention with the shape of a block of SmolLM2-135M (8 sequences, 9 query heads, 3
of keys and values, 64 dimensions a head) in bf16, by turns in one process. Prints medians of the ratio over rounds.
With ``--step``, also what a whole forward and backward pass over eight questions of TOFU takes either way.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from _machine import cpu_name, table
from soul.attention import LONGEST, ShortAttention
from soul.data.batches import collate_rows
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.models import ModelSpec, freeze_embeddings, load_model


def seconds(length: int, *, short: bool, repeats: int) -> float:
    """Return what the two passes take."""
    heads = (9, 3, 3)
    query, key, value = (torch.randn(8, n, length, 64, dtype=torch.bfloat16).requires_grad_() for n in heads)
    started = time.perf_counter()
    with ShortAttention(length) if short else contextlib.nullcontext():
        for _ in range(repeats):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    return (time.perf_counter() - started) / repeats


def step_seconds(path: str, tofu: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return what forward and backward pass of a model under bf16 autocast take, the fused way and ours, by round."""
    model, tokenizer = load_model(ModelSpec(path, dtype="float32", device="cpu"))
    freeze_embeddings(model)
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e) for e in load_examples(tofu / "forget01.json")[:8]]
    batch = collate_rows(rows, pad_id=template.pad)

    def seconds_of(way: Any) -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with way:
            with torch.autocast("cpu", torch.bfloat16):
                loss = -forward_answers(model, batch).token_logps().mean()
            loss.backward()
        return time.perf_counter() - started

    pairs = [(seconds_of(contextlib.nullcontext()), seconds_of(ShortAttention())) for _ in range(rounds + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192, 256, 384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--step", metavar="MODEL", help="as for model.path in recipes")
    parser.add_argument("--tofu", type=Path, default="../shared/data/tofu", help="folder with forget01.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for length in args.lengths:
        repeats = max(1, 1024 // length)
        pairs = [
            [seconds(length, short=short, repeats=repeats) for short in (False, True)] for _ in range(args.rounds + 1)
        ][1:]
        fused, short = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        between = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([str(length), f"{fused * 1e3:.2f}", f"{short * 1e3:.2f}", between])
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds")
    print(f"In use up to {LONGEST} positions.\n")
    print(table(["positions", "fused, ms", "products, ms", "times faster"], rows))
    if args.step:
        sides = step_seconds(args.step, args.tofu, args.rounds)
        ratios = sorted(a / b for a, b in zip(*sides, strict=True))
        fused, short = map(statistics.median, sides)
        print(f"\nForward and backward pass of {args.step}, eight questions: {fused:.2f} s fused, {short:.2f} s so:")
        print(f"{statistics.median(ratios):.2f} times faster ({ratios[0]:.2f} to {ratios[-1]:.2f}).")


if __name__ == "__main__":
    main()
