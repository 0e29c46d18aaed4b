"""Reading YAML and JSON that somebody else wrote: what is meant, or one ``ValueError`` that says where and what to do.

The libraries let pass what a person cannot have meant (a key given twice, of which the last wins), what no format
means (``NaN`` in JSON), and what is small to write and endless to read (YAML aliases of aliases).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

YAML_BYTES = 64_000
"""Longest YAML text that is read: a few seconds' reading at worst; a recipe is a hundredth of it."""
_NODES, _DEPTH = 10_000, 20
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
WHOLE = 1 << 63
"""Whole numbers from here on do not fit into what computes with them."""


def read_text(path: Path, limit: int | None = None) -> str:
    """Return the text of a regular UTF-8 file, without a byte-order mark.

    Args:
        path: The file.
        limit: Most bytes; more are refused before they are read.

    Raises:
        ValueError: It is no regular file (a pipe would hang), too long, not UTF-8, or cannot be read.
    """
    try:
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "not there"
            raise ValueError(f"{path} is {what}: give a text file")
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise ValueError(f"{path} has {size:,} bytes, and at most {limit:,} are read: is it the right file?")
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror or error}); check its name and permissions"
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        seems = next((f"; it looks like {name}" for mark, name in _MARKS.items() if raw.startswith(mark)), "")
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text (byte {error.start}{seems}); save it as UTF-8"
        ) from error


def broken_text(value: str) -> bool:
    r"""Say whether a text holds half of a surrogate pair, which is no character and cannot be written as UTF-8.

    Example:
        >>> broken_text("\ud800"), broken_text("Zoë")
        (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def number_fault(value: Any) -> str:
    """Say what is wrong with a number that is infinite, not a number or too large; return "" for any other value.

    Example:
        >>> number_fault(float("nan")), number_fault(10**30), number_fault(0.5)
        ('is not a finite number', 'is too large a number', '')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, int) and not -WHOLE <= value < WHOLE:
        return "is too large a number"
    return ""


# ---- JSON ------------------------------------------------------------------------------------------------------------

_NO_NUMBERS = ("nan", "inf", "-inf")


def plain_number(value: float) -> float | str:
    """Return a float as JSON can hold it: nan and infinities, for which it has no numbers, as words.

    Example:
        >>> plain_number(0.5), plain_number(math.inf)
        (0.5, 'inf')
    """
    return value if math.isfinite(value) else str(float(value))


def read_number(value: Any) -> Any:
    """Return the float that a word of :func:`plain_number` stands for; any other value as it is, but nan for None.

    None was written for nan and infinities alike before there were words for them.
    """
    return float(value) if value in _NO_NUMBERS else math.nan if value is None else value


def json_value(text: str, where: str, *, lenient: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        where: File and line, for messages.
        lenient: Let pass what records of our own may hold: ``NaN``, ``Infinity``, halves that a model said.

    Raises:
        ValueError: It is not JSON, a key is given twice in one object, a text holds half of a surrogate pair, a number
            has thousands of digits, or it is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=None if lenient else _refuse)
        if not lenient and _ESCAPED_SURROGATE.search(text):
            _check_texts(value)
    except json.JSONDecodeError as error:
        where = f"{where}, line {error.lineno}" if "\n" in text else where
        raise ValueError(f"{where}: invalid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: invalid JSON (nested too deeply)") from error
    except ValueError as error:
        reason = "a number has too many digits" if "digits" in str(error) else error
        raise ValueError(f"{where}: invalid JSON ({reason})") from error
    return value


def json_objects(path: Path, *, lenient: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON Lines file with where they are, e.g. ``"rows.jsonl, line 3"``; blank lines are none.

    Raises:
        ValueError: The file cannot be read, or a line is no JSON object.
    """
    # not splitlines(): it also splits at U+2028 and friends, which JSON allows inside a text
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            value = json_value(line, where, lenient=lenient)
            if not isinstance(value, dict):
                raise ValueError(f"{where}: must be an object {{...}}, not {type(value).__name__}")
            yield where, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {twice!r:.60} is given twice; keep one of the two")
    return found


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON; write null, or leave it out")


def _check_texts(value: Any) -> None:
    if isinstance(value, str) and broken_text(value):
        raise ValueError(f"{value!r:.60} holds half of a surrogate pair; write the whole character")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key)
            _check_texts(item)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)


# ---- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which a date is its text, and which goes no deeper than ``_DEPTH`` levels."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, unless it is too deep: PyYAML would go on for seconds until Python's own limit."""
        self.depth += 1
        if self.depth > _DEPTH:
            mark: Any = self.peek_event().start_mark
            raise _TooDeepError(mark.line + 1)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _TooDeepError(Exception):
    """Carries the line at which a text is nested too deeply."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def yaml_tree(text: str, where: str) -> Any:
    """Return the value of a YAML text: mappings, lists, texts, numbers, truth values and null.

    Anchors and aliases are understood, as long as what they stand for stays small when written out.

    Args:
        text: The text.
        where: The file, for messages.

    Raises:
        ValueError: It is not YAML (caused by ``yaml.YAMLError``), a key is given twice in one mapping, a value has
            another tag (dates, sets, binary data, Python objects), or it is too long, too deep or refers to itself.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"{where}: {len(text):,} characters of YAML, and at most {YAML_BYTES:,} are read")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(loader, node, where, {}) > _NODES:
            raise ValueError(f"{where}: more than {_NODES:,} values, with its aliases written out; give fewer")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except _TooDeepError as error:
        raise ValueError(f"{where}, line {error}: nested too deeply; at most {_DEPTH} levels are read") from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(loader: _Loader, node: yaml.Node, where: str, known: dict[int, int]) -> int:
    """Return how many values a node stands for, its aliases written out, having looked at each node once."""
    line = f"{where}, line {node.start_mark.line + 1}"
    if id(node) in known:
        if not known[id(node)]:  # still being counted: it is inside itself
            raise ValueError(f"{line}: refers to itself; write it out")
        return known[id(node)]
    if node.tag not in _TAGS:
        raise ValueError(
            f"{line}: values tagged {node.tag.replace('tag:yaml.org,2002:', '!!')!r:.60} are not read; write text, "
            "numbers, true, false, null, lists and mappings"
        )
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(loader, node, line)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_size(loader, item, where, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}, line {key.start_mark.line + 1}: a key must be one word, no list or mapping")
            name = (key.tag, key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(
                    f"{where}, line {key.start_mark.line + 1}: the key {key.value!r:.60} is given twice; keep one of "
                    "the two"
                )
            seen.add(name)
            total += _size(loader, key, where, known) + _size(loader, value, where, known)
    known[id(node)] = min(total, _NODES + 1)
    return known[id(node)]


def _check_scalar(loader: _Loader, node: yaml.ScalarNode, line: str) -> None:
    if node.tag == "tag:yaml.org,2002:merge":
        return
    try:
        value = loader.construct_object(node)
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:  # of `!!int words`, say
        raise ValueError(f"{line}: cannot read {node.value!r:.60} as {node.tag.rpartition(':')[2]}") from error
    if isinstance(value, str) and broken_text(value):
        raise ValueError(f"{line}: {value!r:.60} holds half of a surrogate pair; write the whole character")
