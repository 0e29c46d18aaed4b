"""Facts to forget that are hidden in the retain set: near-duplicates by their words, paraphrases by their meaning."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from soul.types import Example
from soul.words import words

SHINGLE = 3
"""Words in a shingle."""
LEAST = 3
"""Shingles below which a text is only compared as a whole: "in the year" is in everything."""

Kind = Literal["near-duplicate", "paraphrase"]
Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to unit vectors, [texts, D]."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A retain item that says what a forget item says.

    Attributes:
        forget: Position in the forget set.
        retain: Position in the retain set.
        similarity: In [0, 1]; 1 for the same words.
        kind: How it was found.
    """

    forget: int
    retain: int
    similarity: float
    kind: Kind


def shingles(text: str, size: int = SHINGLE) -> frozenset[tuple[str, ...]]:
    """Return every run of ``size`` words of a text; of a shorter text, the whole of it.

    Example:
        >>> sorted(shingles("Ada is a poet"))
        [('ada', 'is', 'a'), ('is', 'a', 'poet')]
    """
    found = words(text)
    return frozenset(tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))) if found else frozenset()


def text_of(example: Example) -> str:
    """Return what an item says, question and answer."""
    return f"{example.prompt} {example.answer}".strip()


def near_duplicates(forget: Sequence[str], retain: Sequence[str], threshold: float = 0.7) -> list[Overlap]:
    """Return pairs that share words: ``|S_f & S_r| / min(|S_f|, |S_r|)`` of their shingles is at least ``threshold``.

    Containment in the smaller of the two (Broder 1997, "On the resemblance and containment of documents"), exact and
    not sketched, so that a fact copied into a long document is found. A text of fewer than :data:`LEAST` shingles only
    counts where its words are the other's, or a run of them.

    Raises:
        ValueError: ``threshold`` is not in (0, 1].

    Example:
        >>> near_duplicates(["Ada is a poet of Graz"], ["They say: Ada is a poet, of Graz!", "Bo is a cook of Graz"])
        [Overlap(forget=0, retain=0, similarity=1.0, kind='near-duplicate')]
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold of similarity must be above 0 and at most 1, not {threshold}")
    asked = [shingles(text) for text in forget]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, found in enumerate(asked):
        for shingle in found:
            holders[shingle].append(i)
    short = [i for i, found in enumerate(asked) if len(found) < LEAST]
    pairs: list[Overlap] = []
    for r, text in enumerate(retain):
        found = shingles(text)
        shared = Counter(i for shingle in found for i in holders.get(shingle, ()))
        for i, count in sorted(shared.items()):
            least = min(len(asked[i]), len(found))
            if least >= LEAST and count / least >= threshold:
                pairs.append(Overlap(i, r, count / least, "near-duplicate"))
        few = range(len(forget)) if len(found) < LEAST else short
        pairs += [Overlap(i, r, 1.0, "near-duplicate") for i in few if _runs_in(forget[i], text)]
    return sorted(set(pairs), key=lambda pair: (pair.forget, -pair.similarity, pair.retain))


def _runs_in(one: str, other: str) -> bool:
    """Say whether the words of the shorter text are a run of those of the longer, and most of them."""
    a, b = sorted((words(one), words(other)), key=len)
    return len(a) > 1 and 2 * len(a) > len(b) and any(b[i : i + len(a)] == a for i in range(len(b) - len(a) + 1))


def paraphrases(
    forget: Sequence[str], retain: Sequence[str], encode: Encode, threshold: float, known: Encode | None = None
) -> list[Overlap]:
    """Return pairs that mean the same: the cosine of their sentence embeddings is at least ``threshold``.

    Args:
        forget: What is to be forgotten.
        retain: What is to be kept.
        encode: From texts to unit vectors.
        threshold: Least cosine.
        known: The same for the retain set, of which it may keep what it found; ``encode`` where left out.

    Raises:
        ValueError: ``threshold`` is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold of similarity must be above 0 and at most 1, not {threshold}")
    ours, theirs = encode(forget), (known or encode)(retain)
    pairs: list[Overlap] = []
    for i, row in enumerate(ours @ theirs.T):
        near = np.flatnonzero(row >= threshold)
        pairs += [Overlap(i, int(r), min(1.0, float(row[r])), "paraphrase") for r in near[np.argsort(-row[near])]]
    return pairs
