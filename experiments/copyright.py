"""Copyright: a public-domain book is taught until it is recited, then forgotten by three objectives and optimizers.

    python experiments/copyright.py            # everything that is not done; an interrupted run goes on
    python experiments/copyright.py --report   # only the tables again, from the records

SmolLM2-135M learns four passages of each of two books by heart (``recipes/copyright-teach.yaml``): whole, and also
in pieces, without which it recites after 300 tokens and little after 50, and not when asked in a chat. Then the
first four are forgotten and the others kept, by ``grad_diff``, ``npo`` and ``po`` with AdamW, sign-momentum and K-FAC,
each at three learning rates: 27 cells of 20 steps, a line of ``docs/results/copyright/cells.jsonl`` each.

What is forgotten is cut into pieces (40 tokens given, 80 to come), so that it is the whole passage and not one
continuation. Each piece is there as plain text, and every second one also in a chat that asks for it: a refusal needs
something that can be refused. All objectives see the same pieces; ``po`` learns "I don't know" in their place.

The rate of a pair: the largest harmonic mean of ``forgotten``, the part of the ROUGE-L recall that teaching brought
which is gone again (mean over prompts of 50, 100, 200 and 300 tokens), ``kept recital``, the kept book's ROUGE-L recall
divided by the taught model's, and ``kept text``, the taught model's perplexity of WikiText divided by this one's; each
at most 1. It is picked on the passages that are reported: what it says is what a rule can do, not what it will do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cells import RATES, Plan, Values, run_cells, start, write_tables
from soul.benchmarks.copyright import Copyright
from soul.cli import progress_bars
from soul.data.books import pieces
from soul.pretrained import load_tokenizer
from soul.recipe import read_recipe
from soul.run import execute
from soul.strict import read_number
from soul.types import Example

ROOT = Path(__file__).parents[1]
DATA = Path("../shared/data")
COLUMNS = {
    "forget: ROUGE-L": ("forget", "rougeL_recall"),
    "BLEU": ("forget", "bleu"),
    "50 tokens": ("forget_50", "rougeL_recall"),
    "300 tokens": ("forget_300", "rougeL_recall"),
    "asked in a chat": ("asked_100", "rougeL_recall"),
    "kept: ROUGE-L": ("kept_200", "rougeL_recall"),
    "perplexity": ("text", "perplexity"),
    "TruthfulQA MC1": ("truthfulqa", "truthfulqa_mc1"),
    "MC2": ("truthfulqa", "truthfulqa_mc2"),
}


def rows_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return examples as rows that :func:`soul.data.sources.load_examples` reads back."""
    columns = {True: ("prompt", "response"), False: ("prompt", "completion")}
    return [
        dict(zip(columns[e.chat], (e.prompt, e.answer), strict=True))
        | {"id": e.id, "subject": e.subject, "ends": e.ends}
        for e in examples
    ]


def prepare(benchmark: Copyright, folder: Path, prompt: int = 40, answer: int = 80) -> None:
    """Cut the books into what is taught, what is forgotten and what is kept."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(benchmark.tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]  # a list of ints

    book, kept = benchmark.passages(), benchmark.passages(kept=True)
    forget = [e for p in book for e in pieces(p, count, prompt=prompt, answer=answer)]
    asked = [e for p in book for e in pieces(p, count, prompt=prompt, answer=answer, asked=True)[::2]]
    rest = [e for p in kept for e in pieces(p, count, prompt=prompt, answer=answer)]
    folder.mkdir(parents=True, exist_ok=True)
    whole = [Example("", p.text, id=p.id, chat=False, subject=p.id) for p in [*book, *kept]]
    sets = {
        "taught": rows_of([*whole, *forget, *asked, *rest]),
        "forget": rows_of([*forget, *asked]),
        "kept": rows_of(rest),
    }
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def judge(after: Values, before: dict[str, Values]) -> dict[str, float]:
    """Return the parts of the criterion."""
    base, taught = before["base"], before["taught"]

    def of(values: Values, split: str, metric: str = "rougeL_recall") -> float:
        found = [s["value"] for (name, kind), s in values.items() if name.startswith(split) and kind == metric]
        last = read_number(found[-1])  # where there are several prompts, the mean over all of them comes last
        return last if math.isfinite(last) else math.inf

    learned, kept = of(taught, "forget") - of(base, "forget"), of(taught, "kept")
    recital = of(after, "kept")
    if learned <= 0 or kept <= 0:
        raise ValueError("teaching brought no recital, so there is nothing to forget or to keep: teach longer")
    return {
        "forgotten": min(1.0, max(0.0, (of(taught, "forget") - of(after, "forget")) / learned)),
        "kept recital": min(1.0, recital / kept) if math.isfinite(recital) else 0.0,
        "kept text": min(1.0, of(taught, "text", "perplexity") / of(after, "text", "perplexity")),
    }


def plan_of(
    benchmark: Copyright,
    runs: Path,
    results: Path,
    overrides: Sequence[str] = (),
    rates: Mapping[str, Sequence[float]] = RATES,
) -> Plan:
    """Return the plan of all cells."""
    data = runs / "data"
    sets = [f"data.forget={data / 'forget.jsonl'}", f'data.retain=[{data / "kept.jsonl"}, "general:chat"]']
    return Plan(
        name="copyright",
        recipe=ROOT / "recipes/copyright-forget.yaml",
        overrides=[*sets, *overrides],
        benchmark={"name": "copyright", **dataclasses.asdict(benchmark)},
        before={"base": benchmark.tokenizer, "taught": str(runs / "taught/model")},
        judge=judge,
        columns=COLUMNS,
        runs=runs,
        results=results,
        rates=rates,
    )


def teach(plan: Plan, tick: Callable[[str, int, int], None], overrides: Sequence[str] = ()) -> None:
    """Teach the passages, if that is not done."""
    sets = [f"model={plan.before['base']}", f"data.retain={plan.runs / 'data/taught.jsonl'}"]
    recipe = read_recipe(ROOT / "recipes/copyright-teach.yaml", [*sets, *overrides])
    execute(recipe, plan.runs / "taught", progress=tick, evaluate_it=False)


def main() -> int:
    """Do what is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    books = DATA / "gutenberg_pd"
    parser.add_argument("--book", type=Path, default=books / "Alice-s-Adventures-in-Wonderland_11.txt")
    parser.add_argument("--kept", type=Path, default=books / "The-Wonderful-Wizard-of-Oz_55.txt")
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext2/wiki.test.tokens")
    parser.add_argument("--truthfulqa", type=Path, default=DATA / "truthfulqa/TruthfulQA.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/copyright"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cells whose name begins so, e.g. npo-kfac")
    parser.add_argument("--most", type=int, default=0, help="stop after so many cells; 0 for all")
    parser.add_argument("--report", action="store_true", help="write the tables from the records, and nothing else")
    args = parser.parse_args()
    start(args.threads)
    benchmark = Copyright(
        book=str(args.book),
        kept=str(args.kept),
        text=str(args.wikitext),
        truthfulqa=str(args.truthfulqa),
        continuation=60,
        first=1,  # the title page, and the most quoted lines of the book, which the model knows anyway
        kept_first=1,
        limit=4,
        text_limit=16,
        truthfulqa_limit=20,
    )
    plan = plan_of(benchmark, args.runs, args.results)
    if not args.report:
        prepare(benchmark, args.runs / "data")
        with progress_bars() as tick:
            teach(plan, tick)
        run_cells(plan, args.only, args.most)
        shutil.rmtree(args.runs / "taught/checkpoints", ignore_errors=True)
    print(write_tables(plan, "A book taught, then forgotten").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
