"""Long plain text in pieces, so that all of it is trained on and not its beginning alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from soul.data.templates import ChatTemplate
from soul.types import Example

_SLACK = 8
"""Tokens left free: a piece that begins within a text may take a token or two more than it had there."""


def pieces(examples: Iterable[Example], template: ChatTemplate) -> list[Example]:
    """Return the examples, plain text that is longer than a sequence as several of about the same length.

    Cuts are between words where there is white space, and nothing is left out. An example with a prompt stays whole:
    its answer belongs to it, and what of it is beyond the limit is told (:func:`soul.truncation.training_cuts`).

    Args:
        examples: What is to be forgotten or kept.
        template: How text becomes tokens, and how many are too many.

    Example:
        >>> [e.id for e in pieces([Example("", 3000 * "a ", id="letter", chat=False)], template)]  # doctest: +SKIP
        ['letter:0', 'letter:1', 'letter:2']
    """
    found: list[Example] = []
    for example in examples:
        parts = [example.answer] if example.chat or example.prompt else _parts(example, template)
        if len(parts) == 1:
            found.append(example)
        else:
            found += [dataclasses.replace(example, answer=p, id=f"{example.id}:{k}") for k, p in enumerate(parts)]
    return found


def _parts(example: Example, template: ChatTemplate) -> list[str]:
    room, text = template.limit - len(template.prompt_ids(example)) - _SLACK, example.answer
    if len(text) <= room or room < 2 * _SLACK or not template.tokenizer.is_fast:  # a token has a character or more
        return [text]
    encoded: Any = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    if len(starts) <= room + _SLACK:
        return [text]
    cuts = [0]
    while (rest := len(starts) - cuts[-1]) > room:
        size = math.ceil(rest / math.ceil(rest / room))
        wanted, most = cuts[-1] + size, min(room, size + size // 8)
        near = sorted(range(wanted - size // 8, cuts[-1] + most + 1), key=lambda i, to=wanted: abs(i - to))
        cuts.append(next((i for i in near if _begins(text, starts[i])), wanted))
    ends = [*(starts[i] for i in cuts[1:]), len(text)]
    return [text[starts[i] if i else 0 : end] for i, end in zip(cuts, ends, strict=True)]


def _begins(text: str, at: int) -> bool:
    """Say whether a word begins at a token: its own white space comes first in it, or just before it."""
    return text[at : at + 1].isspace() or text[at - 1 : at].isspace()
