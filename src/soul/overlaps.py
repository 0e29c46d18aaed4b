"""Looking, before a run, for what is to be forgotten in what is to be kept; and what is done about it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from soul.data.overlap import Overlap, near_duplicates, paraphrases, text_of
from soul.embedding import SentenceEncoder, load_encoder
from soul.machine import cache_dir
from soul.stored import StorageError, write_bytes
from soul.types import Example

Action = Literal["warn", "refuse", "drop", "ignore"]
SHOWN = 5
"""Pairs that are spelled out."""
MANY = 256
"""Texts whose embeddings are kept in the cache: the same retain set serves many runs, and takes minutes."""
LOG = logging.getLogger("soul")


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """What was looked for, and found.

    Attributes:
        pairs: The most similar retain item of each forget item first.
        looked_for: In words.
        action: What is done about it.
        ids: Names of the forget and of the retain item of each pair.
        texts: What the two say.
        blind: Whether paraphrases were to be looked for and no sentence encoder was there.
        n_forget: Forget items with a pair.
        n_retain: Retain items with one.
    """

    pairs: tuple[Overlap, ...] = ()
    looked_for: str = "nothing"
    action: Action = "ignore"
    ids: tuple[tuple[str, str], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    blind: bool = False

    @property
    def n_forget(self) -> int:
        """Forget items that are hidden in the retain set."""
        return len({pair.forget for pair in self.pairs})

    @property
    def n_retain(self) -> int:
        """Retain items that hide one."""
        return len({pair.retain for pair in self.pairs})

    def where(self) -> str:
        """Say how many are hidden in how many."""
        verb = "is" if self.n_forget == 1 else "are"
        return f"{_items(self.n_forget, 'forget')} {verb} hidden in {_items(self.n_retain, 'retain')}"

    def summary(self) -> str:
        """Say in a sentence what was found; empty where nothing was."""
        if not self.pairs:
            return ""
        done = "dropped" if self.action == "drop" else "kept: the model is asked to forget and to keep the same"
        return (
            f"{self.where()}, which {'was' if self.n_retain == 1 else 'were'} {done} "
            f"({self.looked_for}; data.overlap={self.action})"
        )

    def lines(self) -> list[str]:
        """Return the most similar pairs, a line each."""
        order = sorted(range(len(self.pairs)), key=lambda i: (-self.pairs[i].similarity, i))
        lines = [
            f"{self.texts[i][0]!r:.100} ~ {self.texts[i][1]!r:.100} ({self.pairs[i].kind}, "
            f"{self.pairs[i].similarity:.2f})"
            for i in order[:SHOWN]
        ]
        return lines + ([f"and {len(order) - SHOWN} more pairs"] if len(order) > SHOWN else [])

    def record(self) -> dict[str, Any]:
        """Return what a run's record keeps: names and similarities, no text."""
        pairs = [
            {"forget": f, "retain": r, "similarity": round(p.similarity, 4), "kind": p.kind}
            for p, (f, r) in zip(self.pairs, self.ids, strict=True)
        ]
        return {"looked_for": self.looked_for, "action": self.action, "pairs": pairs}


def _items(count: int, what: str) -> str:
    return f"{count} {what} item{'' if count == 1 else 's'}"


