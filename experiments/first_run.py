"""The first run on real TOFU: two objectives by three optimizers, each at the best of five learning rates.

    python experiments/first_run.py --tofu ../shared/data/tofu

SmolLM2-135M learns TOFU's first 10 and last 10 authors (400 questions); a retained model learns all but the last two.
Then ``forget01``, the last two authors (40 questions), is unlearned by 2 objectives x 3 optimizers x 5 rates. Every
part is a run directory under ``runs/first-run``: an interrupted sweep goes on where it stopped. Out come
``docs/results/first-run/`` (every rate, every record, ``tables.md``), and a recipe with
the best rate for each pair under ``recipes/first-run``.

Best rate: the largest harmonic mean of ``1 - D``, where ``D`` is the two-sample KS statistic between the truth ratios
of the model and of the retained model on the forget set, and kept utility, the mean probability of 200 fixed answers
(66 of the taught authors that stay, 67 real authors, 67 world facts) divided by the taught model's, at most 1. It
needs no generation, which makes thirty runs affordable; the winners are then measured in full.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from soul import config
from soul.benchmarks.tofu import Tofu
from soul.cli import progress_bars
from soul.console import quiet
from soul.evaluate import EvaluationSpec, evaluate
from soul.metrics.tofu import answer_probability, forget_quality
from soul.models import ModelSpec, load_model
from soul.recipe import Recipe, read_recipe, recipe_from_tree
from soul.run import execute, score_dict
from soul.stored import write_json
from soul.strict import read_number
from soul.types import LostModelError, Row

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/first-run")
RECIPES = ROOT / "recipes/first-run"
RESULTS = ROOT / "docs/results"
OBJECTIVES = ("grad_diff", "npo")
OPTIMIZERS = ("adamw", "soul_release", "sophia")
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)  # two decades, in half-decade steps
NEW_TOKENS = 72  # the longest of these answers has 69
UTILITY = {"retain_perturbed": 66, "real_authors_perturbed": 67, "world_facts_perturbed": 67}
Measured = dict[str, list[Row]]
Tick = Callable[[str, int, int], None]
TRAINING = {"batch_size": 4, "epochs": 2, "warmup": 0.1, "seed": 0}


def prepare(tofu: Path, folder: Path) -> None:
    """Cut the training sets and the fixed 200 questions out of TOFU's files.

    Raises:
        ValueError: A file is missing.
    """

    def read(name: str) -> list[dict[str, Any]]:
        file = tofu / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"no {file}: --tofu takes a folder with TOFU's files, such as full.json")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    full, lost = read("full"), read("forget01")
    taught = full[:200] + full[-200:]
    gone = {(row["question"], row["answer"]) for row in lost}
    kept = [row for row in taught if (row["question"], row["answer"]) not in gone]
    assert (len(taught), len(lost), len(kept)) == (400, 40, 360)
    write("taught.jsonl", taught)
    write("retained.jsonl", kept)
    write("forget01.jsonl", lost)
    write("forget01_perturbed.json", read("forget01_perturbed"))
    for name, n in UTILITY.items():
        rows = read(name)[:200] if name.startswith("retain") else read(name)  # the first 200 are the taught authors'
        picked = sorted(np.random.default_rng(0).permutation(len(rows))[:n].tolist())
        write(f"{name}.json", [rows[i] for i in picked])


def benchmark() -> Tofu:
    """Return the benchmark on the cut sets."""
    return Tofu(forget="forget01", source=str(RUNS / "data"))


def unlearn_recipe(objective: str, optimizer: str, lr: float) -> Recipe:
    """Return the recipe of one run of the sweep."""
    data = RUNS / "data"
    return recipe_from_tree(
        {
            "label": f"{objective} + {optimizer}",
            "model": str(RUNS / "taught/model"),
            "data": {"forget": str(data / "forget01.jsonl"), "retain": str(data / "retained.jsonl")},
            "objective": objective,
            "optimizer": {"name": optimizer, "lr": lr},
            "training": TRAINING,
            "benchmark": {"name": "tofu", **dataclasses.asdict(benchmark())},
            "reference_run": str(RUNS / "retained"),
            "evaluation": {"max_new_tokens": NEW_TOKENS},
        }
    )


def quick_scores(rows: Measured, taught: Measured, gold: Measured) -> dict[str, Any]:
    """Return the numbers a rate is chosen by."""

    def probability(of: Measured, splits: list[str]) -> float:
        return float(np.mean([answer_probability(row) for split in splits for row in of[split]]))

    kept = [split for split in rows if split != "forget"]
    statistic, pvalue = forget_quality(rows["forget"], gold["forget"])
    utility = min(1.0, probability(rows, kept) / probability(taught, kept))
    closeness = 1 - statistic
    return {
        "forget_probability": probability(rows, ["forget"]),
        **{f"{split}_probability": probability(rows, [split]) for split in kept},
        "ks": statistic,
        "forget_quality": pvalue,
        "kept_utility": utility,
        "criterion": 2 * closeness * utility / (closeness + utility) if closeness + utility else 0.0,
    }


def sweep_one(recipe: Recipe, out: Path, taught: Measured, gold: Measured, tick: Tick) -> dict[str, Any]:
    """Train one run of the sweep, measure it quickly, and return its line of the record."""
    line: dict[str, Any] = {
        "objective": recipe.objective.name,
        "optimizer": recipe.optimizer.name,
        "lr": recipe.optimizer.lr,
    }
    if (out / "quick.json").is_file():
        return json.loads((out / "quick.json").read_text())
    try:
        execute(recipe, out, progress=tick, evaluate_it=False)
    except LostModelError as error:  # a rate that loses the model is a result, too
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        line |= {"lost": str(error), "criterion": 0.0}
    else:
        # of the 200 questions only the true answers, and nothing generated
        splits = {
            name: examples if name == "forget" else [dataclasses.replace(e, wrong_answers=()) for e in examples]
            for name, examples in benchmark().splits().items()
        }
        model = load_model(ModelSpec(str(out / "model")))
        rows = evaluate(*model, splits, spec=EvaluationSpec(generate=False), folder=out / "quick", progress=tick)
        line |= quick_scores(rows, taught, gold)
    steps = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    rates = [step["win_rate"] for step in steps if step.get("win_rate") is not None]
    line |= {"steps": len(steps), "seconds": round(sum(step["seconds"] for step in steps), 1)}
    line["win_rate"] = float(np.mean(rates)) if rates else None
    write_json(out / "quick.json", line)
    return line


def measure_fully(name: str, tick: Tick) -> Measured:
    """Measure the taught or the retained model on everything."""
    model = load_model(ModelSpec(str(RUNS / name / "model")))
    spec = EvaluationSpec(max_new_tokens=NEW_TOKENS)
    return evaluate(*model, benchmark().splits(), spec=spec, folder=RUNS / name / "rows/after", progress=tick)


def sweep(objective: str, optimizer: str, taught: Measured, gold: Measured, bar: Tick) -> list[dict[str, Any]]:
    """Run all rates of one pair, keeping the best model only; then measure that one in full."""
    lines: list[dict[str, Any]] = []
    folders: list[Path] = []
    best = 0
    for lr in RATES:
        name = f"{objective}-{optimizer}-{lr:g}"
        folders.append(RUNS / "sweep" / name)
        recipe = unlearn_recipe(objective, optimizer, lr)
        lines.append(sweep_one(recipe, folders[-1], taught, gold, titled(name, bar)))
        best = max(range(len(lines)), key=lambda i: lines[i]["criterion"])
        for i, folder in enumerate(folders):
            if i != best:
                shutil.rmtree(folder / "model", ignore_errors=True)
        line = lines[-1]
        print(
            f"{name}: forgotten {line.get('forget_probability', float('nan')):.3f}, criterion {line['criterion']:.3f}"
        )
    winner = folders[best]
    if not (winner / "rows/before").is_dir():
        shutil.copytree(RUNS / "taught/rows/after", winner / "rows/before")  # the same model on the same questions
    recipe = unlearn_recipe(objective, optimizer, RATES[best])
    execute(recipe, winner, progress=titled(winner.name, bar))
    head = "# Written by experiments/first_run.py: the best of five rates.\n"
    (RECIPES / f"{objective}-{optimizer}.yaml").write_text(head + config.dump(recipe), encoding="utf-8")
    keep_record(winner, RESULTS / f"first-run/{objective}-{optimizer}")
    shutil.rmtree(winner / "model", ignore_errors=True)
    for line in lines:
        line["best"] = line is lines[best]
    return lines


def keep_record(run: Path, folder: Path) -> None:
    """Copy a run's record without weights and without TOFU's texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("recipe.yaml", "record.json", "scores.json", "environment.json", "log.jsonl"):
        if (run / file).is_file():
            shutil.copy(run / file, folder / file)
    rows = {
        split.stem: [
            {k: v for k, v in json.loads(line).items() if k not in ("prompt", "answer", "generated", "subject")}
            for line in split.read_text(encoding="utf-8").splitlines()
        ]
        for split in sorted((run / "rows/after").glob("*.jsonl"))
    }
    (folder / "rows.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n", encoding="utf-8")


