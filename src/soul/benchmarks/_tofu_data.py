"""TOFU's sets: whose questions they are, and where they come from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from soul.data.sources import load_examples
from soul.types import Example

TRAIN_SETS = (
    *("full", "forget01", "forget05", "forget10"),
    *("retain99", "retain95", "retain90"),
    *("holdout01", "holdout05", "holdout10"),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_AUTHOR = 20  # questions about each author, one after another
#: Where each whole set begins among the 200 authors, and its rows; ``forget10`` are the last 20 of them.
_PLACES = {
    "full": (0, 4000),
    **{f"forget{n:02}": (200 - 2 * n, 40 * n) for n in (1, 5, 10)},
    **{f"forget{n:02}_perturbed": (200 - 2 * n, 40 * n) for n in (1, 5, 10)},
    **{f"retain{100 - n}": (0, 4000 - 40 * n) for n in (1, 5, 10)},
    "retain_perturbed": (0, 400),
    **{f"holdout{n:02}": (0, 40 * n) for n in (1, 5, 10)},
}


def tofu_train(source: str, name: str) -> list[Example]:
    """Load one of TOFU's training sets, e.g. ``"full"``, ``"forget10"`` or ``"retain90"``.

    Args:
        source: A hub id such as ``"locuslab/TOFU"``, or a folder of JSON Lines files such as ``forget10.json``.
        name: The set; ``holdout*`` are unseen authors that only some copies of the data have.

    Raises:
        ValueError: The name is unknown, or the source is neither a hub id nor a folder that holds the set.

    Example:
        >>> len(tofu_train("locuslab/TOFU", "forget10"))  # doctest: +SKIP
        400
    """
    if name not in TRAIN_SETS:
        raise ValueError(f"unknown TOFU set {name!r}; known: {', '.join(TRAIN_SETS)}")
    return load_set(source, name)


def load_set(source: str, name: str) -> list[Example]:
    """Load any of TOFU's sets, by the name of its file; each example has an id and, where sets are whole, its author.

    Raises:
        ValueError: The source is neither a hub id nor a folder that holds the set.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"{source!r} holds no {path.name}; TOFU's sets are JSON Lines files named after them")
        return _authors(numbered(load_examples(path), name), name)
    if not _HUB_ID.fullmatch(source.partition(",")[0]):  # behind it may stand revision=
        raise ValueError(f"{source!r} is neither a folder nor a hub id such as 'locuslab/TOFU'")
    return _authors(numbered(load_examples(source, config=name, split="train"), name), name)


def _authors(examples: list[Example], name: str) -> list[Example]:
    """Return the examples with their author as subject: TOFU's rows do not name theirs, but stand in order.

    Numbered from 1 to 200 alike in all sets, so that ``forget01`` is about ``author 199`` and ``author 200``; the
    holdout set has authors of its own. A set that is not whole stays as it is, and so does a row with a subject.
    """
    first, size = _PLACES.get(name, (0, 0))
    if len(examples) != size:
        return examples
    kind = "holdout author" if name.startswith("holdout") else "author"
    return [
        e if e.subject else dataclasses.replace(e, subject=f"{kind} {first + i // _AUTHOR + 1}")
        for i, e in enumerate(examples)
    ]


def numbered(examples: Sequence[Example], name: str) -> list[Example]:
    """Return the examples with ``name:position`` as the id of those that have none, so that rows can be told apart."""
    return [e if e.id else dataclasses.replace(e, id=f"{name}:{i}") for i, e in enumerate(examples)]
