"""How much damping Sophia's diagonal needs, on real gradients and curvature of a model that knows the answers.

    python benchmarks/sophia_damping.py --model runs/first-run/taught/model
        --forget runs/first-run/data/forget01.jsonl --retain runs/first-run/data/retained.jsonl

(``experiments/first_run.py --tofu FOLDER`` makes that model and those files.) The momentum is the mean of ten gradients
of ``grad_diff`` on 4 + 4 questions, each clipped to norm 1. Curvature is estimated on 8 retained questions a pass: from
one pass (a first refresh), or as the debiased average of ten (decay .95). For each share of the group's mean that is
added, printed by group of parameters:

- the win rate at the paper's rho of .04, and the cosine between that step and the momentum's sign;
- ``gain``: ``(m . u)^2 / sum(h u^2)`` at a win rate of .1, of .3 and without a bound, with ``h`` from sixteen passes
  over other questions: how much first-order gain the step has for the retain KL that independent curvature predicts. It
  does not depend on the step's length; 1 is the best of its column. An exact, full curvature would ask for no damping;
  this asks what a diagonal from few draws needs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from soul.console import quiet
from soul.curvature.estimators import backward_curvature
from soul.data.batches import collate_rows
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate, Encoded
from soul.forward import forward_answers
from soul.machine import has_bf16
from soul.models import ModelSpec, load_model
from soul.optim.groups import embedding_ids

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0)
SHARES = (0.1, 0.3, 1.0)
PASSES, HELD_OUT, EXAMPLES, PAIRS = 10, 16, 8, 4
DECAY, RHO = 0.95, 0.04
PIECE = 1 << 20  # sums in fp32 stay exact enough over so many
Vector = list[torch.Tensor]


def passes(model: Any, rows: Sequence[Encoded], count: int, rng: np.random.Generator) -> Iterator[Vector]:
    """Yield the gradient of a curvature cotangent, ``count`` times, on examples drawn anew."""
    for i in range(count):
        picks = rng.choice(len(rows), size=min(EXAMPLES, len(rows)), replace=False)
        batch = collate_rows([rows[j] for j in picks])
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            logits = forward_answers(model, batch).logits_NV
        weights = torch.full((len(logits),), 1 / len(logits))
        backward_curvature(logits, weights, "ggn", torch.Generator().manual_seed(int(rng.integers(1 << 40)) + i))
        yield gradients(model)


def gradients(model: Any) -> Vector:
    """Return the gradients, of which none is missing."""
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return found


def momentum(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded], rng: np.random.Generator) -> Vector:
    """Return the mean of clipped gradients of ``NLL(retain) - NLL(forget)``."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(PASSES):
        model.zero_grad()
        for rows, sign in ((forget, -1.0), (retain, 1.0)):
            batch = collate_rows([rows[j] for j in rng.choice(len(rows), size=PAIRS, replace=False)])
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                answers = forward_answers(model, batch)
            (answers.token_logps().mean() * -sign).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for t, g in zip(total, gradients(model), strict=True):
            t.add_(g, alpha=1 / PASSES)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    model, tokenizer = load_model(ModelSpec(args.model))
    model.eval()
    template = ChatTemplate(tokenizer)
    forget, kept = (
        [template.encode(e, index=i) for i, e in enumerate(load_examples(s))] for s in (args.forget, args.retain)
    )
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(kept))
    seen, others = ([kept[i] for i in part] for part in np.array_split(order, 2))

    m = momentum(model, forget, seen, rng)
    params = list(model.parameters())
    first: Vector = []
    average = [torch.zeros_like(p) for p in params]
    for found in passes(model, seen, PASSES, rng):
        for h, g in zip(average, found, strict=True):
            h.mul_(DECAY).addcmul_(g, g, value=1 - DECAY)
        first = first or [g.square() for g in found]
    for h in average:
        h.div_(1 - DECAY**PASSES)
    truth = [torch.zeros_like(p) for p in params]
    for found in passes(model, others, HELD_OUT, rng):
        for h, g in zip(truth, found, strict=True):
            h.addcmul_(g, g, value=1 / HELD_OUT)

    marked = embedding_ids(model)
    groups = {
        "matrices": [i for i, p in enumerate(params) if p.ndim == 2 and id(p) not in marked],
        "embedding": [i for i, p in enumerate(params) if id(p) in marked],
        "norms": [i for i, p in enumerate(params) if p.ndim == 1],
    }
    for name, members in groups.items():
        flat_m, flat_t = (torch.cat([x[i].flatten() for i in members]) for x in (m, truth))
        moving = flat_m != 0
        flat_m, flat_t = flat_m[moving], flat_t[moving]
        for source, h in (("one pass", first), ("ten passes", average)):
            report(f"{name}, {source}", flat_m, torch.cat([h[i].flatten() for i in members])[moving], flat_t)


def report(title: str, m: torch.Tensor, h: torch.Tensor, truth: torch.Tensor) -> None:
    """Print a table of one group: a line for each damping."""
    mean = h.mean()
    thin = max(1, len(h) // 1_000_000)
    spread = ", ".join(f"{q:.2g}" for q in (h[::thin].quantile(torch.tensor([0.1, 0.5, 0.9])) / mean).tolist())
    print(f"\n{title}: {len(m):,} coordinates with momentum, rms {m.square().mean().sqrt():.2g}")
    print(f"mean h {mean:.3g}; 10, 50 and 90 % of h are at {spread} times the mean")
    rows = []
    for damping in DAMPINGS:
        ratio = m / (h + damping * mean + 1e-30)
        clipped = (ratio / RHO).clamp(-1, 1)
        win = float((clipped.abs() < 1).float().mean())
        cosine = float(clipped.abs().sum() / (clipped.norm() * math.sqrt(len(m))))
        gains = []
        for share in SHARES:
            u = ratio.clone() if share == 1 else (ratio / ratio[::thin].abs().quantile(share)).clamp(-1, 1)
            gain = math.fsum(float(a.dot(b)) for a, b in zip(m.split(PIECE), u.split(PIECE), strict=True))
            u.square_()
            cost = math.fsum(float(a.dot(b)) for a, b in zip(truth.split(PIECE), u.split(PIECE), strict=True))
            gains.append(gain**2 / cost)
        rows.append((damping, win, cosine, gains))
    best = [max(row[3][j] for row in rows) for j in range(len(SHARES))]
    print(f"{'damping':>8} {'win rate':>9} {'cos sign':>9} " + " ".join(f"{f'gain {s:.0%}':>10}" for s in SHARES))
    for damping, win, cosine, gains in rows:
        shown = " ".join(f"{g / b:10.3f}" for g, b in zip(gains, best, strict=True))
        print(f"{damping:8g} {win:9.3f} {cosine:9.3f} {shown}")
    print("the best of each column: " + ", ".join(f"{b:.3g}" for b in best), flush=True)


if __name__ == "__main__":
    main()
