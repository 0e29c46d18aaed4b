"""What a setting means: the docstrings of recipes' parts, for whoever has a terminal and no source."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from soul import config
from soul.registry import ATTACKS, BENCHMARKS, METHODS, OBJECTIVES, OPTIMIZERS

REGISTRIES = {r.kind: r for r in (OBJECTIVES, OPTIMIZERS, METHODS, BENCHMARKS, ATTACKS)}
_ROLE = re.compile(r":(?:class|func|meth|attr|data):`~?(?:[\w.]*\.)?(\w+)`|:mod:`~?([\w.]+)`")
_SECTION = re.compile(r"\n(?:Attributes|Args):\n")
_ENTRY = re.compile(r"    (\w+): (.*)")


class Setting(NamedTuple):
    """A field of a part of a recipe.

    Attributes:
        name: What recipes call it.
        takes: What it may be.
        default: What it is where nothing is said; empty where it must be given.
        text: What it means.
    """

    name: str
    takes: str
    default: str
    text: str


@functools.cache
def parts() -> dict[str, type]:
    """Return the parts of recipes and contests that are no component, by what settings call them."""
    from soul.contest.entry import Entry, Knob
    from soul.contest.matrix import Budget, Matrix, Task
    from soul.curvature.ihvp.base import InverseSpec
    from soul.curvature.spec import CurvatureSpec
    from soul.objectives.schedule import RetainSchedule
    from soul.recipe import Recipe

    sections = {name: _dataclass_in(hint) for name, hint in typing.get_type_hints(Recipe).items()}
    found = {"recipe": Recipe} | {name: cls for name, cls in sections.items() if cls and name not in REGISTRIES}
    found |= {"curvature": CurvatureSpec, "retain_schedule": RetainSchedule, "solver": InverseSpec}
    return found | {"contest": Matrix, "task": Task, "entry": Entry, "knob": Knob, "budget": Budget}


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is, or is with others, as ``AdapterSpec | None`` is."""
    return next(
        (x for x in (hint, *typing.get_args(hint)) if isinstance(x, type) and dataclasses.is_dataclass(x)), None
    )


