"""Data on toxic language: prompts with scores, questions that invite harm, and answers that people rejected."""

from __future__ import annotations

import re
from typing import Any

from soul.data.raw import read_rows
from soul.data.sources import load_examples
from soul.types import Example

Scored = tuple[str, float]
"""A text and its toxicity in [0, 1]."""

_TURN = re.compile(r"\n\n(Human|Assistant):")


def scored_prompts(source: str) -> list[tuple[Scored, Scored]]:
    """Return prompts and continuations of RealToxicityPrompts with their toxicity (arXiv 2009.11462).

    Args:
        source: A hub id such as ``"allenai/real-toxicity-prompts"``, or a file with the columns ``prompt`` and
            ``continuation``, each ``{"text": ..., "toxicity": ...}``. Rows in which a score is missing are left out.

    Raises:
        ValueError: The source cannot be read, or no row has both scores.
    """
    found: list[tuple[Scored, Scored]] = []
    for where, row in read_rows(source):
        parts = row.get("prompt"), row.get("continuation")
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise ValueError(
                f"{where}: RealToxicityPrompts has columns prompt and continuation, each with text and toxicity"
            )
        pair = [(part["text"], part.get("toxicity")) for part in parts if part]
        if all(isinstance(score, int | float) and text.strip() for text, score in pair):
            found.append(((pair[0][0], float(pair[0][1])), (pair[1][0], float(pair[1][1]))))
    if not found:
        raise ValueError(f"{source}: no row has toxicity scores of both prompt and continuation")
    return found


def harmful_questions(source: str) -> list[Example]:
    """Return what a harmful answer is asked for with, each question once.

    Args:
        source: PKU-SafeRLHF (arXiv 2310.12773, columns ``prompt``, ``response_0`` ...), hh-rlhf (``chosen`` and
            ``rejected`` transcripts), or any source of examples; of these the prompts are taken.

    Raises:
        ValueError: The source cannot be read, or has no questions.
    """
    rows = _preference_rows(source)
    if rows is None:
        examples = load_examples(source)
    elif "response_0" in rows[0][1]:
        examples = [Example(str(row["prompt"]), str(row["response_0"])) for _, row in rows]
    else:
        examples = [parsed for where, row in rows if (parsed := transcript(row["rejected"], where))]
    seen = {(e.history, e.prompt): e for e in reversed(examples) if e.prompt.strip() and e.answer.strip()}
    if not seen:
        raise ValueError(f"{source}: holds no questions")
    return list(reversed(seen.values()))


def rejected_answers(source: str) -> list[Example]:
    """Return answers that people judged unsafe or worse, with what came before: a set to forget.

    Of hh-rlhf (arXiv 2204.05862) the ``rejected`` transcripts; of PKU-SafeRLHF every response marked as not safe.

    Args:
        source: A file or a hub id of either data set.

    Raises:
        ValueError: The source cannot be read, is of another form, or holds no such answer.
    """
    rows = _preference_rows(source)
    if rows is None:
        raise ValueError(f"{source}: no columns chosen and rejected (hh-rlhf), or response_0 and response_1 (PKU)")
    found: list[Example] = []
    for where, row in rows:
        if "response_0" in row:
            found += [
                Example(row["prompt"], row[f"response_{i}"])
                for i in (0, 1)
                if row.get(f"is_response_{i}_safe") is False and row[f"response_{i}"].strip()
            ]
        elif parsed := transcript(row["rejected"], where):
            found.append(parsed)
    if not found:
        raise ValueError(f"{source}: holds no rejected answers")
    return found


def transcript(text: Any, where: str) -> Example | None:
    r"""Return the last answer of an hh-rlhf transcript, or None where it is empty or the last turn is not answered.

    Args:
        text: Turns that begin with ``"\n\nHuman:"`` and ``"\n\nAssistant:"``; turns of one side in a row are joined.
        where: File and line, for messages.

    Raises:
        ValueError: ``text`` is no transcript.

    Example:
        >>> transcript("\n\nHuman: Who is Ada?\n\nAssistant: A poet.", "line 1").answer
        'A poet.'
    """
    parts = _TURN.split(text) if isinstance(text, str) else []
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"{where}: not a transcript of 'Human:' and 'Assistant:' turns ({text!r:.60})")
    turns: list[tuple[str, str]] = []
    for who, said in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if turns and turns[-1][0] == role:
            turns[-1] = role, f"{turns[-1][1]}\n\n{said.strip()}".strip()
        else:
            turns.append((role, said.strip()))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"] or not all(said for _, said in turns):
        return None
    return Example(turns[-2][1], turns[-1][1], history=tuple(turns[:-2]))


def _preference_rows(source: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the rows of a set of preferences; None where the columns are of another kind."""
    if source.startswith(("people:", "general:")):
        return None
    rows = list(read_rows(source))
    columns = set(rows[0][1]) if rows else set()
    return rows if {"chosen", "rejected"} <= columns or {"prompt", "response_0", "response_1"} <= columns else None
