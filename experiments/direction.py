"""Which direction is good: at the same forgetting, what does one step along each preconditioned gradient damage?

    python experiments/direction.py --tofu ../shared/data/tofu

SmolLM2-135M, taught TOFU's first and last ten authors (``recipes/first-run/taught.yaml``), forgets the last two (40
questions). For each preconditioner ``P`` the step ``u = P grad NLL(forget)`` is scaled by a line search to the same
NLL of the forgotten answers; then the damage is measured: KL from the model before and probability of the answer on
retained authors whose questions the curvature saw, on retained authors it did not see, NLL of plain text; beside it the
forgotten answer's probability under its own and under the paraphrased question. The same over several steps with
refreshed gradients.

Only the linear layers of the blocks move, for every rule alike. A seed chooses which retained authors the curvature
sees, which are evaluated, and the curvature's noise. Each line of ``docs/results/direction.jsonl`` is one (rule, steps,
target, seed); what is there is not run again, and ``--table`` prints tables of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from first_run import RECIPES, RUNS, prepare
from soul.cli import progress_bars
from soul.console import quiet
from soul.curvature.estimators import ggn_cotangent
from soul.curvature.inverses import EigenInverse, KroneckerInverse, damped
from soul.curvature.kronecker import KroneckerFactors
from soul.data.batches import collate_rows
from soul.data.general import general_text
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate, Encoded
from soul.forward import forward_answers, head_of
from soul.machine import has_bf16
from soul.models import ModelSpec, load_model
from soul.recipe import read_recipe
from soul.run import execute
from soul.types import Example

RECORD = Path(__file__).parents[1] / "docs/results/direction.jsonl"
AUTHORS, QUESTIONS = 18, 20  # retained authors that were taught, and questions about each
SEEN, EVALUATED = 4, 8  # authors the curvature sees (and as many it does not), questions of each that are evaluated
TEXTS = 8  # plain passages the curvature sees; the other 16 are evaluated
BATCH = 8
Vector = dict[str, torch.Tensor]
Rule = Callable[[Vector], Vector]
Job = tuple[int, float, Sequence[str]]  # steps, target NLL, and which rules (all where empty)


@dataclasses.dataclass
class Sets:
    """Tokenised sets of one seed."""

    forget: list[Encoded]
    paraphrased: list[Encoded]
    curvature: list[Encoded]
    seen: list[Encoded]
    unseen: list[Encoded]
    text: list[Encoded]


def sets_of(template: ChatTemplate, seed: int) -> Sets:
    """Cut the data: by author, so that unseen means a person the curvature knows nothing of."""
    kept = load_examples(str(RUNS / "data/retained.jsonl"))
    forget = load_examples(str(RUNS / "data/forget01_perturbed.json"))
    text = general_text()
    order = np.random.default_rng([seed, 7]).permutation(AUTHORS)
    by_author = [kept[i * QUESTIONS : (i + 1) * QUESTIONS] for i in range(AUTHORS)]
    seen, unseen = ([by_author[i] for i in order[a:b]] for a, b in ((0, SEEN), (SEEN, 2 * SEEN)))

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        return [template.encode(e, index=i) for i, e in enumerate(examples)]

    return Sets(
        encode(forget),
        [template.encode(e, prompt=e.paraphrased_prompt, index=i) for i, e in enumerate(forget)],
        encode([e for author in seen for e in author] + text[:TEXTS]),
        encode([e for author in seen for e in author[:EVALUATED]]),
        encode([e for author in unseen for e in author[:EVALUATED]]),
        encode(text[TEXTS:]),
    )


def batches(rows: Sequence[Encoded], size: int = BATCH) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, longest rows together."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(rows), size):
        yield collate_rows([rows[i] for i in order[start : start + size]])


class Bench:
    """The model, its layers, and what is measured on it."""

    def __init__(self, model: Any, sets: Sets) -> None:
        self.model, self.sets = model.eval(), sets
        self.layers = KroneckerFactors(model).layers
        for p in model.parameters():
            p.requires_grad_(False)
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
        self.origin: Vector = {n: layer.weight.detach().clone() for n, layer in self.layers.items()}
        self.head = head_of(model)
        self.before = {name: self._hidden(getattr(sets, name)) for name in ("seen", "unseen")}
        self.text_before = self.nll("text")[0]
        has = has_bf16()
        self.fast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=has)  # gradients and searches, as in training

    def _hidden(self, rows: Sequence[Encoded]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [forward_answers(self.model, b).hidden_ND for b in batches(rows)]

    def set(self, base: Vector, step: Vector | None = None, scale: float = 0.0) -> None:
        """Put the weights at ``base + scale step``."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(base[name])
                if step is not None:
                    layer.weight.add_(step[name], alpha=scale)

    def now(self) -> Vector:
        """Return a copy of the weights."""
        return {n: layer.weight.detach().clone() for n, layer in self.layers.items()}

    def nll(self, name: str) -> tuple[float, float, float]:
        """Return NLL and, where the answers before are known, ``KL(p_before || p)``, means over a set's answer tokens.

        Between the two stands the mean probability ``exp(-NLL of the answer)``.
        """
        total, kl, count, chances = 0.0, 0.0, 0, []
        before = self.before.get(name, [])
        with torch.no_grad():
            for i, batch in enumerate(batches(getattr(self.sets, name))):
                answers = forward_answers(self.model, batch)
                logps = answers.token_logps()
                total, count = total - float(logps.sum()), count + len(logps)
                lengths = answers.sum_rows(torch.ones_like(logps))
                chances += (answers.sum_rows(logps) / lengths).exp().tolist()
                if before:
                    ref = self.head(before[i]).float().log_softmax(-1)
                    new = answers.logits_NV.float().log_softmax(-1)
                    kl += float(nn.functional.kl_div(new, ref, log_target=True, reduction="sum"))
        return total / count, float(np.mean(chances)), kl / count

    def gradient(self, rows: Sequence[Encoded]) -> Vector:
        """Return the gradient of the mean NLL an answer token."""
        tokens = sum(row.answer_length for row in rows)
        self.model.zero_grad()
        for batch in batches(rows):
            with self.fast():
                answers = forward_answers(self.model, batch)
            (-answers.token_logps().sum() / tokens).backward()
        return self._take()

    def _take(self) -> Vector:
        found = {}
        for name, layer in self.layers.items():
            assert layer.weight.grad is not None
            found[name], layer.weight.grad = layer.weight.grad, None
        return found


