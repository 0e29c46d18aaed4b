"""Up to which length gradients of attention by plain products beat the fused backward pass on this CPU.

    python benchmarks/attention.py

Forward and backward pass of causal attention with the shape of a block of SmolLM2-135M (8 sequences, 9 query heads, 3
of keys and values, 64 dimensions a head) in bf16, by turns in one process. Prints medians of the ratio over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from _machine import cpu_name, table
from soul.attention import LONGEST, gradients_by_products


def seconds(length: int, *, short: bool, repeats: int) -> float:
    """Return what the two passes take."""
    heads = (9, 3, 3)
    query, key, value = (torch.randn(8, n, length, 64, dtype=torch.bfloat16).requires_grad_() for n in heads)
    started = time.perf_counter()
    for _ in range(repeats):
        if short:
            out = gradients_by_products(query, key, value, None, True, None, True)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192, 256, 384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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


if __name__ == "__main__":
    main()
