"""Prepare the fair contest on real TOFU: cut the requests' data, teach the model and one retrained model a request.

    python experiments/contest.py --tofu ../shared/data/tofu --wikitext ../shared/data/wikitext2/wiki.test.tokens
    soul bench recipes/contests/tofu20.yaml --out docs/results/contest

SmolLM2-135M knows TOFU's first and last ten authors (``experiments/first_run.py`` teaches it). A request is to forget
two of them, or four, which its name says. The others are split by author, at random but the same for everybody: four
for the curvature, five that nobody sees and on whom utility is measured, the rest, nine or seven, for the loss. In the
harder worlds of ``recipes/contests/tofu20-scarce.yaml`` and ``tofu20-four.yaml`` the loss has only the first four of
these. Each request has a model taught the same way without its authors. Whatever is done is not done again; a retrained
model takes seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import first_run
from soul.cli import progress_bars
from soul.console import quiet
from soul.contest.matrix import read_matrix
from soul.recipe import read_recipe
from soul.run import execute

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/contest")
QUESTIONS = 20
CURVATURE, UNSEEN = 4, 5  # authors; the loss has the others
FORGOTTEN = 40  # questions measured of what is forgotten, as many of each author
SCARCE = 4  # authors for the loss in the harder world
ASKED = {"seen": 4, "unseen": 8, "scarce-seen": 5}  # questions measured of each author
FACTS, TEXTS, WORDS = 20, 8, (60, 90)
Rows = list[dict[str, Any]]


def read(file: Path) -> Rows:
    """Read JSON lines.

    Raises:
        ValueError: There is no such file.
    """
    if not file.is_file():
        raise ValueError(f"no {file}: --tofu takes a folder with TOFU's files, such as full.json")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(file: Path, rows: Rows) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def authors(tofu: Path) -> list[Rows]:
    """Return the questions of the twenty authors, with paraphrases and wrong answers, author by author."""
    full = read(tofu / "full.json")
    taught = full[:200] + full[-200:]
    known = {
        row["question"]: row for row in read(tofu / "retain_perturbed.json") + read(tofu / "forget10_perturbed.json")
    }
    rows = [known[row["question"]] for row in taught]
    assert all(a["answer"] == b["answer"] for a, b in zip(rows, taught, strict=True))
    return [rows[i : i + QUESTIONS] for i in range(0, len(rows), QUESTIONS)]


def cut(tofu: Path, wikitext: Path, requests: list[str]) -> None:
    """Write the data of all requests."""
    by_author = authors(tofu)
    for name in requests:
        lost = [int(number) for number in name.split("-")[1:]]
        others = [i for i in range(len(by_author)) if i not in lost]
        order = [others[i] for i in np.random.default_rng([0, *lost]).permutation(len(others))]
        loss = len(order) - CURVATURE - UNSEEN
        parts = {
            "loss": order[:loss],
            "curvature": order[loss : loss + CURVATURE],
            "seen": order[:UNSEEN],
            "unseen": order[loss + CURVATURE :],
            "scarce": order[:SCARCE],
            "scarce-seen": order[:SCARCE],
        }
        asked = ASKED | {"forgotten": FORGOTTEN // len(lost)}
        folder = RUNS / "data" / name
        for part, who in {**parts, "forget": lost, "forgotten": lost, "kept": others}.items():
            write(folder / f"{part}.jsonl", [row for i in who for row in by_author[i][: asked.get(part, QUESTIONS)]])
    for facts in ("real_authors", "world_facts"):
        rows = read(tofu / f"{facts}_perturbed.json")
        picked = sorted(np.random.default_rng(0).permutation(len(rows))[:FACTS].tolist())
        write(RUNS / f"data/{facts}.jsonl", [rows[i] for i in picked])
    write(RUNS / "data/text.jsonl", [{"text": text} for text in passages(wikitext)])


def passages(file: Path) -> list[str]:
    """Return paragraphs of plain text, evenly spaced through the file, with WikiText's spaced punctuation mended.

    Raises:
        ValueError: There is no such file, or it has too few long paragraphs.
    """
    if not file.is_file():
        raise ValueError(f"no {file}: --wikitext takes a file of WikiText, such as wiki.test.tokens")
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = re.sub(r" @(.)@ ", r"\1", line.strip())
        text = re.sub(r" ([.,;:!?)'])", r"\1", text).replace("( ", "(")
        words = text.split()
        if not text.startswith("=") and len(words) >= WORDS[0] and "<unk>" not in text:
            found.append(" ".join(words[: WORDS[1]]))
    if len(found) < TEXTS:
        raise ValueError(f"{file} has {len(found)} paragraphs of {WORDS[0]} words or more, and {TEXTS} are needed")
    return [found[i * len(found) // TEXTS] for i in range(TEXTS)]


def main() -> int:
    """Do what is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, default=Path("../shared/data/tofu"))
    parser.add_argument("--wikitext", type=Path, default=Path("../shared/data/wikitext2/wiki.test.tokens"))
    parser.add_argument("--matrix", type=Path, default=ROOT / "recipes/contests/tofu20.yaml")
    parser.add_argument(
        "--requests",
        nargs="*",
        metavar="NAME",
        help="retrain for these only, so that several can share the work (every request of the matrix, by default)",
    )
    args = parser.parse_args()
    quiet()
    task = read_matrix(args.matrix).tasks["tofu20"]
    requests = [*task.tune, *task.report]
    wanted = requests if args.requests is None else args.requests
    if unknown := set(wanted) - set(requests):
        parser.error(f"{args.matrix} has no request {', '.join(sorted(unknown))}; it has {', '.join(requests)}")
    cut(args.tofu, args.wikitext, requests)
    first_run.prepare(args.tofu, first_run.RUNS / "data")
    recipe = read_recipe(first_run.RECIPES / "retained.yaml")
    with progress_bars() as tick:
        if not (first_run.RUNS / "taught/model").is_dir():
            taught = read_recipe(first_run.RECIPES / "taught.yaml")
            execute(taught, first_run.RUNS / "taught", progress=tick, evaluate_it=False)
        for name in wanted:
            if (RUNS / f"gold/{name}/model").is_dir():
                continue
            data = dataclasses.replace(recipe.data, retain=str(RUNS / f"data/{name}/kept.jsonl"))
            mine = dataclasses.replace(recipe, label=f"retrained without {name}", data=data)
            titled = first_run.titled(name, tick)
            execute(mine, RUNS / "gold" / name, progress=titled, evaluate_it=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
