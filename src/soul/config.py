"""Text to a frozen, validated tree of dataclasses, and back without loss."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from soul.registry import Registry

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: The file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ValueError(f"no such recipe: {path}." + (f" Did you mean {path.with_name(near[0])}?" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping such as 'model: ...', not {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``key.sub=value`` assignments; values are YAML.

    Example:
        >>> override({"optimizer": {"name": "adamw"}}, ["optimizer.lr=1e-4"])
        {'optimizer': {'name': 'adamw', 'lr': 0.0001}}

    Raises:
        ValueError: No ``=`` in an assignment, or the path runs through a plain value.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ValueError(f"cannot read {assignment!r}: write key.sub=value, e.g. optimizer.lr=1e-4")
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            child: Any = node.get(key)
            if isinstance(child, str):  # `objective: npo` is short for `objective: {name: npo}`
                child = {"path" if key == "model" else "name": child}  # likewise `model: smollm2-135m`
            elif child is None:
                child = {}
            elif not isinstance(child, dict):
                raise ValueError(f"cannot set {path!r}: {key!r} holds {child!r}, which has no parts")
            node[key] = child
            node = child
        node[last] = _scalar(text) if text else ""  # to a person `data.retain=` is an empty text; null says nothing
    return tree


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text; a person means a number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse(cls: type[T], tree: Any, where: str) -> T:
    """Return an instance of the dataclass ``cls`` from a mapping.

    Raises:
        ValueError: An unknown key (with the nearest known one) or a value of the wrong kind.
    """
    if dataclasses.is_dataclass(tree) and isinstance(tree, cls):
        return tree
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must be a mapping, not {tree!r}")
    upgraded = getattr(cls, "upgraded", None)  # settings that have another name by now
    tree = upgraded(tree) if upgraded else tree
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # cls is a dataclass
    known = [f.name for f in fields]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown setting {where}.{key}.{hint} Known: {', '.join(known)}.")
    values = {k: _scalar(v) if isinstance(v, str) and _looks_numeric(v) else v for k, v in tree.items()}
    for field in fields:
        given = values.get(field.name)
        if isinstance(given, Mapping) and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            if dataclasses.is_dataclass(default):  # what is not given stays as this class has it by default
                values[field.name] = parse(type(default), {**plain(default), **given}, f"{where}.{field.name}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {message}, got {_short(first['input'])}") from error


def component(registry: Registry, tree: Any, default: str) -> Any:
    """Return the registered component a tree names: ``npo`` or ``{name: npo, beta: 0.1}``."""
    if tree is None:
        tree = default
    if isinstance(tree, str):
        tree = {"name": tree}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{registry.kind} must be a name or a mapping with a name, not {tree!r}")
    cls = registry.get(str(tree.get("name", default)))
    return parse(cls, {k: v for k, v in tree.items() if k != "name"}, registry.kind)


def plain(value: Any) -> Any:
    """Return a tree of plain values that :func:`parse` and :func:`component` read back to an equal tree."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        name = getattr(type(value), "name", None)
        return {"name": name, **tree} if isinstance(name, str) else tree
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by their path.

    Example:
        >>> flat({"optimizer": {"name": "adamw", "lr": 0.1}})
        {'optimizer.name': 'adamw', 'optimizer.lr': 0.1}
    """
    tree = plain(value)
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key, part in tree.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}


def dump(value: Any) -> str:
    """Return the YAML text of a tree."""
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True)


def _looks_numeric(text: str) -> bool:
    return bool(text) and text[0] in "+-.0123456789" and ("e" in text.lower() and not text.lower().startswith("0x"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
