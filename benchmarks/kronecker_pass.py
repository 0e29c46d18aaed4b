"""What a pass over Kronecker curvature costs: without and with gradients of weights, sums in bands and whole.

    python benchmarks/kronecker_pass.py --tofu ../shared/data/tofu

A warm start of two micro-batches (each 8 questions of ``retain90``, 2 built-in passages) on SmolLM2-135M, watched by
``kfac``, in the four ways, taken in turns after a round that does not count; medians and ratios to the dearest way,
with the seconds of a plain forward and backward pass beside them, the largest difference of a factor, and the peak
memory of a process that makes one. Embeddings are frozen.
``--cpu-time`` counts the processor's seconds, where other programs keep the machine busy.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from _machine import autocast, cpu_name, in_own_process, table
from soul.curvature import kronecker
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import collate_rows
from soul.data.general import general_text
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.models import ModelSpec, freeze_embeddings, load_model
from soul.optim.kfac import KFACSpec

WAYS = {
    "whole sums, all gradients": (True, 1),
    "bands, all gradients": (True, 4),
    "whole sums, no gradients of weights": (False, 1),
    "bands, no gradients of weights": (False, 4),
}


@dataclasses.dataclass
class Setup:
    """A model with a rule's passes over TOFU."""

    model: Any
    passes: CurvaturePasses
    pad: int

    @classmethod
    def load(cls, model: str, tofu: Path) -> Setup:
        """Load model and rows."""
        torch.set_num_threads(1)
        loaded, tokenizer = load_model(ModelSpec(model, device="cpu"))
        freeze_embeddings(loaded)
        template = ChatTemplate(tokenizer)
        rows = [template.encode(e, index=i) for i, e in enumerate(load_examples(f"{tofu},split=retain90"))]
        text = [template.encode(e, index=i) for i, e in enumerate(general_text())]
        spec = CurvatureSpec(batch=8, general_text=2, warm_start=2, cache=False)
        passes = CurvaturePasses(spec, rows, text, pad_id=template.pad, autocast=autocast)
        return cls(loaded, passes, template.pad)

    def look(self, name: str) -> dict[str, torch.Tensor]:
        """Make a pass in one of the ways, and return the factors."""
        gradients, bands = WAYS[name]
        rule = KFACSpec().build([p for p in self.model.parameters() if p.requires_grad], self.model)
        with (
            mock.patch.object(type(rule), "needs_gradients", gradients),
            mock.patch.object(kronecker, "BANDS", bands),
        ):
            self.passes.estimate(self.model, rule, self.passes.plan(0))
            self.model.zero_grad(set_to_none=True)
            rule.factors.absorb()
        return rule.factors.state()

    def train(self) -> None:
        """Go forward and back as a training step does over the same rows."""
        for picks in self.passes.plan(0):
            with autocast():
                batch = collate_rows([pick.row for pick in picks], pad_id=self.pad)
                loss = -forward_answers(self.model, batch).token_logps().mean()
            loss.backward()
            self.model.zero_grad(set_to_none=True)


def peak(name: str, model: str, tofu: Path) -> float:
    """Return the peak memory of a process that makes the passes, in GB."""
    Setup.load(model, tofu).look(name)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="folder of TOFU")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    taken = {name: in_own_process(peak, name, args.model, args.tofu) for name in WAYS}
    setup = Setup.load(args.model, args.tofu)
    now = time.process_time if args.cpu_time else time.perf_counter
    found: dict[str, dict[str, torch.Tensor]] = {}

    def look(name: str) -> None:
        found[name] = setup.look(name)

    ways: dict[str, Callable[[], Any]] = {name: functools.partial(look, name) for name in WAYS}
    ways["forward and backward of a training step"] = setup.train
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            began = now()
            way()
            if number:
                seconds[name].append(now() - began)
    first = next(iter(WAYS))
    lines = []
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds[first], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory, apart = "-", "-"
        if name in found:
            memory, apart = f"{taken[name]:.1f}", f"{_apart(found[name], found[first]):.1e}"
        lines.append([name, f"{statistics.median(took):.2f}", ratio, memory, apart])
    print(f"{cpu_name()}, 1 thread, {args.rounds} rounds, {'processor' if args.cpu_time else 'wall'} seconds\n")
    head = ["two micro-batches", "s", "of the first", "GB at the peak", "largest difference of a factor, of its norm"]
    print(table(head, lines))


def _apart(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    pairs = [(value, other[name]) for name, value in found.items() if value.ndim == 2]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


if __name__ == "__main__":
    main()
