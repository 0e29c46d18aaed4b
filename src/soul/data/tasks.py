"""Local copies of what lm-eval's tasks ask, in the columns that its task definitions read.

The definitions (prompts, choices, metrics, versions) stay lm-eval's own; only where the rows come from changes. A
folder may hold, for any task of lm-eval, ``<task>/<split>.jsonl`` with the columns of the hub's copy, and, for MMLU and
the tasks of :data:`COPIES`, the files in which their data is also published: LAMBADA as JSON Lines of ``text``,
WikiText-2 as tokens, MMLU as CSV by subject, TruthfulQA as CSV, and PIQA, ARC, OpenBookQA and WinoGrande as the
instructions of LLM-Adapters (arXiv 2304.01933), from which question and options are read back.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Splits = dict[str, list[dict[str, Any]]]
"""Rows by split, e.g. ``{"test": [...]}``."""

SPLITS = ("train", "validation", "test", "dev")
_PAGE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")
_OPTION = re.compile(r"\s*(?:Answer|Solution|Option)(\d):")
_ASKED = re.compile(r"^Please choose [^:]+: ")


def local_splits(folder: Path, task: str) -> Splits:
    """Return the rows of one of lm-eval's tasks that ``folder`` holds; an empty mapping where it holds none.

    Args:
        folder: Folder of data.
        task: lm-eval's name of the task, e.g. ``"piqa"`` or ``"mmlu_anatomy"``.

    Raises:
        ValueError: A file is there, and is not what it should be.

    Example:
        >>> local_splits(Path("nowhere"), "piqa")
        {}
    """
    own = {split: folder / task / f"{split}.jsonl" for split in SPLITS}
    found = {split: _lines(file) for split, file in own.items() if file.is_file()}
    if found:
        return found
    if task.startswith("mmlu_"):
        return _mmlu(folder, task.removeprefix("mmlu_"))
    if task not in COPIES:
        return {}
    name, split, read = COPIES[task]
    file = folder / name
    if not file.is_file():
        return {}
    try:
        rows = read(file)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{file} is not the copy of {task} that it should be: {error!s:.200}") from error
    if not rows:
        raise ValueError(f"{file} holds no rows of {task}")
    return {split: rows}


def _lines(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: invalid JSON ({error.msg})") from error
    if not rows:
        raise ValueError(f"{file} holds no rows")
    return rows


def _mmlu(folder: Path, subject: str) -> Splits:
    """Read ``mmlu/test/<subject>_test.csv`` and ``mmlu/dev/<subject>_dev.csv``."""
    splits: Splits = {}
    for split in ("dev", "test"):
        file = folder / f"mmlu/{split}/{subject}_{split}.csv"
        if not file.is_file():
            return {}  # lm-eval's definition wants both
        try:
            splits[split] = [_mmlu_row(row) for row in _csv(file)]
        except (KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} must have the columns question, choice0 to choice3 and answer (0 to 3): {error!s:.200}"
            ) from error
    return splits


def _mmlu_row(row: dict[str, str]) -> dict[str, Any]:
    answer = int(row["answer"])
    if answer not in range(4):
        raise ValueError(f"answer is {answer}")
    return {"question": row["question"], "choices": [row[f"choice{i}"] for i in range(4)], "answer": answer}


def _csv(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        yield from csv.DictReader(text, strict=True)


def _wikitext(file: Path) -> list[dict[str, Any]]:
    """Cut the tokens into articles, which is what the hub's document-level copy holds."""
    return [{"page": page} for page in _PAGE.split(file.read_text(encoding="utf-8")) if page.strip()]


def _truthfulqa(file: Path) -> list[dict[str, Any]]:
    """Offer, as TruthfulQA's code does, the best with all false answers (MC1) and all true with all false (MC2)."""
    rows: list[dict[str, Any]] = []
    for row in _csv(file):
        true, false = (listed(row[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
        offers = {"mc1_targets": [stopped(row["Best Answer"])], "mc2_targets": true}
        targets = {
            name: {"choices": first + false, "labels": [1] * len(first) + [0] * len(false)}
            for name, first in offers.items()
        }
        rows.append({"question": row["Question"].strip(), **targets})
    return rows


def listed(cell: Any) -> list[str]:
    """Return the answers in a cell of TruthfulQA's CSV, each with its full stop."""
    return [stopped(part) for part in str(cell).split(";") if part.strip()]


def stopped(answer: str) -> str:
    """Return an answer with a full stop, as TruthfulQA's code and its copy on the hub have it; the CSV leaves most out.

    Example:
        >>> stopped(" Australia"), stopped("Yes.")
        ('Australia.', 'Yes.')
    """
    answer = answer.strip()
    return answer if not answer or answer.endswith(".") else f"{answer}."


def _asked(file: Path) -> Iterator[tuple[str, list[str], int]]:
    """Yield question, options and the true option's place from instructions of LLM-Adapters."""
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
        text = _ASKED.sub("", row["instruction"].partition("Answer format:")[0])
        question, *rest = _OPTION.split(text)
        options = [option.strip() for option in rest[1::2]]
        gold = int(row["answer"][-1]) - 1
        if rest[::2] != [str(i + 1) for i in range(len(options))] or not 0 <= gold < len(options):
            raise ValueError(f"row {number} does not offer options in order with the answer among them")
        yield question.strip(), options, gold


def _piqa(file: Path) -> list[dict[str, Any]]:
    return [{"goal": q, "sol1": first, "sol2": second, "label": gold} for q, (first, second), gold in _asked(file)]


def _arc(file: Path) -> list[dict[str, Any]]:
    return [{"question": q, **_lettered(options, gold)} for q, options, gold in _asked(file)]


def _openbookqa(file: Path) -> list[dict[str, Any]]:
    return [{"question_stem": q, **_lettered(options, gold)} for q, options, gold in _asked(file)]


def _lettered(options: list[str], gold: int) -> dict[str, Any]:
    labels = list("ABCDE"[: len(options)])
    return {"choices": {"text": options, "label": labels}, "answerKey": labels[gold]}


def _winogrande(file: Path) -> list[dict[str, Any]]:
    return [
        {"sentence": q, "option1": first, "option2": second, "answer": str(gold + 1)}
        for q, (first, second), gold in _asked(file)
    ]


COPIES: dict[str, tuple[str, str, Callable[[Path], list[dict[str, Any]]]]] = {
    "lambada_openai": ("lambada/lambada_test.jsonl", "test", _lines),
    "wikitext": ("wikitext2/wiki.test.tokens", "test", _wikitext),
    "truthfulqa_mc1": ("truthfulqa/TruthfulQA.csv", "validation", _truthfulqa),
    "truthfulqa_mc2": ("truthfulqa/TruthfulQA.csv", "validation", _truthfulqa),
    "piqa": ("commonsense/piqa/test.json", "validation", _piqa),
    "arc_easy": ("commonsense/ARC-Easy/test.json", "test", _arc),
    "arc_challenge": ("commonsense/ARC-Challenge/test.json", "test", _arc),
    "openbookqa": ("commonsense/openbookqa/test.json", "test", _openbookqa),
    "winogrande": ("commonsense/winogrande/test.json", "validation", _winogrande),
}
"""Task -> file below the folder, the split of lm-eval's definition that it stands for, and what reads it.

The LLM-Adapters copies name the labelled validation rows of PIQA and WinoGrande ``test``. WikiText's tokens have rare
words replaced by ``<unk>``, which the hub's raw copy has not: perplexities of the two differ.
"""
