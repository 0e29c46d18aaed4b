"""Turns a name into a class, and nothing else.

A component registers itself in its own file. Built-in components are found by importing the modules of their
package; others come from installed distributions through entry points (group ``soul.objectives`` and so on),
so that adding one never needs a fork.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound=type)
log = logging.getLogger(__name__)


class Named:
    """What has a name: the one it is registered under, until then that of its class."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = vars(cls).get("name", cls.__name__)


class Registry:
    """Names of one kind of component.

    Args:
        kind: What a person calls one of them, e.g. ``"objective"``.
        package: The package whose modules hold the built-in ones; also the entry-point group.

    Example:
        >>> sorted(OBJECTIVES.names())[:3]
        ['altpo', 'ap', 'ceu']
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type] = {}
        self._loaded = False
        self._broken: set[str] = set()

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that files the class under ``name`` and stores the name on it."""

        def decorate(cls: C) -> C:
            there = self._classes.get(name)
            if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is registered twice: give yours another name")
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]  # a class attribute that every component carries
            return cls

        return decorate

    def get(self, name: str) -> type:
        """Return the class of ``name``.

        Raises:
            ValueError: Unknown name; the message lists the known ones and the nearest.
        """
        self._load()
        if name not in self._classes:
            close = difflib.get_close_matches(name, self._classes, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(self.names())}.")
        return self._classes[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load()
        return sorted(self._classes)

    def summary(self, name: str) -> str:
        """Return the first line of the component's docstring."""
        return (inspect.getdoc(self.get(name)) or "").split("\n", 1)[0]

    def summaries(self) -> dict[str, str]:
        """Return the first line of each component's docstring, sorted by name.

        Built-in ones are read from their sources, not imported, which would take seconds for the sake of a list.
        """
        found = {name: summary for file in self._sources() for name, summary in _declared(file.read_text("utf-8"))}
        for name, cls in self._classes.items():
            found.setdefault(name, (inspect.getdoc(cls) or "").split("\n", 1)[0])
        for point in entry_points(group=self.package):
            if point.name not in found:
                cls = self._from(point)
                if cls is not None:
                    found[point.name] = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        return dict(sorted(found.items()))

    def _from(self, point: EntryPoint) -> type | None:
        """Return the class of an installed distribution; None, with a warning, where that cannot be imported."""
        try:
            return point.load()
        except Exception as error:  # noqa: BLE001 - code of others raises what it likes
            if point.name not in self._broken:
                self._broken.add(point.name)
                of = point.dist.name if point.dist else "?"
                log.warning(
                    "the %s %s of the package %s (%s) cannot be imported and is left out: %s: %s",
                    self.kind, point.name, of, point.value, type(error).__name__, error,
                )  # fmt: skip
            return None

    def _sources(self) -> list[Path]:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        assert spec.submodule_search_locations
        return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.py"))

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            if point.name not in self._classes:
                cls = self._from(point)  # which may register itself, as the library's own do
                if cls is not None and self._classes.get(point.name) is not cls:
                    self.register(point.name)(cls)
        self._loaded = True  # last: where a module fails, the next look fails too, and does not find half of them


def _declared(source: str) -> Iterator[tuple[str, str]]:
    """Yield name and first docstring line of each class that a source text decorates with ``….register("name")``."""
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for call in node.decorator_list:
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "register"
                and isinstance(call.args[0], ast.Constant)
            ):
                yield str(call.args[0].value), (ast.get_docstring(node) or "").split("\n", 1)[0]


OBJECTIVES = Registry("objective", "soul.objectives")
OPTIMIZERS = Registry("optimizer", "soul.optim")
BENCHMARKS = Registry("benchmark", "soul.benchmarks")
METHODS = Registry("method", "soul.methods")
ATTACKS = Registry("attack", "soul.attacks")
