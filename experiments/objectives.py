"""Every objective and method on TOFU's ``forget01``, with AdamW and K-FAC at one rate each, the same for all.

    python experiments/first_run.py --tofu ../shared/data/tofu   # teaches the model and the retained one
    python experiments/objectives.py                             # everything that is not done; goes on where it stopped
    python experiments/objectives.py --report                    # only the table again, from the records

SmolLM2-135M knows twenty of TOFU's authors and is to forget the last two (40 questions) in 10 steps of 4 + 4. Every
objective has its own defaults; where a default is meant for other sizes, :data:`SETTINGS` says what it is here and why.
Rates are not tuned: they are the middle ones of ``experiments/cells.py``. So a row says what an objective does when it
is simply asked to, and not what it could do. Measured on TOFU's forget set whole and 20 questions of each other set.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import cells
from cells import OPTIMIZERS, RATES, Plan, Values, by_name, number, read_lines, start
from soul import config
from soul.cli import progress_bars
from soul.recipe import recipe_from_tree

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/objectives")
TAUGHT = Path("runs/first-run")
SETTINGS: dict[str, dict[str, Any]] = {
    # the paper's steering is an absolute length for a 7B model; five times each token's own is right for any
    "rmu": {"adaptive": 5.0, "retain": "hidden", "retain_weight": 100.0},
    "kl": {"retain": "kl"},
    "l1_sparse": {"gamma": 1e-6},
}
OBJECTIVES = (
    *("ft", "l1_sparse", "ga", "grad_diff", "kl", "random_labels", "po", "ap", "dpo", "altpo", "npo", "simnpo"),
    *("rmu", "undial", "ceu", "wga", "satimp", "pdu", "me", "flat"),
)
ALONE = ("ga", "undial", "ceu", "flat")
"""Objectives of the forget set alone, as published; all others have a retain term."""
RATE = {name: rates[1] for name, rates in RATES.items() if name in ("adamw", "kfac")}
METHODS: dict[str, dict[str, Any]] = {
    "influence": {},
    "task_vector": {"lr": 3e-5, "training": {"batch_size": 4, "epochs": 3, "save_steps": 0}},
    "input_prompt": {},
}
COLUMNS = {
    "forget: probability": ("forget", "probability"),
    "ROUGE-L": ("forget", "rougeL_recall"),
    "extraction": ("forget", "extraction_strength"),
    "truth ratio": ("forget", "truth_ratio"),
    "KS to retained": ("forget", "forget_quality_ks"),
    "kept: probability": ("retain", "probability"),
    "kept: ROUGE-L": ("retain", "rougeL_recall"),
    "model utility": ("", "model_utility"),
}


def prepare(folder: Path) -> None:
    """Take the sets of the first run; wrong answers, which ``altpo`` learns from, come with the questions to forget.

    Raises:
        ValueError: The first run was not done.
    """
    data = TAUGHT / "data"
    for needed in (data / "forget01_perturbed.json", TAUGHT / "taught/model", TAUGHT / "retained/model"):
        if not needed.exists():
            raise ValueError(f"no {needed}: python experiments/first_run.py makes it")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (data / "forget01_perturbed.json").read_text("utf-8").splitlines()]
    kept = ("question", "answer", "perturbed_answer")
    text = "".join(json.dumps({k: row[k] for k in kept}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "forget.jsonl").write_text(text, encoding="utf-8")
    shutil.copyfile(data / "retained.jsonl", folder / "retain.jsonl")


def judge(after: Values, before: dict[str, Values]) -> dict[str, float]:
    """Return nothing: no rate is chosen here."""
    del after, before
    return {}


def plan_of(results: Path) -> Plan:
    """Return what the cells share."""
    return Plan(
        name="objectives",
        recipe=ROOT / "recipes/objectives.yaml",
        benchmark={"name": "tofu", "source": str(TAUGHT / "data"), "forget": "forget01", "limit": 20},
        before={"retained": str(TAUGHT / "retained/model"), "taught": str(TAUGHT / "taught/model")},
        judge=judge,
        columns=COLUMNS,
        runs=RUNS,
        results=results,
        rates={name: (rate,) for name, rate in RATE.items()},
        objectives={name: SETTINGS.get(name, {"retain": "none"} if name in ALONE else {}) for name in OBJECTIVES},
    )


def tree_of(plan: Plan) -> dict[str, Any]:
    """Return the settings that objectives and methods share."""
    tree = config.read_yaml(plan.recipe)
    return tree | {"model": plan.before["taught"], "benchmark": plan.benchmark, "reference_run": str(RUNS / "retained")}


def do(plan: Plan, only: str, most: int, tick: cells.Tick) -> None:
    """Do what has no line yet, in the order of the table."""
    cells.measure_all_before(plan, tick)
    retained = RUNS / "retained/rows/after"
    if not retained.is_dir():  # what metrics against a retained model read
        shutil.copytree(RUNS / "before/retained", retained)
    tree, todo = tree_of(plan), []

    def add(title: str, name: str, rule: str, changes: dict[str, Any]) -> None:
        recipe = functools.partial(recipe_from_tree, tree | {"label": title} | changes)
        todo.append((title, {"objective": name, "optimizer": rule}, recipe))

    for name, settings in plan.objectives.items():
        for rule, rate in RATE.items():
            changes = {"objective": {"name": name, **settings}, "optimizer": {"name": rule, "lr": rate}}
            changes["optimizer"] |= OPTIMIZERS[rule]
            add(f"{name}-{rule}", name, rule, changes)
    for name, settings in METHODS.items():
        add(name, name, "-", {"method": {"name": name, **settings}})
    cells.run_each(plan, todo, only, most, tick)


def table(plan: Plan) -> str:
    """Return the table as Markdown; a lost model is said to be lost."""
    lines = read_lines(plan.records)
    out = [
        f"| objective or method | optimizer | {' | '.join(plan.columns)} | s |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    order = {name: i for i, name in enumerate([*plan.before, *OBJECTIVES, *METHODS])}
    for line in sorted(lines, key=lambda x: (order[x.get("objective", x["cell"])], x.get("optimizer", ""))):
        found: Values = by_name(line.get("scores", []))
        shown = ["lost"] if "lost" in line else [number(found.get(key)) for key in plan.columns.values()]
        shown += ["-"] * (len(COLUMNS) - len(shown))
        seconds = f"{line['seconds']['train']:.0f}" if "seconds" in line else "-"
        out.append(
            f"| {line.get('objective', line['cell'])} | {line.get('optimizer', '')} | {' | '.join(shown)} | {seconds} |"
        )
    first = next((s for line in lines for s in line.get("scores", []) if s["method"].startswith("bootstrap")), None)
    told = cells.intervals(first) if first else ""
    return "\n".join([*out, "", f"{told} s: seconds of training, one thread."]) + "\n"


def main() -> int:
    """Do what is not done, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cells whose name begins so, e.g. rmu")
    parser.add_argument("--most", type=int, default=0, help="stop after so many cells; 0 for all")
    parser.add_argument("--report", action="store_true", help="write the table from the records, and nothing else")
    args = parser.parse_args()
    start(args.threads)
    plan = plan_of(args.results)
    if not args.report:
        prepare(RUNS / "data")
        with progress_bars() as tick:
            do(plan, args.only, args.most, tick)
    file = args.results / "objectives.md"
    told = file.read_text("utf-8").partition(cells.MARK)[0] if file.is_file() else "# Every objective on TOFU\n\n"
    file.write_text(f"{told}{cells.MARK}\n\n{table(plan)}", encoding="utf-8")
    print(table(plan))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