def find_overlaps(
    forget: Sequence[Example],
    retain: Sequence[Example],
    action: Action = "warn",
    *,
    copied: float = 0.6,
    alike: float = 0.8,
    encoder: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Overlaps:
    """Look for forget items in the retain set.

    Args:
        forget: What is to be forgotten.
        retain: What is to be kept.
        action: What will be done about it; ``ignore`` does not look.
        copied: Least share of common shingles of a near-duplicate (:func:`soul.data.overlap.near_duplicates`).
        alike: Least cosine of a paraphrase; ``docs/results/overlap.md`` says what it finds and what it takes for one.
        encoder: A sentence encoder's folder or hub id; empty for the default one where it is on this machine, ``none``
            to look for near-duplicates alone.
        progress: Called with (what, done, of) while texts are embedded.

    Raises:
        ValueError: A named encoder cannot be loaded, or a threshold is out of range.
    """
    if action == "ignore" or not forget or not retain:
        return Overlaps()
    ours, theirs = [text_of(e) for e in forget], [text_of(e) for e in retain]
    found = {(p.forget, p.retain): p for p in near_duplicates(ours, theirs, copied)}
    looked_for = f"near-duplicates from {copied:g}"
    try:
        encode = None if encoder == "none" else load_encoder(encoder)
    except ValueError:
        if encoder:
            raise
        encode = None
    if encode is not None:
        looked_for += f" and paraphrases by {encode.name} from {alike:g}"
        by: Any = functools.partial(embeddings, encode, progress=progress)
        # of what is to be forgotten nothing is cached
        for pair in paraphrases(ours, theirs, functools.partial(by, cached=False), alike, by):
            found.setdefault((pair.forget, pair.retain), pair)
    else:
        looked_for += " alone" if encoder == "none" else " alone, as paraphrases need a sentence encoder"
    pairs = sorted(found.values(), key=lambda p: (p.forget, -p.similarity, p.retain))
    return Overlaps(
        tuple(pairs),
        looked_for,
        action,
        tuple((forget[p.forget].id or str(p.forget), retain[p.retain].id or str(p.retain)) for p in pairs),
        tuple((ours[p.forget], theirs[p.retain]) for p in pairs),
        blind=encode is None and encoder != "none",
    )


def embeddings(
    encode: SentenceEncoder,
    texts: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    cached: bool = True,
) -> np.ndarray:
    """Return unit vectors [texts, D]; those of :data:`MANY` texts or more are read from the cache where they are there.

    Unless ``cached`` is off.

    The cache's file is named by the texts and by what the encoder makes of a probe, so that neither another encoder
    under the same name nor a changed text takes up what is stale. One that cannot be read or written is done without.
    """
    if len(texts) < MANY:
        return encode(texts)
    shown = progress and (lambda done, of: progress("looking for overlaps", done, of))
    if not cached:
        return encode(texts, progress=shown)
    probe = encode(["What an encoder makes of this sentence is its fingerprint."])
    name = hashlib.blake2b(digest_size=16)
    for part in (np.round(probe, 3).tobytes(), str(encode.max_length).encode(), *(text.encode() for text in texts)):
        name.update(len(part).to_bytes(8, "big") + part)
    file = cache_dir() / "embeddings" / f"{name.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        known = np.load(file, allow_pickle=False)
        if known.shape == (len(texts), probe.shape[1]):
            return known
    found = encode(texts, progress=shown)
    with contextlib.suppress(StorageError):
        store(file, found)
    return found


def store(file: Path, vectors: np.ndarray) -> None:
    """Write an array so that the file is whole or absent."""
    content = io.BytesIO()
    np.save(content, vectors)
    write_bytes(file, content.getvalue())


def without_overlaps(retain: Sequence[Example], found: Overlaps) -> list[Example]:
    """Show what was found, and return what remains of the retain set.

    Raises:
        ValueError: ``action`` is ``refuse`` and something was found, or ``drop`` leaves nothing.
    """
    if not found.pairs:
        if found.blind:  # a person who expects more must know
            LOG.warning("the retain set was searched for %s: see data.encoder", found.looked_for)
        return list(retain)
    shown = "; ".join(found.lines())
    if found.action == "refuse":
        raise ValueError(
            f"{found.where()} ({found.looked_for}): {shown}. Remove them from the retain set, or set data.overlap to "
            "drop or warn"
        )
    for line in (found.summary(), *found.lines()):
        LOG.warning(line)
    if found.action != "drop":
        return list(retain)
    gone = {pair.retain for pair in found.pairs}
    kept = [example for i, example in enumerate(retain) if i not in gone]
    if not kept:
        raise ValueError(
            "every item of the retain set says what is to be forgotten, so that data.overlap=drop leaves none: give "
            "another retain set"
        )
    return kept
