"""Ten deletion requests served by ``soul unlearn`` as it comes: nothing is set, and the rule says when to stop.

    python experiments/ten_requests.py --tofu ../shared/data/tofu
    python experiments/ten_requests.py --table
    python experiments/ten_requests.py --calibrate

SmolLM2-135M that knows twenty of TOFU's authors (``experiments/first_run.py`` teaches it; it is made here where it is
missing) gets ten requests, each on its own: forget one author or two, keep all others. The command of each is the one a
person would type, ``soul unlearn --model M --forget F --retain R``. Then the probability of the answer is measured,
before and after, on all forgotten questions and on four of each kept author, and on the forgotten ones the ROUGE-L
recall of greedy answers.

Runs are under ``runs/ten-requests``; a line of record each goes to ``docs/results/ten-requests.jsonl`` as it is done,
and the table of ``docs/results/ten-requests.md`` is written anew. An interrupted experiment goes on where it stopped.

``--calibrate`` asks what the rule would say of models that need not forget: the one that was taught all but the last
two authors, and the one that was taught none. Both should read as forgotten, and the taught one should not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import first_run
from soul.cli import main as soul
from soul.cli import progress_bars
from soul.console import quiet
from soul.data.sources import load_examples
from soul.evaluate import EvaluationSpec, evaluate
from soul.gauge import Gauge
from soul.machine import environment
from soul.metrics.stats import bootstrap_mean
from soul.models import ModelSpec, load_model
from soul.objectives.npo import NPO
from soul.recipe import read_recipe
from soul.run import execute
from soul.trainer import make_dataset
from soul.training import TrainingSpec
from soul.types import Ask, Row

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/ten-requests")
TAUGHT = first_run.RUNS / "taught/model"
QUESTIONS = 20
REQUESTS = ((0,), (2,), (5,), (8,), (11,), (14,), (17,), (3, 7), (9, 16), (18, 19))
"""Authors of each request, by their place among the twenty."""
ASKED = 4
"""Questions of each kept author that are measured."""
MARK = "<!-- the table below is written by experiments/ten_requests.py -->\n"


def name_of(authors: Sequence[int]) -> str:
    """Return the name of a request."""
    return "authors-" + "-".join(map(str, authors))


def cut(authors: Sequence[int], folder: Path) -> None:
    """Write what is to be forgotten, what is to be kept, and which of the kept questions are measured."""
    rows = (first_run.RUNS / "data/taught.jsonl").read_text(encoding="utf-8").splitlines()
    by_author = [rows[i : i + QUESTIONS] for i in range(0, len(rows), QUESTIONS)]
    others = [i for i in range(len(by_author)) if i not in authors]
    rng = np.random.default_rng(list(authors))
    picked = {i: sorted(rng.permutation(QUESTIONS)[:ASKED].tolist()) for i in others}
    parts = {
        "forget": [row for i in authors for row in by_author[i]],
        "retain": [row for i in others for row in by_author[i]],
        "kept": [by_author[i][q] for i in others for q in picked[i]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(f"{row}\n" for row in found), encoding="utf-8")


def measure(model: Path, data: Path, folder: Path, tick: Any) -> dict[str, list[Row]]:
    """Measure the forgotten questions and the picked ones of the kept authors."""
    splits = {part: load_examples(str(data / f"{part}.jsonl")) for part in ("forget", "kept")}
    files = [folder / f"{part}.jsonl" for part in splits]
    spec = EvaluationSpec(max_new_tokens=first_run.NEW_TOKENS)
    pair = (None, None) if all(file.is_file() for file in files) else load_model(ModelSpec(str(model)))
    if pair[0] is None:
        return {f.stem: [json.loads(line) for line in f.read_text(encoding="utf-8").split("\n") if line] for f in files}
    return evaluate(*pair, splits, spec=spec, folder=folder, progress=tick, asks={"kept": Ask(generate=False)})


def scores(rows: dict[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Return mean probability and ROUGE-L of each split, with 95 % intervals over questions."""
    found: dict[str, dict[str, float]] = {}
    for split, items in rows.items():
        values = {
            "probability": [float(np.exp(-row["nll"])) for row in items],
            "rougeL": [row["rougeL_recall"] for row in items if "rougeL_recall" in row],
        }
        found[split] = {"n": len(items)}
        for metric, of in ((metric, of) for metric, of in values.items() if of):
            score = bootstrap_mean(of, metric=metric, split=split)
            found[split] |= {metric: score.value, f"{metric}_low": score.low, f"{metric}_high": score.high}
    return found