def documented(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and of those it builds on say of each attribute; the nearest counts.

    Example:
        >>> from soul.attacks.relearn import Relearn
        >>> documented(Relearn)["steps"]
        'Its length.'
    """
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        _, *rest = _SECTION.split(inspect.cleandoc(owner.__dict__.get("__doc__") or ""), maxsplit=1)
        name = ""
        for line in (rest[0] if rest else "").splitlines():
            entry = _ENTRY.fullmatch(line)
            if entry:
                name, found[entry[1]] = entry[1], entry[2]
            elif name and line.startswith("        "):
                found[name] += " " + line.strip()
            elif line.strip():
                break  # the next section
    return {name: _plain(text) for name, text in found.items()}


def settings(cls: type) -> list[Setting]:
    """Return the settings of a part, in the order of its fields."""
    texts, hints = documented(cls), typing.get_type_hints(cls)
    return [
        Setting(f.name, _takes(hints[f.name]), _default(f), texts.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def explain(words: list[str], width: int = 100) -> Iterator[str]:
    """Yield the lines that explain parts, components or single settings of these.

    Args:
        words: ``kfac``, ``training``, ``optimizer.kfac``, ``kfac.damping``.
        width: Of a line.

    Raises:
        ValueError: There is no such thing.
    """
    for i, word in enumerate(words):
        if i:
            yield ""
        for kind, cls, chosen in _find(word):
            yield from _part(kind, cls, chosen, width)


def _find(word: str) -> list[tuple[str, type, str]]:
    """Return what a word stands for: its kind, its class, and the setting of it that is asked for."""
    first, _, rest = word.partition(".")
    if first in REGISTRIES:  # optimizer.kfac, or optimizer.lr of whichever has it
        registry, (name, _, deeper) = REGISTRIES[first], rest.partition(".")
        known = registry.names()
        if name not in known and any(name in _names(registry.get(n)) for n in known):
            return [_inside(f"{first} {n}", registry.get(n), rest) for n in known if name in _names(registry.get(n))]
        return [_inside(f"{first} {name}", registry.get(name or first), deeper)]  # or says what there is
    if first in parts():
        return [_inside(first, parts()[first], rest)]
    found = [(f"{r.kind} {first}", r.get(first)) for r in REGISTRIES.values() if first in r.names()]
    if not found:
        near = difflib.get_close_matches(first, [*parts(), *(n for r in REGISTRIES.values() for n in r.names())], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"nothing is called {first!r:.60}.{hint} `soul list` has the names of components; parts are: "
            f"{', '.join(parts())}."
        )
    return [_inside(kind, cls, rest) for kind, cls in found]


def _inside(kind: str, cls: type, path: str) -> tuple[str, type, str]:
    """Follow a path of settings through parts: ``curvature.batch`` of an optimizer."""
    name, _, rest = path.partition(".")
    if name and name not in _names(cls):
        raise ValueError(f"{kind} has no setting {name!r:.60}. It has: {', '.join(_names(cls)) or 'none'}.")
    if not rest:
        return kind, cls, name
    part = _dataclass_in(typing.get_type_hints(cls)[name])
    if part is None:
        raise ValueError(f"{kind} {name} has no settings of its own, so nothing is called {path!r:.80}")
    return _inside(f"{kind} {name}", part, rest)


def _names(cls: type) -> list[str]:
    return [s.name for s in settings(cls)]


def _part(kind: str, cls: type, chosen: str, width: int) -> Iterator[str]:
    yield kind
    about = re.split(r"\n(?:Attributes|Args|Example|Raises):\n", inspect.getdoc(cls) or "")[0]
    for paragraph in [] if chosen else about.strip().split("\n\n"):
        yield ""
        if "::" in paragraph or paragraph.startswith("    "):  # a formula
            yield from textwrap.indent(_plain(paragraph), "  ").splitlines()
        else:
            yield from _wrapped(_plain(paragraph), width, "  ")
    for setting in settings(cls):
        if chosen in ("", setting.name):
            yield ""
            default = f"; default: {setting.default}" if setting.default else "; must be given"
            yield from _wrapped(f"{setting.name}: {setting.takes}{default}", width, "  ")
            yield from _wrapped(setting.text, width, "      ")


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _plain(text: str) -> str:
    return _ROLE.sub(lambda found: found[1] or found[2], text).replace("``", "")


def _takes(hint: Any) -> str:
    """Say what a type takes, in the words of somebody who writes YAML."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(value) or "''" for value in typing.get_args(hint))
    inner = typing.get_args(hint)
    if inner and typing.get_origin(hint) in (list, tuple):
        several = ", ".join(dict.fromkeys(_takes(x) for x in inner if x is not Ellipsis))
        return f"[{several}]"
    if inner and typing.get_origin(hint) is dict:
        return "mapping"
    if inner:  # a union
        return " | ".join(_takes(x) for x in inner)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        called = next((name for name, cls in parts().items() if cls is hint), "")
        if called:
            return f"mapping (`soul explain {called}`)"
        kinds = [r.kind for r in REGISTRIES.values() if all(hint in r.get(n).__mro__ for n in r.names())]
        return f"{kinds[0]}: a name, or a mapping with one" if kinds else "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    tree = config.plain(value)
    if not isinstance(tree, dict):
        return _said(tree)
    if "name" in tree:
        return str(tree["name"])
    usual = config.plain(type(value)()) if dataclasses.is_dataclass(value) and not isinstance(value, type) else {}
    others = [f"{k} {_said(v)}" for k, v in tree.items() if k not in usual or usual[k] != v]
    return ", ".join(others) or ("its own" if usual else "{}")


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"
