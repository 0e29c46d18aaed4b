"""Reading examples: files, folders, hub data sets, and what the library brings along."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from soul.data import general, hub
from soul.data.documents import document_examples, is_documents
from soul.data.people import People
from soul.data.rows import to_examples
from soul.strict import json_value, read_text
from soul.types import DATA_SUFFIXES, TEXT_SUFFIXES, Example

Numbered = Iterator[tuple[str, Any]]
"""Rows with where they are in their file, e.g. ``"line 3"``."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GENERAL = {
    "facts": general.general_facts,
    "text": general.general_text,
    "chat": general.general_chat,
    "heldout_text": general.heldout_text,
    "heldout_chat": general.heldout_chat,
}


def load_examples(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
) -> list[Example]:
    """Read examples from a file, a folder, the hub, or the library's own sets.

    Columns are told by name: :data:`soul.data.rows.FORMS`.

    Args:
        source: A ``.jsonl``, ``.json`` (a list, or JSON Lines), ``.csv`` or ``.parquet`` file; a folder with one of
            these; a ``.txt`` or ``.md`` file or a folder of them, each a text (:mod:`soul.data.documents`); a hub id
            ``"owner/name"``; either followed by ``",config=...,split=...,limit=...,revision=..."``
            where the arguments below are not at hand; ``"general:facts"``, ``"general:text"``, ``"general:chat"``,
            ``"general:heldout_text"`` or ``"general:heldout_chat"``; or invented people,
            ``"people:n=10,facts=8,seed=0,only=Name One|Name Two"`` (``except=`` for all others).
        split: The hub data set's split, or the name of the file in a folder.
        config: The hub data set's configuration.
        limit: Keep only the first so many rows; a conversation is one, with an example for each of its answers.
        revision: The hub data set's branch, tag or commit; the newest by default.

    Raises:
        ValueError: The source cannot be read, holds a row that is no example, or holds none at all.

    Example:
        >>> len(load_examples("people:n=3,facts=4"))
        12
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or left out for all examples; got {limit}")
    scheme, colon, rest = str(source).partition(":")
    if isinstance(source, str) and colon and scheme in ("people", "general"):
        if split is not None or config is not None or revision is not None:
            raise ValueError(
                f"{source!r} is built in and has no splits, configurations or revisions; leave split, config and "
                "revision out"
            )
        examples = _people(rest) if scheme == "people" else _general(rest)
        return examples[:limit]
    if isinstance(source, str) and "," in source and not Path(source).exists():
        source, options = source_options(source, split, config, limit, revision)
        return load_examples(source, **options)
    path = Path(source).expanduser()
    if path.exists() and is_documents(str(path)):
        check_local(source, config, revision)
        if split is not None:
            raise ValueError(f"{source}: texts have no splits; leave out split={split!r}, or give one of the files")
        return document_examples(str(path))[:limit]
    if not path.exists() and isinstance(source, str) and is_hub_id(source):
        rows = (hub_rows(source, split, config, revision),)
    else:
        check_local(source, config, revision)
        rows = (file_rows(file) for file in data_files(path, split))
    chained = itertools.islice(itertools.chain.from_iterable(rows), limit)
    examples = [example for where, row in chained for example in to_examples(row, where)]
    if not examples:
        raise ValueError(f"{source}: holds no examples")
    return examples


def listed(sources: str | Sequence[str]) -> list[str]:
    """Return one source or several as a list, without empty ones.

    Example:
        >>> listed("a.jsonl"), listed(["a.jsonl", ""]), listed("")
        (['a.jsonl'], ['a.jsonl'], [])
    """
    return [source for source in ([sources] if isinstance(sources, str) else sources) if source]


def check_local(source: str | Path, config: str | None, revision: str | None) -> None:
    """Make sure that a local source is given nothing that only data sets of the hub have.

    Raises:
        ValueError: It is.
    """
    for name, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{source}: {name}={value!r} is for data sets of the hub; leave it out for local files")


def source_options(
    source: str,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Read ``owner/name,config=...,split=...,limit=...,revision=...`` into the source and the arguments it stands for.

    Raises:
        ValueError: Something else is behind a comma, or something is given twice.
    """
    options: dict[str, Any] = {"split": split, "config": config, "limit": limit, "revision": revision}
    given = dict(options)
    while match := re.fullmatch(r"(.+),\s*(split|config|limit|revision)=([^,=]+)", source):
        source, key, value = match.groups()
        if options[key] is not None:
            raise ValueError(f"{key} is given twice for {source!r}")
        options[key] = value.strip()
    if isinstance(options["limit"], str):
        if not options["limit"].isdecimal():
            raise ValueError(f"{source}: limit must be a whole number, not {options['limit']!r}")
        options["limit"] = int(options["limit"])
    if options == given:
        raise ValueError(
            f"there is no file {source!r}; after a comma, only split=, config=, limit= and revision= are understood"
        )
    return source, options


