"""Which examples a curvature pass looks at: a function of (seed, step, example), never of a consumed stream."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from soul.data.batches import UnlearnDataset
from soul.data.general import general_text
from soul.data.templates import Encoded


@dataclasses.dataclass(frozen=True)
class Pick:
    """An example in a pass.

    Attributes:
        row: Its tokens.
        seed: Seed of the noise on its tokens, a function of (seed, step, example).
    """

    row: Encoded
    seed: int


Plan = list[list[Pick]]
"""Micro-batches of a refresh, those of all processes."""


def source_rows(dataset: UnlearnDataset, source: str) -> list[Encoded]:
    """Return the tokenised examples of a curvature source, all counted alike: of ``retain+forget`` both sets' union.

    A set of the curvature's own (``data.curvature``) stands in for ``retain``.

    Raises:
        ValueError: A set is empty, or an example is too long.
    """
    rows: list[Encoded] = []
    for name in source.split("+"):
        if name == "retain" and dataset.curvature:
            rows += dataset.curvature
            continue
        if not dataset.examples[name]:
            raise ValueError(
                f"curvature.source is {source!r}, but there is no {name} set: give data.{name}, or set "
                f"optimizer.curvature.source to {'forget' if name == 'retain' else 'retain'}"
            )
        # What the objective does not look at is not tokenised yet.
        rows += dataset.encoded[name] or [
            dataset.template.encode(e, index=i) for i, e in enumerate(dataset.examples[name])
        ]
    return rows


def text_rows(dataset: UnlearnDataset) -> list[Encoded]:
    """Return the built-in plain passages, tokenised."""
    return [dataset.template.encode(e, index=i) for i, e in enumerate(general_text())]


def choose(rows: Sequence[Encoded], count: int, seed: int, step: int, salt: str) -> list[Pick]:
    """Return ``count`` of ``rows`` by rank of a hash of (seed, step, content); none twice before all were chosen.

    Each lap through the rows begins with its longest, so that rows of similar length share a micro-batch (half of the
    work would be padding), and copies of a row do not (the squares of few micro-batches would be all of its estimate).

    Example:
        >>> rows = [Encoded((i, i + 1), 1) for i in range(9)]
        >>> some = choose(rows, 3, 0, 10, "rows")
        >>> some == choose([pick.row for pick in some], 3, 0, 10, "rows")  # the others had no part in it
        True
    """
    seen: dict[int, int] = {}
    names = []
    for row in rows:
        seen[row.key] = seen.get(row.key, -1) + 1
        names.append((row.key, seen[row.key]))  # equal rows must not share their noise
    picks: list[Pick] = []
    for lap in range(-(-count // len(rows)) if rows else 0):
        ranked = []
        for i, name in enumerate(names):
            digest = hashlib.blake2b(f"{seed}:{step}:{lap}:{salt}:{name}".encode(), digest_size=16).digest()
            ranked.append((digest[:8], i, int.from_bytes(digest[8:], "big") >> 1))
        chosen = [Pick(rows[i], noise) for _, i, noise in sorted(ranked)[: count - len(picks)]]
        picks += sorted(chosen, key=lambda pick: -len(pick.row))
    return picks
