"""How many tokens a CPU is best given at a time when likelihoods are measured.

    python benchmarks/batch_tokens.py --tofu ../shared/data/tofu

Seven likelihoods each of TOFU's ``forget01`` (answers share what is read) and one each of its 40, in batches of at most
so many padded tokens, in fp32 and, where the hardware has it, under bf16 autocast. Sizes take turns; prints the
median ratio of the time with the largest to the time with each, over rounds. What soul takes by itself is
``soul.data.batches.fitting``.
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
from soul import likelihood
from soul.data.batches import fitting
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate
from soul.machine import has_bf16
from soul.models import ModelSpec, load_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as for model.path in recipes")
    parser.add_argument("--tofu", type=Path, default="../shared/data/tofu", help="folder with forget01_perturbed.json")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(ModelSpec(args.model, dtype="float32", device="cpu"))
    model.eval()
    template = ChatTemplate(tokenizer)
    examples = load_examples(args.tofu / "forget01_perturbed.json")[: args.examples]
    answers = [(e, a) for e in examples for a in (e.answer, e.paraphrased_answer, *e.wrong_answers)]
    sets = {
        "seven likelihoods": [template.encode(e, answer=a) for e, a in answers],
        "one each": [template.encode(e) for e in load_examples(args.tofu / "forget01.json")],
    }
    soul_takes = fitting(max(args.sizes), torch.device("cpu"))
    likelihood.fitting = lambda max_tokens, device: max_tokens  # noqa: ARG005 - as given, since that is measured

    def seconds(rows: Any, size: int, precision: contextlib.AbstractContextManager[Any]) -> float:
        started = time.perf_counter()
        with precision:
            likelihood.sequence_nll(model, rows, pad_id=template.pad, max_tokens=size)
        return time.perf_counter() - started

    lines = []
    for kind in ("float32", *(["bfloat16"] if has_bf16() else [])):
        for name, rows in sets.items():
            found: dict[int, list[float]] = {size: [] for size in args.sizes}
            for number in range(args.rounds + 1):
                for size in args.sizes:
                    wide = contextlib.nullcontext() if kind == "float32" else torch.autocast("cpu", torch.bfloat16)
                    took = seconds(rows, size, wide)
                    if number:  # the first round warms up
                        found[size].append(took)
            for size, times in found.items():
                ratios = sorted(a / b for a, b in zip(found[max(args.sizes)], times, strict=True))
                between = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                lines.append([kind, name, str(size), f"{statistics.median(times):.2f}", between])
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds")
    print(f"In use: {soul_takes}.\n")
    print(table(["precision", "rows", "tokens", "s", "times faster than the largest"], lines))


if __name__ == "__main__":
    main()
