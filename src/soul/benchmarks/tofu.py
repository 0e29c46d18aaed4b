"""TOFU: forget some of 200 invented authors, keep the others, real authors and world facts (arXiv 2401.06121)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np

from soul.benchmarks.base import Benchmark, Rows
from soul.data.sources import load_examples
from soul.metrics import tofu
from soul.metrics.stats import bootstrap_mean, bootstrap_of, ks_margin
from soul.registry import BENCHMARKS
from soul.types import Example, Row, Score

ForgetSet = Literal["forget01", "forget05", "forget10"]
TRAIN_SETS = (
    *("full", "forget01", "forget05", "forget10"),
    *("retain99", "retain95", "retain90"),
    *("holdout01", "holdout05", "holdout10"),
)
_UTILITY_FILES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_UTILITY_NAMES: dict[tofu.Definition, str] = {
    "leaderboard": "model_utility",
    "eval_code": "model_utility_eval_code",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def tofu_train(source: str, name: str) -> list[Example]:
    """Load one of TOFU's training sets, e.g. ``"full"``, ``"forget10"`` or ``"retain90"``.

    Args:
        source: A hub id such as ``"locuslab/TOFU"``, or a folder of JSON Lines files such as ``forget10.json``.
        name: The set; ``holdout*`` are unseen authors that only some copies of the data have.

    Raises:
        ValueError: The name is unknown, or the source is neither a hub id nor a folder that holds the set.

    Example:
        >>> len(tofu_train("locuslab/TOFU", "forget10"))  # doctest: +SKIP
        400
    """
    if name not in TRAIN_SETS:
        raise ValueError(f"unknown TOFU set {name!r}; known: {', '.join(TRAIN_SETS)}")
    return _load(source, name)


@BENCHMARKS.register("tofu")
@dataclasses.dataclass(frozen=True)
class Tofu(Benchmark):
    """TOFU's evaluation: does the model still know the forgotten authors, and everything else?

    On each split ``probability``, ``rougeL_recall`` and ``truth_ratio``, as TOFU tabulates them: the probability of
    real authors and world facts is normalised over the answers offered; the truth ratio is ``min(R, 1/R)`` on forget
    and ``max(0, 1-R)`` elsewhere. Over all: ``model_utility`` (the leaderboard's) and ``model_utility_eval_code``
    where the three utility splits are complete; against a retained model ``forget_quality`` with its KS statistic
    ``forget_quality_ks`` (geometric mean over wrong answers, as both of TOFU's codes) and both again as
    ``*_arithmetic`` (the paper's equation 1). What the definitions are: :mod:`soul.metrics.tofu`.

    Args:
        forget: The forget set: 1, 5 or 10 % of the authors.
        source: Hub id, or a folder with ``forget10_perturbed.json``, ``retain_perturbed.json`` and so on.
        limit: Keep this many rows of each utility set, picked by ``seed``; the forget set stays whole. TOFU's own code
            takes at most the first 300 rows of every set.
        seed: Seed of the pick and of the intervals.
        definition: Whose truth ratio the splits show.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Tofu(forget="forget01").forget
        'forget01'
    """

    citation: ClassVar[str] = "Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs, 2024, arXiv 2401.06121"

    forget: ForgetSet = "forget10"
    source: str = "locuslab/TOFU"
    limit: int | None = None
    seed: int = 0
    definition: tofu.Definition = "leaderboard"

    def __post_init__(self) -> None:
        if self.forget not in get_args(ForgetSet):
            raise ValueError(f"unknown forget set {self.forget!r}; known: {', '.join(get_args(ForgetSet))}")
        if self.definition not in tofu.MEAN_OF:
            raise ValueError(f"unknown definition {self.definition!r}; known: {', '.join(tofu.MEAN_OF)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or left out for all rows; got {self.limit}")

    def splits(self) -> dict[str, list[Example]]:
        """Load ``forget``, ``retain``, ``real_authors`` and ``world_facts`` with their wrong answers."""
        utility = {split: self._pick(_load(self.source, name)) for split, name in _UTILITY_FILES.items()}
        return {"forget": _load(self.source, f"{self.forget}_perturbed"), **utility}

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows; ``reference`` holds the rows of a model trained without the forget set.

        Raises:
            ValueError: There are no rows of any of TOFU's splits, or the reference has none of ``forget``.
        """
        known = [split for split in ("forget", *tofu.UTILITY_SPLITS) if rows.get(split)]
        if not known:
            raise ValueError(f"TOFU scores need rows of forget, {', '.join(tofu.UTILITY_SPLITS)}; got none of them")
        scores = [score for split in known for score in self._split(rows[split], split)]
        if all(rows.get(split) and _complete(rows[split]) for split in tofu.UTILITY_SPLITS):
            for definition, metric in _UTILITY_NAMES.items():
                groups = tofu.utility_groups(rows, definition)
                scores.append(bootstrap_of(tofu.utility_of, groups, metric=metric, seed=self.seed, better="higher"))
        if reference is not None and "forget" in known:
            if not reference.get("forget"):
                raise ValueError("forget quality: the reference has no rows of the forget split")
            sides = rows["forget"], reference["forget"]
            scores += forget_quality_scores(*sides)
            scores += forget_quality_scores(*sides, mean="arithmetic", suffix="_arithmetic")
        return scores

    def _split(self, rows: Sequence[Row], split: str) -> list[Score]:
        return split_scores(
            rows,
            split,
            normalised=split in tofu.NORMALISED_SPLITS,
            forget_side=split == "forget",
            mean=tofu.MEAN_OF[self.definition],
            better=("lower", "lower", "higher") if split == "forget" else ("higher",) * 3,
            seed=self.seed,
        )

    def _pick(self, examples: list[Example]) -> list[Example]:
        if self.limit is None or self.limit >= len(examples):
            return examples
        # the head of one permutation: a smaller limit is a subset of a larger one
        chosen = np.random.default_rng(self.seed).permutation(len(examples))[: self.limit]
        return [examples[i] for i in sorted(chosen)]


def split_scores(
    rows: Sequence[Row],
    split: str,
    *,
    normalised: bool = False,
    forget_side: bool = False,
    mean: tofu.Mean = "geometric",
    better: Sequence[str] = ("higher", "higher", "higher"),
    seed: int = 0,
) -> list[Score]:
    """Return ``probability``, ``rougeL_recall`` and ``truth_ratio`` of one split, each with a bootstrap interval.

    A metric appears where every row has what it needs: a split without generations has no ROUGE, one without wrong
    answers no truth ratio.

    Args:
        rows: The split's rows.
        split: Its name.
        normalised: Take the probability among the answers offered.
        forget_side: Take ``min(R, 1/R)`` rather than ``max(0, 1-R)``.
        mean: Mean over wrong answers in ``R``.
        better: The good direction of the three.
        seed: Seed of the intervals.

    Raises:
        ValueError: ``rows`` is empty.
    """
    probability = tofu.normalised_probability if normalised else tofu.answer_probability
    side = tofu.truth_ratio_forget if forget_side else tofu.truth_ratio_utility
    columns: dict[str, list[float]] = {"probability": [probability(row) for row in rows]}
    if all("rougeL_recall" in row for row in rows):
        columns["rougeL_recall"] = [tofu.rouge(row) for row in rows]
    if all(row.get("wrong_nll") for row in rows):
        columns["truth_ratio"] = [side(tofu.truth_ratio(row, mean)) for row in rows]
    direction: dict[str, str] = dict(zip(("probability", "rougeL_recall", "truth_ratio"), better, strict=True))
    return [
        bootstrap_mean(values, metric=metric, split=split, seed=seed, better=direction[metric])
        for metric, values in columns.items()
    ]


def forget_quality_scores(
    rows: Sequence[Row], reference: Sequence[Row], *, mean: tofu.Mean = "geometric", suffix: str = ""
) -> list[Score]:
    """Return ``forget_quality`` and ``forget_quality_ks``, their names followed by ``suffix``.

    The statistic's interval is :func:`soul.metrics.stats.ks_margin`. The p-value has none: it is itself a statement
    about sampling, and shrinks with more rows for the same distance between the two models.

    Raises:
        ValueError: One side is empty, a row has no wrong answers, or the two sides share no question.
    """
    if rows and reference and {row["prompt"] for row in rows}.isdisjoint(row["prompt"] for row in reference):
        raise ValueError("forget quality: the reference's forget rows share no question with the model's")
    statistic, pvalue = tofu.forget_quality(rows, reference, mean)
    n, margin = min(len(rows), len(reference)), ks_margin(len(rows), len(reference))
    low, high = max(0.0, statistic - margin), min(1.0, statistic + margin)
    return [
        Score(f"forget_quality{suffix}", "forget", pvalue, n, better="higher"),
        Score(f"forget_quality_ks{suffix}", "forget", statistic, n, low, high, method="dkw", better="lower"),
    ]


def numbered(examples: Sequence[Example], name: str) -> list[Example]:
    """Return the examples with ``name:position`` as the id of those that have none, so that rows can be told apart."""
    return [e if e.id else dataclasses.replace(e, id=f"{name}:{i}") for i, e in enumerate(examples)]


def _load(source: str, name: str) -> list[Example]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"{source!r} holds no {path.name}; TOFU's sets are JSON Lines files named after them")
        return numbered(load_examples(path), name)
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source!r} is neither a folder nor a hub id such as 'locuslab/TOFU'")
    return numbered(load_examples(source, config=name, split="train"), name)


def _complete(rows: Sequence[Row]) -> bool:
    return all("rougeL_recall" in row and row.get("wrong_nll") for row in rows)
