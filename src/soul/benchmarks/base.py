"""What a benchmark is: sets of examples, and how measurements on them add up to scores."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from soul.types import Example, Row, Score

Rows = Mapping[str, Sequence[Row]]


@dataclasses.dataclass(frozen=True)
class Benchmark(abc.ABC):
    """Named splits and their aggregation. Fields are the settings a recipe or the command line may change."""

    name: ClassVar[str]
    citation: ClassVar[str] = ""
    generates: ClassVar[bool] = True

    @abc.abstractmethod
    def splits(self) -> dict[str, list[Example]]:
        """Load the evaluation sets, by split name (e.g. ``forget``, ``retain``, ``real_authors``, ``world_facts``)."""

    @abc.abstractmethod
    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate measured rows; ``reference`` holds the rows of a retained model, where a metric needs one."""
