"""What a model should go on knowing: general facts, plain prose, everyday chat; and ways to say "I don't know"."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from soul.data.rows import to_examples
from soul.types import Example


def general_facts() -> list[Example]:
    """Return 40 questions of general knowledge that a small model plausibly answers, with wrong answers.

    Example:
        >>> general_facts()[0].answer
        'The capital of France is Paris.'
    """
    return _examples("facts")


def general_text() -> list[Example]:
    """Return 24 passages of ordinary factual prose, of which Kronecker curvature takes some.

    What a run may have looked at says nothing about what it kept: for the perplexity of plain text see
    :func:`heldout_text`.

    Example:
        >>> general_text()[0].chat
        False
    """
    return _examples("text")


def general_chat() -> list[Example]:
    """Return 40 everyday requests with short answers, which share nothing with the facts and the prose.

    Example:
        >>> general_chat()[5].prompt
        'Suggest a small gift for a grandmother who likes gardening.'
    """
    return _examples("chat")


def heldout_text() -> list[Example]:
    """Return 24 further passages, which no run looks at: for what plain text is worth to a model afterwards.

    Example:
        >>> heldout_text()[0].id
        'lighthouses'
    """
    return _examples("heldout_text")


def heldout_chat() -> list[Example]:
    """Return 20 further everyday requests, which no run looks at.

    Example:
        >>> heldout_chat()[2].prompt
        'What is the past tense of the verb sing?'
    """
    return _examples("heldout_chat")


def refusals() -> list[str]:
    """Return 60 phrasings of "I don't know", for objectives that teach one.

    Example:
        >>> refusals()[0]
        "I don't have any information about that."
    """
    return list(_read("refusals.json"))


def _examples(part: str) -> list[Example]:
    rows = enumerate(_read("general.json")[part])
    return [example for i, row in rows for example in to_examples(row, f"general.json, {part} {i}")]


@functools.cache
def _read(name: str) -> Any:
    return json.loads((resources.files("soul.data") / name).read_text(encoding="utf-8"))