def titled(name: str, bar: Tick) -> Tick:
    """Put a run's name before what the bars show."""
    return lambda what, done, of: bar(f"{name}: {what}", done, of)


def table(lines: list[dict[str, Any]], scores: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results as Markdown."""
    head = "| model | lr | forget: probability | ROUGE-L | truth ratio | KS to retained | forget quality | utility |"
    out = [head, "|---|---|---|---|---|---|---|---|"]
    rates = {f"{x['objective']} + {x['optimizer']}": x for x in lines if x["best"]}

    def cell(found: dict[tuple[str, str], dict[str, Any]], split: str, metric: str) -> str:
        s = found.get((split, metric))
        if s is None:
            return "-"
        value, low, high = (read_number(s[name]) for name in ("value", "low", "high"))
        if metric == "forget_quality":
            return f"{value:.2g}"
        return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if not math.isnan(low) else "")

    for name, found in scores.items():
        values = {(s["split"], s["metric"]): s for s in found}
        cells = [cell(values, "forget", m) for m in ("probability", "rougeL_recall", "truth_ratio")]
        cells += [cell(values, "forget", "forget_quality_ks"), cell(values, "forget", "forget_quality")]
        lr = f"{rates[name]['lr']:g}" if name in rates else ""
        out.append(f"| {name} | {lr} | {' | '.join(cells)} | {cell(values, '', 'model_utility')} |")
    out += [
        "",
        "| objective | optimizer | lr | forget: probability | KS | kept utility | criterion | win rate | best |",
    ]
    out.append("|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        numbers = [x.get(k) for k in ("forget_probability", "ks", "kept_utility", "criterion", "win_rate")]
        cells = ["-" if v is None else f"{v:.3f}" for v in numbers]
        mark = "best" if x["best"] else ""
        out.append(f"| {x['objective']} | {x['optimizer']} | {x['lr']:g} | {' | '.join(cells)} | {mark} |")
    return "\n".join(out) + "\n"


def main() -> int:
    """Run everything that is not done yet, then write records, recipes and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, default=Path("../shared/data/tofu"), help="folder with TOFU's files")
    args = parser.parse_args()
    quiet()
    started = time.perf_counter()
    prepare(args.tofu, RUNS / "data")
    measured: dict[str, Measured] = {}
    lines: list[dict[str, Any]] = []
    with progress_bars() as bar:
        for name in ("taught", "retained"):
            recipe = read_recipe(RECIPES / f"{name}.yaml")
            execute(recipe, RUNS / name, progress=titled(name, bar), evaluate_it=False)
            measured[name] = measure_fully(name, titled(name, bar))
            keep_record(RUNS / name, RESULTS / f"first-run/{name}")
        for objective in OBJECTIVES:
            for optimizer in OPTIMIZERS:
                lines += sweep(objective, optimizer, measured["taught"], measured["retained"], bar)
                write_json(RESULTS / "first-run/sweep.json", lines)
    scores = {
        name: [score_dict(s) for s in benchmark().score(rows, measured["retained"])] for name, rows in measured.items()
    }
    for line in lines:
        if line["best"]:
            pair = f"{line['objective']}-{line['optimizer']}"
            found = json.loads((RESULTS / f"first-run/{pair}/scores.json").read_text())
            scores[f"{line['objective']} + {line['optimizer']}"] = found["after"]
    (RESULTS / "first-run/tables.md").write_text(table(lines, scores), encoding="utf-8")
    print(table(lines, scores))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in this sitting")
    return 0


if __name__ == "__main__":
    sys.exit(main())