@dataclasses.dataclass
class Curvature:
    """What one pass over the curvature's examples found, at one temperature."""

    diagonal: Vector
    factors: KroneckerFactors
    eigen: EigenInverse | None


def curvature_of(bench: Bench, seed: int, *, temperature: float = 1.0, eigen: bool = False) -> Curvature:
    """Estimate diagonal and factors from the same cotangents; the eigenvalue correction from a second pass."""
    rows = bench.sets.curvature
    tokens = sum(row.answer_length for row in rows)
    factors = KroneckerFactors(bench.model)
    diagonal = {name: torch.zeros_like(w) for name, w in bench.origin.items()}

    def sweep(take: Callable[[Vector], None], noise: int) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + noise)
        for batch in batches(rows):
            bench.model.zero_grad()
            with factors.observing(batch["attention_mask"].bool()):
                with bench.fast():
                    logits = forward_answers(bench.model, batch).logits_NV
                weights = torch.full((len(logits),), 1 / tokens)
                # softmax(z / t) has Jacobian 1/t: the constant is lost in the line search
                logits.backward(gradient=ggn_cotangent(logits.detach() / temperature, weights, generator))
            take(bench._take())

    def square(g: Vector) -> None:
        for name, value in g.items():
            diagonal[name].addcmul_(value, value)

    sweep(square, 0)
    factors.absorb()
    if not eigen:
        return Curvature(diagonal, factors, None)
    corrected = EigenInverse(factors, 0.1)

    def correct(g: Vector) -> None:
        for name, value in g.items():
            corrected.add(name, value)

    sweep(correct, 1)
    corrected.absorb()
    return Curvature(diagonal, factors, corrected)


