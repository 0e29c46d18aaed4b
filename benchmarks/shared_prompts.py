"""How many rows that share a prompt are best read, on random Llamas with one thread.

    python benchmarks/shared_prompts.py

Each row's answer is drawn anew, so that a prompt is all that rows have in common. Compared are what ``sequence_nll``
chooses (``here``), one tree of all rows, trees of at most so many nodes, and keys and values of the prompt, each in
seconds of the processor, as the median share of what reading every row whole takes. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from _machine import cpu_name, table
from soul import likelihood
from soul.data.batches import length_batches
from soul.data.templates import Encoded

TOKENS, VOCABULARY = 1024, 500
SHAPES = ((2, 58, 120), (20, 40, 100), (50, 10, 100), (100, 100, 40), (400, 50, 40), (1200, 20, 30))
SIZES = (256, 512, 1024)


def make_rows(prompt: int, answer: int, count: int) -> list[Encoded]:
    """Return rows with one prompt and random answers."""
    rng = random.Random(0)
    head, *tails = (tuple(rng.choices(range(VOCABULARY), k=n)) for n in (prompt, *[answer] * count))
    return [Encoded(head + tail, prompt) for tail in tails]


def read_whole(model: LlamaForCausalLM, rows: Sequence[Encoded]) -> None:
    """Read every row whole, in batches."""
    for picked in length_batches([len(row) for row in rows], TOKENS):
        likelihood._whole(model, [rows[i] for i in picked], 0)


def read_trees(model: LlamaForCausalLM, rows: Sequence[Encoded], nodes: int) -> None:
    """Read as many rows in a tree as ``nodes`` allow, and trees in batches."""
    count = max(1, (nodes - rows[0].answer_start) // (rows[0].answer_length - 1))
    trees = [likelihood._grow(rows[i : i + count]) for i in range(0, len(rows), count)]
    for picked in length_batches([len(tree.tokens) for tree in trees], TOKENS):
        likelihood._in_trees(model, [trees[i] for i in picked], 0)


def make_ways(model: LlamaForCausalLM, rows: Sequence[Encoded]) -> dict[str, Callable[[], object]]:
    """Return the ways of reading rows by name."""
    shortest = rows[0].answer_start + 2 * rows[0].answer_length  # a smaller tree has nothing to share
    return {
        "whole": lambda: read_whole(model, rows),
        "here": lambda: likelihood.sequence_nll(model, rows, pad_id=0, max_tokens=TOKENS),
        "one tree": lambda: read_trees(model, rows, 10**9),
        **{str(n): functools.partial(read_trees, model, rows, n) for n in SIZES if n >= shortest},
        "keys and values": lambda: likelihood._after_prompts(model, [rows], 0, TOKENS),
    }


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256], help="hidden sizes of four-layer models")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for hidden in args.hidden:
        torch.manual_seed(0)
        heads = max(2, hidden // 64)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=VOCABULARY,
        )
        model = LlamaForCausalLM(config).eval()
        for prompt, answer, count in SHAPES:
            rows = make_rows(prompt, answer, count)
            ways = make_ways(model, rows)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(args.rounds + 1):
                for name, way in ways.items():
                    started = time.process_time()
                    way()
                    if number:  # the first round warms up
                        seconds[name].append(time.process_time() - started)
            took = {name: statistics.median(found) for name, found in seconds.items()}
            shares = [f"{took[n] / took['whole']:.2f}" if n in took else "" for n in _names()[1:]]
            lines.append([str(hidden), f"{prompt} + {answer}, {count}", f"{took['whole']:.3f} s", *shares])
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, {args.rounds} rounds\n")
    print(table(["hidden", "prompt + answer, rows", *_names()], lines))


def _names() -> list[str]:
    return ["whole", "here", "one tree", *map(str, SIZES), "keys and values"]


if __name__ == "__main__":
    main()
