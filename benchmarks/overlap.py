"""What is found of facts hidden in a retain set, and what is taken for one, on TOFU.

    python benchmarks/overlap.py --tofu ../shared/data/tofu

The questions and answers of ``forget01`` (40) are looked for in ``retain99`` (3,960), those of ``forget05`` (200) in
what is left of it without them (3,800): TOFU's authors are invented one by one, so that every pair is a false alarm.
Then TOFU's own paraphrases of each question and its answer are planted in the retain set, and counted where they are
found. Both by share of common shingles and by cosine of sentence embeddings, over a range of thresholds.

Prints the table and writes ``docs/results/overlap.json``; two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from _machine import cpu_name, table
from soul.data.overlap import SHINGLE, near_duplicates, text_of
from soul.data.sources import load_examples
from soul.embedding import load_encoder
from soul.recipe import DataSpec
from soul.types import Example

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/results/overlap.json"
COSINES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def paraphrased(example: Example) -> str:
    """Return the same question and answer in TOFU's other words."""
    return f"{example.paraphrased_prompt or example.prompt} {example.paraphrased_answer}"


def counted(threshold: float, similarity: np.ndarray, planted: np.ndarray) -> dict[str, Any]:
    """Count pairs and forget items above a threshold in [forget, retain], and planted ones among [forget]."""
    above = similarity >= threshold
    found = int((planted >= threshold).sum())
    return {
        "threshold": threshold,
        "pairs": int(above.sum()),
        "items": int(above.any(1).sum()),
        "found": found,
        "recall": round(found / len(planted), 4),
    }


def shares(forget: list[str], retain: list[str]) -> np.ndarray:
    """Return the share of common shingles of every pair, [forget, retain]; 0 below the least threshold."""
    result = np.zeros((len(forget), len(retain)))
    for pair in near_duplicates(forget, retain, min(SHARES)):
        result[pair.forget, pair.retain] = pair.similarity
    return result


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="the folder with TOFU's files")
    parser.add_argument("--encoder", default="", help="a sentence encoder; the default one")
    args = parser.parse_args()
    whole = load_examples(args.tofu / "retain99.json")
    encode = load_encoder(args.encoder)
    vectors = encode([text_of(e) for e in whole])
    sets: dict[str, Any] = {}
    for name in ("forget01", "forget05"):
        forget, other = (load_examples(args.tofu / f"{name}{end}.json") for end in ("", "_perturbed"))
        gone = {(e.prompt, e.answer) for e in forget}
        left = [i for i, e in enumerate(whole) if (e.prompt, e.answer) not in gone]
        ours, planted = [text_of(e) for e in forget], [paraphrased(e) for e in other]
        a, b = encode(ours), encode(planted)
        words = shares(ours, [text_of(whole[i]) for i in left]), shares(ours, planted).diagonal()
        cosines = a @ vectors[left].T, (a * b).sum(1)
        sets[name] = {
            "forget": len(forget),
            "retain": len(left),
            "cosine": [counted(t, *cosines) for t in COSINES],
            "largest": round(float(cosines[0].max()), 4),
            "planted_quantiles": {str(q): round(float(np.quantile(cosines[1], q)), 4) for q in (0, 0.05, 0.5)},
            "shingles": [counted(t, *words) for t in SHARES],
        }
    spec = DataSpec()
    record = {
        "encoder": encode.name,
        "words_in_a_shingle": SHINGLE,
        "defaults": {"copied": spec.copied, "alike": spec.alike},
        "machine": cpu_name(),
        **sets,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for kind in ("cosine", "shingles"):
        print(f"\n{kind}")
        head = ["threshold", *(f"{name}: {what}" for name in sets for what in ("pairs", "items", "recall"))]
        rows = [
            [str(lines[0]["threshold"]), *(str(line[what]) for line in lines for what in ("pairs", "items", "recall"))]
            for lines in zip(*(found[kind] for found in sets.values()), strict=True)
        ]
        print(table(head, rows))


if __name__ == "__main__":
    main()
