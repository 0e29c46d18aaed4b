"""A subset of MUSE-News that two cores can bear: taught, then forgotten in four requests, one after another.

    python experiments/muse_news.py --muse ../shared/data/muse_news

SmolLM2-135M learns eight passages of each of MUSE-News' four requests (``sust_1`` to ``sust_4``) and sixteen to keep,
352 tokens each (``recipes/muse-news-teach.yaml``). The first request's are cut from the end of MUSE's verbatim prompts
(240 tokens to go on from, and the true continuation), so that what is measured is what was taught; the same passages,
and as many of the holdout set at the same length, are what membership inference tells apart. Questions are MUSE's, on
articles that were mostly not taught. ``experiments/muse.py`` then forgets request after request from the model that the
one before left, against a model that was retrained without the first.

The numbers do not compare with MUSE's tables: passages are shorter and few, and the model is small. They show the whole
way on real articles. These are under copyright and stay under ``runs/``; ``docs/results/muse-news`` gets scores and
digests only. An interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import muse
from soul.benchmarks.muse import muse_train
from soul.cli import progress_bars
from soul.console import quiet
from soul.data.sources import file_rows
from soul.pretrained import load_tokenizer
from soul.recipe import read_recipe
from soul.run import execute
from soul.stored import write_json

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/muse-news")
BASE = "smollm2-135m"
PROMPT, TOKENS = 240, 352
PASSAGES, KEPT, QUESTIONS = 8, 16, 20
Count = Callable[[str], list[int]]


def cut(source: Path, folder: Path) -> None:
    """Write the subset as a folder in MUSE's own layout, once.

    Raises:
        ValueError: The source lacks a set, or its passages are too short.
    """
    if (folder / "done").is_file():
        return
    tokenizer = load_tokenizer(BASE)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]  # one text: a list

    def head(name: str, many: int) -> list[str]:
        """Return the beginnings of the first articles that are long enough."""
        found = [ids(e.answer)[:TOKENS] for e in muse_train(str(source), name)]
        long = [str(tokenizer.decode(tokens)).strip() for tokens in found if len(tokens) == TOKENS][:many]
        if len(long) < many:
            raise ValueError(f"{source}: {name} has {len(long)} articles of {TOKENS} tokens, and {many} are needed")
        return long

    verbatim = []
    for _, row in file_rows(source / "verbmem_forget.json"):
        prompt, answer = ids(row["prompt"])[-PROMPT:], ids(row["gt"])[: TOKENS - PROMPT]
        if len(prompt) + len(answer) >= 0.9 * TOKENS:
            verbatim.append({"prompt": tokenizer.decode(prompt), "gt": tokenizer.decode(answer)})
    verbatim = verbatim[:PASSAGES]
    first = [row["prompt"] + row["gt"] for row in verbatim]
    sets: dict[str, list[object]] = {
        "verbmem_forget": list(verbatim),
        "raw_forget": list(first),
        "privleak_forget": list(first),
        "privleak_holdout": list(head("privleak_holdout", PASSAGES)),
        "privleak_retain": list(head("privleak_retain", KEPT)),
        **{f"sust_forget_{k}": list(head(f"sust_{k}", PASSAGES)) for k in (2, 3, 4)},
    }
    for side in ("forget", "retain2"):
        rows = [row for _, row in file_rows(source / f"knowmem_{side}_qa.json")]
        sets[f"knowmem_{side}_qa"] = rows[:QUESTIONS]
        sets[f"knowmem_{side}_qa_icl"] = [row for _, row in file_rows(source / f"knowmem_{side}_qa_icl.json")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        write_json(folder / f"{name}.json", rows)
    for name in ("raw_forget", "privleak_retain", "sust_forget_2", "sust_forget_3", "sust_forget_4"):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sets[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "done").touch()


def teach(data: Path, tick: Callable[[str, int, int], None]) -> None:
    """Teach all passages, and all but the first request's: what is forgotten from, and what it is compared with."""
    kept = ["sust_forget_2", "sust_forget_3", "sust_forget_4", "privleak_retain"]
    for name, sets in (("taught", ["raw_forget", *kept]), ("retrained", kept)):
        files = [str(data / f"{part}.jsonl") for part in sets]
        told = [f"data.retain={json.dumps(files)}", f"evaluation.max_length={muse.LONGEST}"]
        told.append(f"benchmark={json.dumps({'name': 'muse', 'source': str(data)})}")
        recipe = read_recipe(ROOT / "recipes/muse-news-teach.yaml", told)
        measured = name == "retrained"  # before: the model as it came; the taught one is measured before it forgets
        execute(recipe, RUNS / name, progress=lambda w, d, n, m=name: tick(f"{m}: {w}", d, n), evaluate_it=measured)
        shutil.rmtree(RUNS / name / "checkpoints", ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Cut, teach, forget, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--muse", type=Path, default=Path("../shared/data/muse_news"), help="folder with MUSE-News")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results", help="where the record is kept")
    args = parser.parse_args(argv)
    quiet()
    data = RUNS / "data"
    try:
        cut(args.muse, data)
        with progress_bars() as tick:
            teach(data, tick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # room for the blank lines between passages, or each corpus would end in a piece of a few tokens
    told = ["--recipe", str(ROOT / "recipes/muse-news-forget.yaml"), "--muse", str(data), "--retain", "privleak_retain"]
    told += ["--reference", str(RUNS / "retrained"), "--tokens", str(TOKENS + 8), "--what", "sustainability"]
    muse.main([*told, "--out", str(RUNS / "requests"), "--results", str(args.results / "muse-news")])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