def check_disjoint(
    forget: Sequence[Example], retain: Sequence[Example], names: tuple[str, str] = ("forget", "retain")
) -> None:
    """Make sure that nothing is to be forgotten and kept at once.

    Args:
        forget: A set.
        retain: Another, which must share nothing with it.
        names: What the two are called.

    Raises:
        ValueError: An item of the first set (same turns, same answer) is also in the second.

    Example:
        >>> check_disjoint([Example("Who is Ada?", "A poet.")], [Example("Who is Bo?", "A cook.")])
    """
    kept = {(item.history, item.prompt, item.answer) for item in retain}
    shared = [item for item in forget if (item.history, item.prompt, item.answer) in kept]
    if shared:
        first = f"{shared[0].prompt} {shared[0].answer}".strip()
        why = {
            ("forget", "retain"): "the model is asked to forget and to keep the same",
            ("forget", "curvature"): "steps spare what they are to forget",
            ("benchmark.forget", "data.retain"): "set benchmark.forget to what data.forget holds: it would measure as "
            "forgotten what is kept",
        }.get(names, f"the {names[0]} set is not what its name says")
        raise ValueError(
            f"{len(shared)} of {len(forget)} {names[0]} items are also in the {names[1]} set, the first is "
            f"{first!r:.200}; remove them from the {names[1]} set, or {why}"
        )


def _people(text: str) -> list[Example]:
    """Read ``n=10,facts=8,seed=0,only=...``; every part has a default."""
    numbers: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in numbers or key in named:
            raise ValueError(f"people:{text}: {key} is given twice")
        if equals and key in ("only", "except"):
            named[key] = [name.strip() for name in value.split("|")]
        elif equals and key in ("n", "facts", "seed") and re.fullmatch(r"-?\d+", value):
            numbers[key] = int(value)
        else:
            raise ValueError(
                f"people:{text}: cannot read {part!r}; allowed are n=, facts=, seed= with a whole number, "
                "and only= or except= with full names between '|'"
            )
    if len(named) > 1:
        raise ValueError(f"people:{text}: only= and except= exclude each other; give one of them")
    people = People(**numbers)
    if "except" not in named:
        return people.examples(named.get("only"))
    gone = {example.subject for example in people.examples(named["except"])}
    rest = people.examples([name for name in people.names() if name not in gone])
    if not rest:
        raise ValueError(f"people:{text}: except= names everybody, and nobody is left; raise n or name fewer")
    return rest


def _general(name: str) -> list[Example]:
    if name not in _GENERAL:
        raise ValueError(
            f"unknown source 'general:{name}'; known: {', '.join(f'general:{known}' for known in _GENERAL)}"
        )
    return _GENERAL[name]()


def is_hub_id(source: str) -> bool:
    """Say whether a source reads as ``owner/name`` and is no data file."""
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in (*DATA_SUFFIXES, *TEXT_SUFFIXES)