def serve(authors: Sequence[int]) -> dict[str, Any]:
    """Serve one request and return its line of record."""
    name = name_of(authors)
    data, out = RUNS / "data" / name, RUNS / name
    cut(authors, data)
    asked = ["--model", str(TAUGHT), "--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    command = ["unlearn", *asked, "--out", str(out), "--no-evaluate"]
    if soul(command):
        raise SystemExit(f"{name}: the command failed")
    with progress_bars() as bar:
        tick = first_run.titled(name, bar)
        before = measure(TAUGHT, data, RUNS / "rows" / name / "before", tick)
        after = measure(out / "model", data, RUNS / "rows" / name / "after", tick)
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(out / "model", ignore_errors=True)
    return {
        "request": name,
        "authors": list(authors),
        "command": f"soul {' '.join(command)}",
        "stopped": record["stopped"],
        "looks": [{k: v for k, v in line.items() if k in LOOKED} for line in log if "known" in line],
        "seconds": record["seconds"]["train"],
        "before": scores(before),
        "after": scores(after),
        "environment": {k: v for k, v in environment().items() if k != "command"},
    }


LOOKED = ("step", "known", "forget_probability", "false_probability", "kl_retained", "kl_general", "recited")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the record as Markdown."""

    def both(line: dict[str, Any], split: str, metric: str) -> str:
        return f"{line['before'][split][metric]:.3f} → {line['after'][split][metric]:.3f}"

    head = (
        "| request | stopped | steps | seconds | known | recited | KL retained | KL general | forget: probability "
        "| ROUGE-L | kept: probability |"
    )
    out = [head, "|---" * 11 + "|"]
    for line in lines:
        end = line["stopped"]
        said = "-" if end["recited"] is None else f"{end['recited']:.2f}"
        cells = [line["request"], end["why"], str(end["step"]), f"{line['seconds']:.0f}", f"{end['known']:.3f}", said]
        cells += [f"{end['moved'][name]:.4f}" for name in ("retained", "general")]
        cells += [both(line, *of) for of in (("forget", "probability"), ("forget", "rougeL"), ("kept", "probability"))]
        out.append(f"| {' | '.join(cells)} |")
    forgotten = sum(line["stopped"]["why"] == "forgotten" for line in lines)
    yet = "" if len(lines) == len(REQUESTS) else f" served so far ({len(REQUESTS)} in all)"
    out += ["", f"Forgotten within the budget: {forgotten} of {len(lines)}{yet}."]
    return "\n".join(out) + "\n"


def write_page(lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Write the table into the page, below its mark."""
    page = results / "ten-requests.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Ten requests\n\n{MARK}"
    page.write_text(text.partition(MARK)[0] + MARK + "\n" + table(lines), encoding="utf-8")


def calibrate() -> dict[str, dict[str, float]]:
    """Return what the gauge of the taught model reads on it and on models that never learned the last two authors."""
    data = first_run.RUNS / "data"
    model, tokenizer = load_model(ModelSpec(str(TAUGHT)))
    sets = load_examples(str(data / "forget01.jsonl")), load_examples(str(data / "retained.jsonl"))
    gauge = Gauge(model, make_dataset(tokenizer, *sets, NPO(), TrainingSpec()))
    found: dict[str, dict[str, float]] = {}
    for name in ("taught", "retained", "untaught"):
        path = "smollm2-135m" if name == "untaught" else str(first_run.RUNS / name / "model")
        model.load_state_dict(load_model(ModelSpec(path))[0].state_dict())
        now = gauge.known()
        found[name] = {"true": now.true, "false": now.false, "known": now.share(gauge.before)}
        found[name]["recited"] = gauge.recited()
        print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> int:
    """Serve the requests that are not served yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, default=Path("../shared/data/tofu"), help="folder with TOFU's files")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results", help="where record and page are kept")
    parser.add_argument("--table", action="store_true", help="only write the page's table anew")
    parser.add_argument("--calibrate", action="store_true", help="only read the gauge on models that need not forget")
    args = parser.parse_args()
    quiet()
    file = args.results / "ten-requests.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if args.table:
        write_page(lines, args.results)
        return 0
    if args.calibrate:
        calibrate()
        return 0
    if not TAUGHT.is_dir():
        first_run.prepare(args.tofu, first_run.RUNS / "data")
        with progress_bars() as bar:
            recipe = read_recipe(first_run.RECIPES / "taught.yaml")
            execute(recipe, first_run.RUNS / "taught", progress=bar, evaluate_it=False)
    for authors in REQUESTS:
        if name_of(authors) in {line["request"] for line in lines}:
            continue
        lines.append(serve(authors))
        with file.open("a", encoding="utf-8") as record:
            record.write(json.dumps(lines[-1]) + "\n")
        write_page(lines, args.results)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
