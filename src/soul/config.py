"""Text to a frozen, validated tree of dataclasses, and back without loss."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from soul.registry import Registry
from soul.strict import YAML_BYTES, broken_text, number_fault, read_text, yaml_tree
from soul.visible import hides

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: The file is missing, is not YAML that :func:`soul.strict.yaml_tree` reads, or is not a mapping.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ValueError(f"no such recipe: {path}." + (f" Did you mean {path.with_name(near[0])}?" if near else ""))
    tree = yaml_tree(read_text(path, YAML_BYTES), str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ValueError(f"{path} must hold a mapping such as 'model: ...', not {found}")
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
            raise ValueError(f"cannot read {assignment!r:.200}: write key.sub=value, e.g. optimizer.lr=1e-4")
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            child: Any = node.get(key)
            if isinstance(child, str):  # `objective: npo` is short for `objective: {name: npo}`
                child = {"path" if key == "model" else "name": child}  # likewise `model: smollm2-135m`
            elif child is None:
                child = {}
            elif not isinstance(child, dict):
                raise ValueError(f"cannot set {path!r:.200}: {key!r:.60} holds {child!r:.60}, which has no parts")
            node[key] = child
            node = child
        _refuse_inherited(parents, node, last, text)
        node[last] = _scalar(text, path) if text else ""  # to a person `data.retain=` is an empty text
    return tree


def _refuse_inherited(parents: Sequence[str], node: Mapping[str, Any], last: str, text: str) -> None:
    """Refuse another component under the settings of the one before: a rate of AdamW's is none of K-FAC's."""
    before, rest = node.get("name"), [key for key in node if key != "name"]
    if last == "name" and before is not None and before != text and rest:
        path = ".".join(parents)
        raise ValueError(
            f"{path}.name={text:.60} would keep {', '.join(rest)} of {before!s:.60}, which mean something else there: "
            f"write {path}={text:.60} for its defaults, and name what else you want after it"
        )


def _scalar(text: str, where: str) -> Any:
    """Return what a person means by the text of a setting; what is no YAML is the text itself.

    So is what YAML would read as a comment, or as an octal number: nobody writes these on a command line.
    """
    if _LITERAL.match(text):
        return text
    try:
        value = yaml_tree(text, where)
    except ValueError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            return text
        raise
    return float(value) if isinstance(value, str) and _NUMERIC.fullmatch(value) else value


_LITERAL = re.compile(r"#|[^'\"\[{].*\s#|[-+]?0\d+$")
_NUMERIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""Numbers that YAML 1.1 reads as text, such as 1e-4; a person means a number."""


ELSEWHERE = {
    "trainer": "objective",
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "forget_split": "data.forget",
    "retain_split": "data.retain",
}
"""What settings of transformers, TOFU and OpenUnlearning are called here."""


def parse(cls: type[T], tree: Any, where: str) -> T:
    """Return an instance of the dataclass ``cls`` from a mapping.

    Raises:
        ValueError: An unknown key (with the nearest known one) or a value of the wrong kind.
    """
    if dataclasses.is_dataclass(tree) and isinstance(tree, cls):
        return tree
    if not isinstance(tree, Mapping):
        parts = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # cls is a dataclass
        raise ValueError(
            f"{where} must be a mapping, not {_short(tree)}: {where}.{parts[0]}=... sets one of its parts. "
            f"Known: {', '.join(parts)}."
        )
    upgraded = getattr(cls, "upgraded", None)  # settings that have another name by now
    tree = upgraded(tree) if upgraded else tree
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # cls is a dataclass
    known = [f.name for f in fields]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = ELSEWHERE.get(str(key)) or (near[0] if near else "")
            hint = f" Did you mean {meant!r}?" if meant else ""
            raise ValueError(f"unknown setting {where}.{key!s:.80}.{hint} Known: {', '.join(known)}.")
    for key, value in tree.items():
        _check(value, f"{where}.{key}")
    numeric = {k: float(v) for k, v in tree.items() if isinstance(v, str) and _NUMERIC.fullmatch(v)}
    texts = _texts(cls) if numeric else frozenset()
    values = {k: numeric.get(k, v) if k not in texts else v for k, v in tree.items()}
    for field in fields:
        given = values.get(field.name)
        if isinstance(given, Mapping) and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            if dataclasses.is_dataclass(default):  # what is not given stays as this class has it by default
                values[field.name] = parse(type(default), {**plain(default), **given}, f"{where}.{field.name}")
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {message}, got {_short(first['input'])}") from error


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


@functools.cache
def _texts(cls: type) -> frozenset[str]:
    """Return the settings that may be a text, of which 1e5 is one."""
    hints = typing.get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if hint is str or str in typing.get_args(hint))


def _check(value: Any, where: str) -> None:
    """Refuse, by its place, what no setting can be: half characters, and numbers that nothing can compute with."""
    fault = number_fault(value)
    if fault:
        raise ValueError(f"{where} {fault} ({value!r:.40}); give one that can be computed with")
    if isinstance(value, str) and broken_text(value):
        raise ValueError(f"{where} is not Unicode text ({value!r:.60}); rename the file, or save the recipe as UTF-8")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check(key, where)
            _check(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(item, f"{where}.{i}")


def component(registry: Registry, tree: Any, default: str) -> Any:
    """Return the registered component a tree names: ``npo`` or ``{name: npo, beta: 0.1}``."""
    if tree is None:
        tree = default
    if isinstance(tree, str):
        tree = {"name": tree}
    if not isinstance(tree, Mapping):
        ways = "a name, a mapping with a name, or (in Python) an instance"
        raise ValueError(f"{registry.kind} must be {ways}, not {_short(tree)}")
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
    """Return the YAML text of a tree; where it holds what a display would hide or obey, all but ASCII is escaped."""
    tree = plain(value)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False) if hides(text) else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
