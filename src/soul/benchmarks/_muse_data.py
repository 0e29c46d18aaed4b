"""MUSE's sets, from the hub or from a folder, and its corpora in pieces to train on (arXiv 2407.06460)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from soul.data.sources import file_rows, hub_rows, source_options
from soul.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Corpus = Literal["news", "books"]
HUB: dict[Corpus, str] = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
_SUFFIXES = (".json", ".jsonl", ".parquet")
#: The public repository's file names differ from the hub's splits.
_ALSO = {"retain": "retain2", "retain_qa": "retain2_qa", "retain_qa_icl": "retain2_qa_icl"}

TRAIN_SETS: dict[str, tuple[str, str]] = {
    **{name: ("raw", name) for name in ("forget", "retain1", "retain2", "holdout")},
    **{f"scal_{k}": ("scal", f"forget_{k}") for k in (1, 2, 3, 4)},
    **{f"sust_{k}": ("sust", f"forget_{k}") for k in (1, 2, 3, 4)},
    **{f"privleak_{name}": ("privleak", name) for name in ("forget", "retain", "holdout")},
}
"""Corpora by name: subset and split. ``scal_k`` holds ``scal_{k-1}``; ``sust_1`` to ``sust_4`` are disjoint."""


def muse_train(
    source: str, name: str, tokenizer: PreTrainedTokenizerBase | None = None, *, tokens: int = 2048
) -> list[Example]:
    """Load one of MUSE's corpora as plain text, cut for training as the paper does.

    The documents are joined by blank lines and cut every ``tokens - 1`` tokens, which leaves room for the token that
    begins a text. The last piece stays short, where public code fills it up with the beginning of the corpus.

    Args:
        source: A hub id such as ``"muse-bench/MUSE-News"``, or a folder (see :func:`read_rows`).
        name: One of :data:`TRAIN_SETS`, e.g. ``"forget"`` or ``"sust_2"``. The first sets of ``scal`` and ``sust`` are
            the corpus to forget, and are taken from there if a folder lacks them.
        tokenizer: The model's tokenizer; None gives whole documents.
        tokens: Longest piece.

    Raises:
        ValueError: The name is unknown, the source does not hold the set, or the tokenizer cannot tell where in a text
            its tokens are.

    Example:
        >>> pieces = muse_train("muse-bench/MUSE-News", "forget", tokenizer)  # doctest: +SKIP
    """
    if name not in TRAIN_SETS:
        raise ValueError(f"unknown MUSE corpus {name!r}; known: {', '.join(TRAIN_SETS)}")
    subset, split = TRAIN_SETS[name]
    if split == "forget_1" and holds(source, subset, split) is False:
        subset, split = TRAIN_SETS["forget"]
    documents = texts(source, subset, split)
    pieces = documents if tokenizer is None else chunks(documents, tokenizer, tokens)
    return [Example("", piece, id=f"{name}:{i}", chat=False) for i, piece in enumerate(pieces)]


def chunks(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int = 2048) -> list[str]:
    """Return the documents, joined by blank lines, in pieces of ``tokens - 1`` tokens; together they are the whole.

    Raises:
        ValueError: ``tokens`` is less than 2, or the tokenizer has no offsets.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be 2 or more, not {tokens}")
    if not tokenizer.is_fast:
        raise ValueError("cutting a corpus needs a fast tokenizer, which knows where in a text its tokens are")
    whole = "\n\n".join(documents)
    found: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in found["offset_mapping"]][:: tokens - 1]
    pieces = [whole[a:b] for a, b in itertools.pairwise([0, *starts[1:], len(whole)])]
    return [piece for piece in pieces if piece.strip()]


def texts(source: str, subset: str, split: str) -> list[str]:
    """Return the texts of a corpus; empty ones, of which MUSE-News has a few, are left out.

    Raises:
        ValueError: The source does not hold the set, or a row has no text.
    """
    return [text for row in columns(source, subset, split, "text") for text in row if text.strip()]


def columns(source: str, subset: str, split: str, *names: str) -> list[tuple[str, ...]]:
    """Return the columns ``names`` of a set, a tuple a row.

    Raises:
        ValueError: The source does not hold the set, or a row lacks a column.
    """
    rows = []
    for where, row in read_rows(source, subset, split):
        if not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{where}: needs text in {', '.join(names)}; it has {', '.join(map(str, row))}")
        rows.append(tuple(row[name] for name in names))
    if not rows:
        raise ValueError(f"{source!r} holds no rows of {subset}/{split}")
    return rows


def read_rows(source: str, subset: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a set, with where each is.

    In a folder it is a file ``subset_split.json`` or ``subset/split.json`` (a list, or JSON Lines), or Parquet;
    ``retain2`` serves for ``retain``, as in the public repository.

    Raises:
        ValueError: The source is no folder that holds the set, or the hub does not have it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        file = _file(folder, subset, split)
        if file is None:
            raise ValueError(f"{source!r} holds no {subset}_{split}.json and no {subset}/{split}.json")
        yield from file_rows(file)
        return
    place = source.partition(",")[0]  # behind it may stand revision= and limit=
    if place.count("/") != 1 or folder.is_absolute():
        raise ValueError(f"{source!r} is neither a folder nor a hub id such as {HUB['news']!r}")
    options = source_options(source, split, subset)[1] if place != source else {}
    rows = hub_rows(place, split, subset, options.get("revision"))
    yield from itertools.islice(rows, options.get("limit"))


def holds(source: str, subset: str, split: str) -> bool | None:
    """Say whether a folder holds a set; None for the hub, which is asked when it is read."""
    folder = Path(source).expanduser()
    return _file(folder, subset, split) is not None if folder.is_dir() else None


def _file(folder: Path, subset: str, split: str) -> Path | None:
    names = [split, *([_ALSO[split]] if split in _ALSO else [])]
    stems = [stem for name in names for stem in (f"{subset}_{name}", f"{subset}/{name}")]
    files = (folder / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)
