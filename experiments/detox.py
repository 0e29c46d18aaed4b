"""Detox: answers that people rejected are forgotten by three objectives and three optimizers.

    python experiments/detox.py            # everything that is not done; an interrupted run goes on
    python experiments/detox.py --report   # only the tables again, from the records

SmolLM2-135M-Instruct forgets 40 ``rejected`` answers of hh-rlhf (harmless-base) and keeps WikiText paragraphs and
everyday chat, by ``grad_diff``, ``npo`` and ``po`` with AdamW, sign-momentum and K-FAC, each at three learning rates:
27 cells of 10 steps, a line of ``docs/results/detox/cells.jsonl`` each. The records hold no text.

Measured are continuations of RealToxicityPrompts and answers to questions of hh-rlhf that were not trained on. They are
judged by the hub's classifier where it can be loaded, and otherwise by one trained on RealToxicityPrompts' scores: the
name in each column says which. Perplexity is of WikiText paragraphs that were not trained on.

The rate of a pair: the largest harmonic mean of ``detoxified``, the part of the expected maximum toxicity (mean of the
three sets of prompts) that is gone, and ``kept text``, the perplexity before divided by the one after; from 0 to 1. It
is picked on the prompts that are reported: what it says is what a rule can do, not what it will do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cells import RATES, Plan, Values, read_lines, run_cells, start, write_tables
from soul.benchmarks.detox import TOXIC_SPLITS, Detox
from soul.data.plain import plain_text
from soul.data.toxic import rejected_answers
from soul.strict import read_number
from soul.toxicity import load_classifier
from soul.types import Example

ROOT = Path(__file__).parents[1]
DATA = Path("../shared/data")
WORDS = (8, 60)  # of a rejected answer
BEFORE = 80  # words of the turns before it, at most
METRICS = ("expected_max_toxicity", "toxicity_probability", "toxicity")


def row_of(example: Example) -> dict[str, Any]:
    """Return an example as a row of messages."""
    turns = [*example.history, ("user", example.prompt), ("assistant", example.answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "id": example.id}


def prepare(hh: str, wikitext: str, folder: Path, n: int = 40, seed: int = 0) -> None:
    """Pick what is forgotten, what is kept, and the questions and passages that are measured, all of them apart.

    Raises:
        ValueError: A source cannot be read, or has too few answers of middle length.
    """
    fit: dict[str, Example] = {}
    for i, e in enumerate(rejected_answers(hh)):
        before = " ".join([*(said for _, said in e.history), e.prompt])
        if WORDS[0] <= len(e.answer.split()) <= WORDS[1] and len(before.split()) <= BEFORE:
            fit.setdefault(e.history[0][1] if e.history else e.prompt, dataclasses.replace(e, id=f"hh:{i}"))
    order = np.random.default_rng(seed).permutation(len(fit))
    if len(fit) < 2 * n:
        raise ValueError(f"{hh} has {len(fit)} rejected answers of middle length, and {2 * n} are needed")
    picked = [list(fit.values())[i] for i in order[: 2 * n]]
    texts = [e.answer for e in plain_text(wikitext, 2 * n)]
    sets = {
        "forget": [row_of(e) for e in picked[:n]],
        "questions": [row_of(e) for e in picked[n:]],
        "kept": [{"text": text} for text in texts[::2]],
        "text": [{"text": text} for text in texts[1::2]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def of_any(values: Values, split: str, metric: str) -> float:
    """Return a toxicity metric, whichever classifier measured it."""
    found = next(s["value"] for (where, name), s in values.items() if where == split and name.startswith(metric))
    value = read_number(found)
    return value if math.isfinite(value) else math.inf  # as bad as can be


def judge(after: Values, before: dict[str, Values]) -> dict[str, float]:
    """Return the parts of the criterion."""
    base = before["base"]
    toxic = [float(np.mean([of_any(v, s, "expected_max_toxicity[") for s in TOXIC_SPLITS])) for v in (after, base)]
    ppl = [of_any(v, "text", "perplexity") for v in (after, base)]
    return {"detoxified": min(1.0, max(0.0, 1 - toxic[0] / toxic[1])), "kept text": min(1.0, ppl[1] / ppl[0])}


def columns(classifier: str) -> dict[str, tuple[str, str]]:
    """Return the columns of the table for a classifier."""
    shown = {
        f"{split.replace('_', ' ')}: {metric.replace('_', ' ')} ({classifier})": (split, f"{metric}[{classifier}]")
        for split in TOXIC_SPLITS
        for metric in METRICS[: 2 if split == "toxic_prompts" else 1]
    }
    return shown | {"perplexity": ("text", "perplexity")}


def classifier_of(file: Path) -> str:
    """Return the classifier that the records were judged by.

    Raises:
        ValueError: There are none, or two: scores of two classifiers do not compare.
    """
    names = {
        score["metric"].partition("[")[2].rstrip("]")
        for line in read_lines(file)
        for score in line.get("scores", [])
        if score["split"] in TOXIC_SPLITS
    }
    if len(names) != 1:
        raise ValueError(f"{file} holds scores of {', '.join(sorted(names)) or 'no classifier'}; there must be one")
    return names.pop()


def plan_of(
    benchmark: Detox,
    runs: Path,
    results: Path,
    model: str = "smollm2-135m",
    overrides: Sequence[str] = (),
    rates: Mapping[str, Sequence[float]] = RATES,
) -> Plan:
    """Return the plan of all cells."""
    data = runs / "data"
    sets = [f"data.forget={data / 'forget.jsonl'}", f'data.retain=[{data / "kept.jsonl"}, "general:chat"]']
    return Plan(
        name="detox",
        recipe=ROOT / "recipes/detox-forget.yaml",
        overrides=[*sets, *overrides],
        benchmark={"name": "detox", **dataclasses.asdict(benchmark)},
        before={"base": model},
        judge=judge,
        columns={},
        runs=runs,
        results=results,
        rates=rates,
    )


def report(plan: Plan) -> Path:
    """Write the tables from the records."""
    shown = dataclasses.replace(plan, columns=columns(classifier_of(plan.records)))
    return write_tables(shown, "Rejected answers forgotten")


def main() -> int:
    """Do what is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=str(DATA / "realtoxicityprompts/rtp_val5k.jsonl"))
    parser.add_argument("--hh", default=str(DATA / "hh_rlhf/harmless_base_test.jsonl"))
    parser.add_argument("--wikitext", default=str(DATA / "wikitext2/wiki.test.tokens"))
    parser.add_argument("--classifier", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/detox"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cells whose name begins so, e.g. npo-kfac")
    parser.add_argument("--most", type=int, default=0, help="stop after so many cells; 0 for all")
    parser.add_argument("--report", action="store_true", help="write the tables from the records, and nothing else")
    args = parser.parse_args()
    start(args.threads)
    data = args.runs / "data"
    benchmark = Detox(
        prompts=args.prompts,
        questions=str(data / "questions.jsonl"),
        text=str(data / "text.jsonl"),
        classifier=args.classifier,
        limit=20,
        samples=4,
    )
    plan = plan_of(benchmark, args.runs, args.results)
    if not args.report:
        prepare(args.hh, args.wikitext, data)
        classifier = load_classifier(benchmark.classifier, benchmark.prompts, benchmark.seed)
        print(f"judged by {classifier.label}" + (f", AUC {classifier.quality}" if classifier.quality else ""))
        run_cells(plan, args.only, args.most)
    print(report(plan).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
