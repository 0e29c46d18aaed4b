"""What a method is: model, data -> model, where there is no loss for the trainer to step on."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from soul.data.batches import UnlearnDataset
from soul.registry import Named
from soul.stored import append_line, write_lines

Progress = Callable[[str, int, int], None]
Log = Callable[[Mapping[str, float]], None]


def silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def unheard(_record: Mapping[str, float]) -> None:
    """Keep no log."""


def json_lines(path: Path) -> Log:
    """Return a log that writes one JSON line a record to ``path``, which is begun anew."""
    write_lines(path, [])

    def log(record: Mapping[str, float]) -> None:
        append_line(path, record)

    return log


@dataclasses.dataclass(frozen=True)
class Method(Named, abc.ABC):
    """Hyper-parameters of a method, with one verb: ``method(model, data) -> model``.

    It replaces objective, optimizer and training loop; data, adapters, saving and evaluation stay as they are.
    Randomness comes from ``data.seed``, and the device is the model's.

    Example:
        >>> data = UnlearnDataset(template, forget, retain, method.views)  # doctest: +SKIP
        >>> model = method(model, data, log=records.append)  # doctest: +SKIP
    """

    views: ClassVar[tuple[str, ...]] = ("forget", "retain")
    """The sets it looks at, and so cannot do without."""
    changes_weights: ClassVar[bool] = True
    """Whether forgetting is in the weights: where it is not, it is in what the tokenizer carries."""

    replaces_weights: ClassVar[bool] = False
    """Whether it begins from weights other than the model's, which then say nothing about the result."""

    def warnings(self) -> list[str]:
        """Return what a reader of the result must know; nothing by default."""
        return []

    def check(self, model: Any) -> None:
        """Find out what would make the method fail, before anything is measured; nothing by default.

        Raises:
            ValueError: The method cannot do with this model, or lacks a setting.
        """

    @abc.abstractmethod
    def __call__(self, model: Any, data: UnlearnDataset, *, progress: Progress = silent, log: Log = unheard) -> Any:
        """Return a model that has forgotten; it may be the one given, changed in place.

        Args:
            model: A causal language model, with or without adapters; only what is trainable changes.
            data: The two sets, tokenised.
            progress: Called with (what, done, of).
            log: Called with the record of each step: ``step``, ``seconds``, and what the method measured.
        """
