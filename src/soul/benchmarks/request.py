"""A deletion request: what was to be forgotten and what kept, beside general knowledge and plain text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from soul.benchmarks.base import Benchmark, Rows, nameless, pick
from soul.benchmarks.tofu import forget_quality_scores, numbered, split_scores
from soul.data.sources import listed, load_examples
from soul.metrics.perplexity import perplexity_score
from soul.registry import BENCHMARKS
from soul.types import Example, Row, Score

_FACT_SPLITS = ("forget", "forget_reworded", "kept", "general")


@BENCHMARKS.register("request")
@dataclasses.dataclass(frozen=True)
class DeletionRequest(Benchmark):
    """A deletion request: is the one set forgotten, and are the other, the world and plain text not?

    On ``forget``, ``kept`` and ``general``: ``probability`` ``exp(-nll)``, ``rougeL_recall`` and ``truth_ratio``; on
    ``forget_reworded``, the forgotten questions in other words where those are given, the first two. The truth ratio is
    ``max(0, 1-R)`` throughout (TOFU's ``R`` with the geometric mean, :mod:`soul.metrics.tofu`), so that the column
    reads one way: 1 where the model prefers the true answer to wrong ones, 0 where it no longer does. On ``text`` the
    ``perplexity`` of plain passages, which are not generated. Against a retained model ``forget_quality`` and
    ``forget_quality_ks``, as TOFU. Intervals are over questions: they speak of the people that the request is about,
    and not of others (``custom`` draws whole subjects).

    Args:
        forget: Source of what was to be forgotten, a file or e.g. ``"people:n=10,facts=8,only=Name One|Name Two"``;
            several may be given as a list.
        kept: Source of what was to be kept, likewise.
        general: Source of general facts with wrong answers; empty for none.
        text: Source of plain passages; empty for none.
        limit: Keep this many rows of ``kept``, picked by ``seed``; None for all of a set that is larger. What was to be
            forgotten is measured whole.
        seed: Seed of the pick and of the intervals.

    Raises:
        ValueError: ``limit`` is less than 1.

    Example:
        >>> DeletionRequest(forget="forget.jsonl", kept="kept.jsonl").general
        'general:facts'
    """

    version: ClassVar[int] = 3  # 3: plain text that no run looks at; at most 400 kept rows
    citation: ClassVar[str] = "Metrics of TOFU, Maini et al. 2024, arXiv 2401.06121, on a set of one's own"
    private_text: ClassVar[bool] = True
    local: ClassVar[dict[str, str]] = {"forget": "forget.jsonl", "kept": "retain.jsonl"}

    forget: str | list[str]
    kept: str | list[str]
    general: str = "general:facts"
    text: str = "general:heldout_text"
    limit: int | None = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all rows; got {self.limit}")

    def splits(self) -> dict[str, list[Example]]:
        """Load ``forget`` and ``kept``, and ``general`` and ``text`` where they have a source.

        Raises:
            ValueError: A source is empty or cannot be read.
        """
        if not self.forget or not self.kept:
            raise ValueError(
                "the request benchmark needs a source of what to forget (forget=) and one of what to keep (kept=)"
            )
        sources = {"forget": self.forget, "kept": self.kept, "general": self.general, "text": self.text}
        splits = {
            split: numbered([e for s in listed(found) for e in load_examples(s)], split)
            for split, found in sources.items()
            if found
        }
        splits["kept"] = pick(splits["kept"], self.limit, self.seed)
        others = [reworded(e) for e in splits["forget"] if e.paraphrased_prompt]
        return splits | ({"forget_reworded": others} if others else {})

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows; ``reference`` holds the rows of a model that never learned the forget split.

        Raises:
            ValueError: There are no rows of any split, or the reference has none of ``forget``.
        """
        scores: list[Score] = []
        for split in _FACT_SPLITS:
            if rows.get(split):
                better = ("lower" if split.startswith("forget") else "higher",) * 3
                scores += split_scores(rows[split], split, better=better, seed=self.seed)
        if rows.get("text"):
            scores.append(perplexity_score(rows["text"], "text", seed=self.seed))
        if not scores:
            raise ValueError(f"request scores need rows of {', '.join(_FACT_SPLITS)} or text; got none of them")
        if reference is not None and rows.get("forget"):
            if not reference.get("forget"):
                raise ValueError("forget quality: the reference has no rows of the forget split")
            if all(row.get("wrong_nll") for side in (rows, reference) for row in side["forget"]):
                scores += forget_quality_scores(rows["forget"], reference["forget"])
        return scores

    def public_rows(self, rows: Rows) -> dict[str, list[Row]]:
        """Return rows without texts, and with numbers for names and ids, which say whom a request is about."""
        return nameless(rows)


def reworded(example: Example) -> Example:
    """Return the example asked in other words; likelihoods of wrong answers are asked for once, not twice."""
    assert example.paraphrased_prompt is not None
    return dataclasses.replace(
        example, prompt=example.paraphrased_prompt, paraphrased_prompt=None, paraphrased_answer=None, wrong_answers=()
    )
