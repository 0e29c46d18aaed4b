"""MUSE's scaling and sustainability: forget more and more at once, and one request after another.

    python experiments/muse.py --recipe recipe.yaml --muse ../shared/data/muse_news --retain privleak_retain
    python experiments/muse.py --recipe recipe.yaml --corpus books --what scaling

The recipe says how to forget: model (one that was taught the corpus), objective, optimizer, training. Its forget and
retain sources, and its benchmark, are MUSE's. Every step is a run directory under ``--out``, so that an interrupted
experiment goes on where it stopped:

* scaling: ``scal_1`` to ``scal_4``, each forgotten from the recipe's model;
* sustainability: ``sust_1`` to ``sust_4``, each forgotten from the model that the one before left.

Sets that the data lacks are named and left out, except that a sequence ends before the first one it lacks. The runs
hold articles and stay where they are (``runs/`` is not committed). What is written to ``--results`` holds none: scores,
and the SHA-256 of each corpus as it was cut.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from soul.benchmarks.muse import Muse, muse_train
from soul.cli import progress_bars
from soul.console import quiet
from soul.pretrained import load_tokenizer
from soul.recipe import Recipe, read_recipe
from soul.run import execute
from soul.sequence import run_sequence, sequence_scores
from soul.stored import write_json
from soul.strict import read_number

LONGEST = 2304  # a passage of 2,048 of Llama's tokens in those of another tokenizer
COLUMNS = (("verbmem", "forget"), ("knowmem", "forget"), ("privleak", "forget"), ("knowmem", "retain"))
SETS = {"scaling": "scal", "sustainability": "sust"}
Tick = Callable[[str, int, int], None]


def cut(args: argparse.Namespace, muse: Muse, recipe: Recipe, name: str, times: int = 1) -> Path:
    """Write a corpus in pieces (``times`` as many as asked for), once, and return the file.

    Raises:
        ValueError: The data does not hold the corpus.
    """
    file = args.out / "data" / f"{name}.jsonl"
    if not file.is_file():
        tokenizer = load_tokenizer(recipe.model.path)
        pieces = muse_train(muse.origin, name, tokenizer, tokens=args.tokens)[: args.pieces * times or None]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        lines = [json.dumps({"id": e.id, "text": e.answer}, ensure_ascii=False) for e in pieces]
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(file)
    return file


def corpora(args: argparse.Namespace, muse: Muse, recipe: Recipe, kind: str) -> dict[str, Path]:
    """Return the files of a kind's four sets, by name; what is not to be had is said on stderr."""
    found: dict[str, Path] = {}
    for k in (1, 2, 3, 4):
        name = f"{kind}_{k}"
        try:
            found[name] = cut(args, muse, recipe, name, times=k if kind == "scal" else 1)
        except ValueError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
            if kind == "sust":
                break
    return found


def run(args: argparse.Namespace, tick: Tick) -> dict[str, Path]:
    """Do what is asked for and return the written records."""
    muse = Muse(corpus=args.corpus, source=args.muse, limit=args.limit)
    recipe = read_recipe(args.recipe)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, retain=str(cut(args, muse, recipe, args.retain))),
        benchmark=muse,
        reference_run=args.reference or recipe.reference_run,
        evaluation=dataclasses.replace(recipe.evaluation, max_length=max(LONGEST, recipe.evaluation.max_length)),
    )
    written = {}
    for what in SETS if args.what == "both" else (args.what,):
        files = corpora(args, muse, recipe, SETS[what])
        if what == "sustainability":
            folders = run_sequence(recipe, [str(file) for file in files.values()], args.out / what, progress=tick)
        else:
            folders = [scale(recipe, name, file, args.out / what, tick) for name, file in files.items()]
        scores = sequence_scores(folders)
        steps = [{"step": "before", "scores": scores[0]}] + [
            {"step": name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "scores": after}
            for (name, file), after in zip(files.items(), scores[1:], strict=True)
        ]
        written[what] = args.results / f"{args.corpus}-{what}.json"
        written[what].parent.mkdir(parents=True, exist_ok=True)
        write_json(written[what], {"pieces": args.pieces, "tokens": args.tokens, "limit": args.limit, "steps": steps})
        print(table(what, steps))
    return written


def scale(recipe: Recipe, name: str, file: Path, out: Path, tick: Tick) -> Path:
    """Forget one set from the recipe's model."""
    step = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, forget=str(file)))
    return execute(step, out / name, progress=lambda what, done, of: tick(f"{name}, {what}", done, of))


def table(what: str, steps: Sequence[dict[str, Any]]) -> str:
    """Return the steps' main scores as a table in Markdown."""
    titles = [f"{metric} ({split})" for metric, split in COLUMNS]
    lines = [f"| {what} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for step in steps:
        found = {(score["metric"], score["split"]): read_number(score["value"]) for score in step["scores"]}
        cells = [f"{found[column]:.3f}" if column in found else "" for column in COLUMNS]
        lines.append(f"| {step['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="MUSE's scaling and sustainability.")
    parser.add_argument("--recipe", type=Path, required=True, help="how to forget: model, objective, training")
    parser.add_argument("--corpus", default="news", choices=("news", "books"))
    parser.add_argument("--muse", default="", help="folder with MUSE's files (default: the corpus' hub id)")
    parser.add_argument("--what", default="both", choices=("both", *SETS))
    parser.add_argument("--retain", default="retain1", help="corpus to keep, e.g. privleak_retain in its place")
    parser.add_argument("--reference", default="", help="run directory of a retrained model, for privleak")
    parser.add_argument("--pieces", type=int, default=0, help="pieces of each corpus; scal_k has k times as many")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a piece")
    parser.add_argument("--limit", type=int, default=None, help="rows of each evaluation set")
    parser.add_argument("--out", type=Path, default=Path("runs/muse"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/muse"))
    args = parser.parse_args(argv)
    quiet()
    try:
        with progress_bars() as tick:
            run(args, tick)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
