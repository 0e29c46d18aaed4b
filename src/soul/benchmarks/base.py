"""What a benchmark is: sets of examples, and how measurements on them add up to scores."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from soul.types import Ask, Example, Row, Score

Rows = Mapping[str, Sequence[Row]]
T = TypeVar("T")
PRIVATE = "(private)"


@dataclasses.dataclass(frozen=True)
class Benchmark(abc.ABC):
    """Named splits and their aggregation. Fields are the settings a recipe or the command line may change.

    Attributes:
        name: What the registry calls it.
        version: Raised by every change of splits, measurements or definitions, so that scores are compared with their
            like.
        citation: Whose benchmark it is.
        generates: Whether it needs generated answers.
        longest: Tokens of its longest text; a lower limit of an evaluation gives way. 0 where any will do.
        private_text: Whether its texts may not be published (see :meth:`public_rows`).
        local: Setting -> where in a folder of data its copy is looked for; ``{other}`` stands for another setting.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    citation: ClassVar[str] = ""
    generates: ClassVar[bool] = True
    longest: ClassVar[int] = 0
    private_text: ClassVar[bool] = False
    local: ClassVar[dict[str, str]] = {}

    @abc.abstractmethod
    def splits(self) -> dict[str, list[Example]]:
        """Load the evaluation sets, by split name (e.g. ``forget``, ``retain``, ``real_authors``, ``world_facts``)."""

    def asks(self) -> dict[str, Ask]:
        """Return what to measure, by split; a split that is not named gets ``Ask()``."""
        return {}

    def missing(self) -> dict[str, str]:
        """Return what cannot be measured with the data at hand, by part, and why."""
        return {}

    def check_prompt(self) -> None:  # noqa: B027 - most benchmarks say it
        """Make sure that a prompt which the tokenizer carries can be said before all that is asked.

        Raises:
            ValueError: It cannot.
        """

    @abc.abstractmethod
    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate measured rows; ``reference`` holds the rows of a retained model, where a metric needs one."""

    def public_rows(self, rows: Rows) -> dict[str, list[Row]]:
        """Return rows for a record that others may read.

        The rows themselves, unless the benchmark's texts are private: then a digest stands for each text, and values
        of single tokens, which say much about a text, are left out.
        """
        return {split: [hashed(row) if self.private_text else row for row in found] for split, found in rows.items()}


def pick(examples: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Return ``limit`` of the items in their order, chosen by ``seed``; all of them where there is no limit.

    The head of one permutation: a smaller limit is a subset of a larger one.

    Example:
        >>> len(pick([Example("", str(i)) for i in range(9)], 4, seed=0))
        4
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[i] for i in sorted(chosen)]


def digest(text: str) -> str:
    """Return ``sha256:`` and the hexadecimal digest of the text in UTF-8."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def hashed(row: Row, stand_in: Callable[[str], str] = digest) -> Row:
    """Return the row with ``sha256:...`` for each text that is not empty, and without the values of single tokens.

    Args:
        row: The row.
        stand_in: What to put in a text's place.

    Example:
        >>> row = Row(id="a", subject="", prompt="Who?", answer="Ada", nll=1.0, tokens=2)
        >>> hashed(row)["answer"][:20]
        'sha256:99a563ab2f6e2'
    """
    kept: dict[str, Any] = {
        name: value for name, value in row.items() if name != "of" and not name.startswith("token_")
    }
    for name in ("prompt", "answer", "generated"):
        if name in kept:
            kept[name] = stand_in(kept[name]) if kept[name] else ""
    if "samples" in kept:
        kept["samples"] = [stand_in(text) if text else "" for text in kept["samples"]]
    return cast("Row", kept)


_LIKELIHOODS = ("nll", "paraphrased_nll", "wrong_nll")


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else round(value, 1)


def nameless(rows: Rows) -> dict[str, list[Row]]:
    """Return rows without texts, names and digests: whoever tries dates or names would find them by their digests.

    Ids and subjects are numbered in the order of their first appearance over all splits, so that the same subject has
    the same number everywhere and intervals can be computed again, as near as likelihoods to a tenth of a nat let them:
    in full they are digests too, for whoever has the model.

    Example:
        >>> row = Row(id="Ada 7", subject="Ada", prompt="Who?", answer="Ada", nll=1.0, tokens=2)
        >>> nameless({"forget": [row]})["forget"][0]["answer"]
        '(private)'
    """
    ids: dict[str, str] = {}
    subjects = {"": ""}
    public: dict[str, list[Row]] = {}
    for split, found in rows.items():
        public[split] = [hashed(row, lambda _: PRIVATE) for row in found]
        for row, kept in zip(found, public[split], strict=True):
            told: dict[str, Any] = kept  # pyright: ignore[reportAssignmentType]  # of a row whichever it has
            told |= {name: _rounded(told[name]) for name in _LIKELIHOODS if name in told}
            kept["id"] = ids.setdefault(row["id"], str(len(ids) + 1))
            kept["subject"] = subjects.setdefault(row["subject"], str(len(subjects)))
    return public


@runtime_checkable
class Measures(Protocol):
    """A benchmark that runs the model itself, through a library that knows its tasks."""

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        *,
        spec: Any,
        folder: Path | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, list[Row]]:
        """Return rows by split; with a ``folder``, write ``<split>.jsonl`` there and read back what is there already.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            spec: Batch sizes and lengths, a :class:`soul.evaluate.EvaluationSpec`.
            folder: Where rows are kept.
            progress: Called with (what, done, of).
        """
        ...