def clipped(h: Vector, share: float) -> Rule:
    """Sophia's step with rho set so that ``share`` of the coordinates is not clipped; 1 clips nothing."""

    def rule(g: Vector) -> Vector:
        floors = {n: 0.01 * x.mean() for n, x in h.items()}
        ratios = {n: g[n] / (h[n] + floors[n]) for n in g}
        if share >= 1:
            return ratios
        sample = torch.cat([r.flatten()[:: max(1, r.numel() // 10_000)].abs() for r in ratios.values()])
        bound = float(sample.quantile(share))
        return {n: (r / bound).clamp_(-1, 1) for n, r in ratios.items()}

    return rule


def square_root(h: Vector) -> Rule:
    """Divide by the root of the curvature, as Adam does by the root of the squared gradient."""
    return lambda g: {n: d / (h[n] + 0.01 * h[n].mean()).sqrt() for n, d in g.items()}


def permuted(h: Vector, seed: int) -> Vector:
    """Return ``h`` with its entries shuffled within each tensor: the right spectrum in the wrong places."""
    generator = torch.Generator().manual_seed(seed)
    return {n: x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x) for n, x in h.items()}


def whitened_sign(factors: KroneckerFactors, damping: float) -> Rule:
    """Return ``sign(D L^-T) L^-1`` with ``A + damping = L L^T``: sign descent in the whitened basis."""
    roots: dict[str, torch.Tensor] = {}

    def rule(g: Vector) -> Vector:
        out = {}
        for name, d in g.items():
            shared = factors.input_of(name)
            if shared not in roots:
                roots[shared] = torch.linalg.cholesky(damped(factors.inputs(shared), damping)).float()
            root = roots[shared]
            white = torch.linalg.solve_triangular(root, d.T, upper=False).T
            out[name] = torch.linalg.solve_triangular(root.T, white.sign().T, upper=True).T
        return out

    return rule


def random_basis(factors: KroneckerFactors, damping: float, seed: int) -> Rule:
    """Whiten by matrices with the spectra of ``A`` and random eigenvectors: what is left if the directions are luck."""
    inverses: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def rule(g: Vector) -> Vector:
        out = {}
        for name, d in g.items():
            shared = factors.input_of(name)
            if shared not in inverses:
                values = torch.linalg.eigvalsh(factors.inputs(shared)).clamp(min=0)
                q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator))
                inverses[shared] = (q / (values + damping * values.mean())) @ q.T
            out[name] = d @ inverses[shared]
        return out

    return rule


def by_layer(solve: Callable[[str, torch.Tensor], torch.Tensor]) -> Rule:
    """Turn an inverse of one layer into a rule."""
    return lambda g: {name: solve(name, d) for name, d in g.items()}


def adam(bench: Bench) -> Rule:
    """AdamW's direction with its second moment already settled: the mean of squared micro-batch forget gradients."""
    rows = bench.sets.forget
    second: Vector = {n: torch.zeros_like(w) for n, w in bench.origin.items()}
    groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    for group in groups:
        for name, g in bench.gradient(group).items():
            second[name].addcmul_(g, g, value=1 / len(groups))
    return lambda g: {n: d / (second[n].sqrt() + 1e-8) for n, d in g.items()}


def rules(bench: Bench, seed: int) -> Iterator[tuple[str, Callable[[], Rule]]]:
    """Yield every rule by name, made when asked for; the curvature of a seed is found once."""
    found: dict[str, Curvature] = {}

    def curvature(kind: str = "plain") -> Curvature:
        if kind not in found:
            bench.set(bench.origin)
            found.clear()  # one at a time: factors and their inverses are several times the model
            options = {"tempered": {"temperature": 2.0}, "eigen": {"eigen": True}}.get(kind, {})
            found[kind] = curvature_of(bench, seed, **options)
        return found[kind]

    yield "identity", lambda: lambda g: g
    yield "sign", lambda: lambda g: {n: d.sign() for n, d in g.items()}
    yield "adamw", lambda: adam(bench)
    for share in (0.1, 0.3, 0.5, 1.0):
        label = f"diagonal, {share:.0%} unclipped" if share < 1 else "diagonal, unclipped"
        yield label, lambda share=share: clipped(curvature().diagonal, share)
    yield "diagonal, square root", lambda: square_root(curvature().diagonal)
    yield "diagonal permuted, unclipped", lambda: clipped(permuted(curvature().diagonal, seed), 1.0)
    for damping in (0.1, 0.01, 0.003):
        yield (
            f"input whitening, {damping:g}",
            lambda x=damping: by_layer(KroneckerInverse(curvature().factors, x, outputs=False)),
        )
    yield "input whitening by a random basis, 0.003", lambda: random_basis(curvature().factors, 0.003, seed)
    yield "sign in the whitened basis, 0.003", lambda: whitened_sign(curvature().factors, 0.003)
    for damping in (0.1, 0.01):
        yield f"K-FAC, {damping:g}", lambda x=damping: by_layer(KroneckerInverse(curvature().factors, x))
    yield "K-FAC tempered (2), 0.1", lambda: by_layer(KroneckerInverse(curvature("tempered").factors, 0.1))

    def corrected(damping: float) -> Rule:
        eigen = curvature("eigen").eigen
        assert eigen is not None
        eigen.damping = damping
        return by_layer(eigen)

    for damping in (0.1, 0.01):
        yield f"EK-FAC, {damping:g}", lambda x=damping: corrected(x)


def search(
    bench: Bench, base: Vector, step: Vector, start: float, scale: float, target: float, slack: float
) -> tuple[float, float]:
    """Find the scale at which the forgotten answers' NLL is the target, from a first guess; returns (scale, NLL)."""
    low, high, value = (0.0, start), None, math.nan
    for _ in range(14):
        bench.set(base, step, scale)
        with bench.fast():
            value = bench.nll("forget")[0]
        if abs(value - target) < slack:
            break
        if math.isfinite(value) and value < target:
            low = (scale, value)
        else:
            high = (scale, value)
        if high is None:
            scale *= 2
        else:
            share = (target - low[1]) / (high[1] - low[1]) if math.isfinite(high[1]) else 0.5
            scale = low[0] + min(max(share, 0.15), 0.85) * (high[0] - low[0])
    return scale, value


def walk(bench: Bench, rule: Rule, steps: int, target: float) -> tuple[Vector, float]:
    """Take ``steps`` steps with refreshed gradients to the target NLL, in equal parts of the way there."""
    bench.set(bench.origin)
    with bench.fast():
        start = bench.nll("forget")[0]
    base, value, scale = bench.now(), start, 0.0
    for i in range(1, steps + 1):
        g = bench.gradient(bench.sets.forget)
        step = rule(g)
        goal = start + (target - start) * i / steps
        slope = float(sum((g[n] * step[n]).sum() for n in g))
        guess = scale or (goal - value) / max(slope, 1e-30)
        scale, value = search(bench, base, step, value, guess, goal, 0.02 if i == steps else 0.1 * (goal - value))
        base = bench.now()
    return base, bench.nll("forget")[0]


def damage(bench: Bench) -> dict[str, float]:
    """Measure the model as it is now."""
    found: dict[str, float] = {}
    for name in ("forget", "paraphrased"):
        found[f"{name}_probability"] = bench.nll(name)[1]
    for name in ("seen", "unseen"):
        _, found[f"{name}_probability"], found[f"{name}_kl"] = bench.nll(name)
    found["text_nll_increase"] = bench.nll("text")[0] - bench.text_before
    moved = sum(float((w - bench.origin[n]).square().sum()) for n, w in bench.now().items())
    return found | {"distance": math.sqrt(moved)}


def one_seed(seed: int, jobs: Sequence[Job], only: Sequence[str], tick: Callable[[str, int, int], None]) -> None:
    """Run what is missing of a seed, job by job, of the rules whose names begin as ``only`` says."""
    done = {(x["rule"], x["steps"], x["target"], x["seed"]) for x in read()}
    model, tokenizer = load_model(ModelSpec(str(RUNS / "taught/model")))
    bench = Bench(model, sets_of(ChatTemplate(tokenizer), seed))
    if ("before", 0, 0.0, seed) not in done:
        write({"rule": "before", "steps": 0, "target": 0.0, "seed": seed, "forget_nll": bench.nll("forget")[0]}, bench)
    for steps, target, names in jobs:
        for name, make in rules(bench, seed):
            known = (name, steps, target, seed) in done
            if known or not name.startswith(tuple(names or ("",))) or not name.startswith(tuple(only)):
                continue
            tick(f"seed {seed}, {steps} to {target:g}: {name}", 0, 1)
            started = time.perf_counter()
            rule = make()
            prepared = time.perf_counter() - started
            _, value = walk(bench, rule, steps, target)
            line = {"rule": name, "steps": steps, "target": target, "seed": seed, "forget_nll": value}
            write(line | {"prepare_seconds": round(prepared, 1)}, bench)
            tick(f"seed {seed}, {steps} to {target:g}: {name}", 1, 1)


def read() -> list[dict[str, Any]]:
    """Return the lines measured so far."""
    return [json.loads(text) for text in RECORD.read_text().splitlines()] if RECORD.is_file() else []


def write(line: dict[str, Any], bench: Bench) -> None:
    """Append a line with what the model is like now."""
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {k: round(v, 5) for k, v in damage(bench).items()}) + "\n")