def data_files(path: Path, split: str | None) -> list[Path]:
    """Return the file itself, or the files of a folder that ``split`` names (shards of one split in order)."""
    if not path.exists():
        folder = path.parent
        around = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, around, n=1, cutoff=0.4)
        hint = f"did you mean {str(folder / close[0])!r}?" if close else "check the path, or give a hub id 'owner/name'"
        raise ValueError(f"there is no file {str(path)!r}; {hint}")
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path}: a file has no splits; leave out split={split!r}, or give the folder")
        return [path]
    if not path.is_dir():  # a pipe would be waited for, and a device has no end
        raise ValueError(f"{path}: is neither a file nor a folder; write the rows into a file first")
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.suffix.lower() in _READERS)
    if split is not None:
        shard = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
        chosen = [file for file in files if shard.fullmatch(file.stem)]
    else:
        chosen = files
    names = ", ".join(file.name for file in files) or "none"
    if not chosen:
        wanted = f"no file named {split}" if split else "no data file"
        known = ", ".join((*DATA_SUFFIXES, *TEXT_SUFFIXES))
        raise ValueError(f"{path}: {wanted} with one of {known}; data files there: {names}")
    if len(chosen) > 1 and (split is None or len({(file.stem == split, file.suffix) for file in chosen}) > 1):
        raise ValueError(
            f"{path}: several files would do ({names}); name one of them, or pick as in '{path},split=NAME'"
        )
    return chosen


def file_rows(path: Path) -> Numbered:
    """Yield the rows of a data file, as they are, with where they are."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(_READERS)}")
    for where, row in reader(path):
        if isinstance(row, str):  # a bare list of passages
            row = {"text": row}
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where}: must be an object with columns, not {type(row).__name__}")
        yield f"{path}, {where}", row


def _json(path: Path) -> Numbered:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from _lines(path)
        return
    yield from _numbered(json_value(text, str(path)))


def _lines(path: Path) -> Numbered:
    text = read_text(path)
    # Not splitlines(): it also splits at U+2028 and friends, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json_value(line, f"{path}, line {number}")
            except ValueError as error:
                if _is_json(text):
                    raise ValueError(
                        f"{path}: is one JSON value over several lines; write each row on a line of its own, or all of "
                        "them as a list [...] into a .json file"
                    ) from error
                raise
            yield f"line {number}", row


def _is_json(text: str) -> bool:
    try:
        json_value(text, "")
    except ValueError:
        return False
    return True


def _csv(path: Path) -> Numbered:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ValueError(f"{path}, line 1: the column {twice!r:.60} is there twice; rename one of the two")
        reader.fieldnames = names  # "question, answer" names the same two
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than the header has columns")
            yield f"line {reader.line_num}", {column: _cell(column, value) for column, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: invalid CSV ({error}); JSON Lines is safer") from error


def _cell(column: str, value: str | None) -> Any:
    """Return a cell as it is, except that columns which may hold a list, true or false may hold it as JSON."""
    if column == "ends" and value is not None:
        return {"": None, "true": True, "false": False}.get(value.strip().lower(), value)
    if column in ("perturbed_answer", "messages") and value is not None:
        if not value:
            return None
        if value.startswith("["):
            try:
                return json_value(value, column)
            except ValueError:
                return value  # a text that happens to begin with a bracket
    return value


def _parquet(path: Path) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable parquet file ({reason:.300}); write it again") from error
    yield from _numbered(rows)


_READERS: dict[str, Callable[[Path], Numbered]] = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _numbered(rows: Iterable[Any]) -> Numbered:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def hub_rows(source: str, split: str | None, config: str | None, revision: str | None = None) -> Numbered:
    """Yield the rows of a data set of the hub, as they are, with where they are."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source!r} is no local file, and data sets of the hub need the package datasets: pip install datasets"
        ) from error
    try:
        datasets.disable_progress_bars()
        with hub.no_retries():
            loaded = datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # the hub's client lets errors of several network libraries through
        if str(error) == "An error occurred while generating the dataset" and error.__cause__:
            error = error.__cause__  # which says more
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        at = f", revision {revision}" if revision else ""
        raise ValueError(
            f"cannot load {source!r} (config {config}, split {split}{at}) from the hub, and there is no such local "
            f"path: {reason}. Check the name and the connection, choose as in '{source},config=...,split=...', or "
            "give a local file"
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            names = ", ".join(map(str, loaded))
            raise ValueError(f"{source!r} has several splits; pick one, as in '{source},split=NAME': {names}")
        loaded = next(iter(loaded.values()))
    for where, row in _numbered(loaded):
        yield f"{source}, {where}", row
