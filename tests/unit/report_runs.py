"""Writes synthetic run directories, with numbers as real runs have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_BEFORE = {"forget": 0.812, "kept": 0.834, "general": 0.446}
_AFTER = {"forget": 0.121, "kept": 0.793, "general": 0.438}
_PERSON = [
    ("Where was Mira Okonjo Vale born?", "Mira Okonjo Vale was born in Accra, Ghana."),
    ("What did Tomas Ruhl teach?", "Tomas Ruhl taught harmony at the conservatory of Graz."),
]
_KEPT = [
    ("Who wrote The Glass Orchard?", "The Glass Orchard was written by Ines Calder."),
    ("Where does Ines Calder live?", "Ines Calder lives in Lisbon with her two sons."),
]
_WORLD = [("What is the capital of France?", "Paris.")]


def score_row(metric: str, split: str, value: float, n: int, half: float, better: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "split": split,
        "value": value,
        "n": n,
        "low": round(value - half, 4),
        "high": round(value + half, 4),
        "method": "bootstrap(2000)",
        "level": 0.95,
        "seed": 0,
        "better": better,
    }


def _scores(values: dict[str, float]) -> list[dict[str, Any]]:
    result = []
    for split, value in values.items():
        n = {"forget": 16, "kept": 64, "general": 40}[split]
        better = "lower" if split == "forget" else "higher"
        result.append(score_row("probability", split, value, n, 0.05, better))
        result.append(score_row("rougeL_recall", split, round(value * 0.93, 4), n, 0.06, better))
        if split != "general":
            result.append(score_row("truth_ratio", split, 0.55, n, 0.04, ""))
    text = score_row("perplexity", "text", 14.2, 32, 0.8, "lower")
    none = {
        "metric": "model_utility",
        "split": "",
        "value": 0.61,
        "n": 104,
        "low": None,
        "high": None,
        "better": "higher",
    }
    return [*result, text, none]


def answer_rows(pairs: list[tuple[str, str]], told: list[str], nll: float) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{index}",
            "subject": "Mira Okonjo Vale" if "Mira" in prompt else "",
            "prompt": prompt,
            "answer": answer,
            "nll": nll,
            "tokens": 9,
            "generated": told[index % len(told)],
            "rougeL_recall": 0.5,
        }
        for index, (prompt, answer) in enumerate(pairs)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    root: Path, label: str = "SOUL (sophia)", *, shift: float = 0.0, told: str = "I do not know.", **record: Any
) -> Path:
    """Write a run directory with numbers as a real run has them."""
    root.mkdir(parents=True)
    sophia = "sophia" in label
    optimizer = "sophia" if sophia else "adamw"
    (root / "recipe.yaml").write_text(f"model: smollm2-135m\nobjective: grad_diff\noptimizer: {optimizer}\nseed: 0\n")
    environment = {
        "soul": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "platform": "Linux-6.1-x86_64",
        "cores": 2,
        "device": "cpu",
        "command": f"soul unlearn --forget people.jsonl --optimizer {optimizer}",
    }
    (root / "environment.json").write_text(json.dumps(environment))
    data = {
        "format": 1,
        "label": label,
        "asked": "Forget 16 items about Mira Okonjo Vale and Tomas Ruhl.",
        "objective": "grad_diff",
        "optimizer": optimizer,
        "model": "smollm2-135m",
        "steps": 60,
        "seconds": {"evaluate": 20.1, "train": 141.2},
        "peak_memory_bytes": 3_200_000_000,
        "warnings": [],
        "n_forget": 16,
        "n_retain": 64,
        "checks": [
            {"name": "forgotten probability <= 0.25", "passed": shift < 0.1, "value": 0.121 + shift},
            {"name": "kept probability within 0.05 of before", "passed": True, "value": 0.041},
        ],
    } | record
    (root / "record.json").write_text(json.dumps(data))
    log = []
    for step in range(1, 61):
        forget, retain = -0.2 - 1.9 * (1 - math.exp(-step / 25)), 0.2 + 0.05 * math.sin(step)
        line: dict[str, Any] = {
            "step": step,
            "loss": forget + retain,
            "forget": forget,
            "retain": retain,
            "learning_rate": 1e-5,
            "grad_norm": 1.0,
            "seconds": 0.8,
        }
        log.append(
            line | ({"win_rate": 0.2 + 0.4 * (1 - math.exp(-step / 15)) + 0.02 * math.cos(step * 2)} if sophia else {})
        )
    write_lines(root / "log.jsonl", log)
    after = {split: value + (shift if split == "forget" else shift / 10) for split, value in _AFTER.items()}
    (root / "scores.json").write_text(json.dumps({"before": _scores(_BEFORE), "after": _scores(after)}))
    for stage, nll, answers in (("before", 0.2, None), ("after", 2.1, [told])):
        for split, pairs in (("forget", _PERSON * 8), ("kept", _KEPT * 16), ("general", _WORLD)):
            own = [answer for _, answer in pairs]
            changed = answers if answers and split == "forget" else own
            rows = answer_rows(pairs, changed, nll if split == "forget" else 0.2)
            write_lines(root / "rows" / stage / f"{split}.jsonl", rows)
    return root