def table(lines: Sequence[dict[str, Any]], steps: int, target: float) -> str:
    """Return the Markdown table of one (steps, target), means over seeds, best unseen KL first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for x in lines:
        if x["rule"] == "before" or (x["steps"], x["target"]) == (steps, target):
            groups.setdefault(x["rule"], []).append(x)
    keys = ("seen_probability", "unseen_probability", "seen_kl", "unseen_kl", "text_nll_increase")
    keys += ("paraphrased_probability", "distance")
    out = ["| rule | seeds | " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for name, found in sorted(groups.items(), key=lambda kv: np.mean([x["unseen_kl"] for x in kv[1]])):
        cells = []
        for key in keys:
            values = [x[key] for x in found]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 and key == "unseen_kl" else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if key != "distance" else f"{np.mean(values):.1f}")
        out.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(out)


CHOSEN = (
    "sign",
    "adamw",
    "diagonal, 30%",
    "input whitening, 0.003",
    "sign in the whitened",
    "K-FAC, 0.1",
    "EK-FAC, 0.1",
)
JOBS: tuple[Job, ...] = (
    (1, 1.0, ()),
    (1, 2.0, CHOSEN),
    (5, 2.0, CHOSEN),
    (10, 2.0, ("sign", "adamw", "input whitening, 0.003", "K-FAC, 0.1")),
)


def main() -> int:
    """Teach if need be, measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, default=Path("../shared/data/tofu"), help="folder with TOFU's files")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rules", nargs="*", default=[""], help="only rules whose names begin so")
    parser.add_argument("--table", action="store_true", help="only print the tables of what was measured")
    args = parser.parse_args()
    quiet()
    if not args.table:
        prepare(args.tofu, RUNS / "data")
        with progress_bars() as tick:
            execute(read_recipe(RECIPES / "taught.yaml"), RUNS / "taught", progress=tick, evaluate_it=False)
            for seed in args.seeds:
                one_seed(seed, JOBS, args.rules, tick)
    lines = read()
    for steps, target, _ in JOBS:
        print(
            f"\n{steps} step{'s' if steps > 1 else ''} to a forget NLL of {target:g}\n\n{table(lines, steps, target)}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
