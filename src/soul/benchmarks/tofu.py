"""TOFU: forget some of 200 invented authors, keep the others, real authors and world facts (arXiv 2401.06121)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from soul.benchmarks._leakage import leakage_scores, memorization_scores, nearest_is_right
from soul.benchmarks._tofu_data import TRAIN_SETS, load_set, numbered, tofu_train
from soul.benchmarks.base import Benchmark, Rows, pick
from soul.metrics import tofu
from soul.metrics.membership import subjects
from soul.metrics.stats import SHARE, bootstrap_mean, bootstrap_of, ks_margin
from soul.registry import BENCHMARKS
from soul.types import Ask, Example, Row, Score

__all__ = ["TRAIN_SETS", "Tofu", "forget_quality_scores", "numbered", "split_scores", "tofu_train"]

ForgetSet = Literal["forget01", "forget05", "forget10"]
_UTILITY_FILES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_UTILITY_NAMES: dict[tofu.Definition, str] = {
    "leaderboard": "model_utility",
    "eval_code": "model_utility_eval_code",
}


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

    From the tokens of the forget answers ``exact_memorization`` and ``extraction_strength``
    (:mod:`soul.metrics.memorization`). With a holdout set, authors that nobody was taught, ``mia_<attack>_auc`` and
    ``_tpr_at_fpr_0.01`` of membership inference (:mod:`soul.metrics.membership`) and, against a retained model,
    ``privleak`` (:mod:`soul.metrics.privacy`; Min-K, as MUSE). These come from one pass over answers that are measured
    anyway, and over the holdout answers. ``embedding_accuracy`` asks whether the generated answer is nearest to the
    right one, paraphrased, among it and the wrong ones.

    Intervals are over authors, 20 questions each, where the sets are whole (or name a ``subject``); real authors and
    world facts count one by one, and so do all questions in the KS statistic's margin and p-value.

    Args:
        forget: The forget set: 1, 5 or 10 % of the authors.
        source: Hub id, or a folder with ``forget10_perturbed.json``, ``retain_perturbed.json`` and so on.
        limit: Keep this many rows of each utility set, picked by ``seed``; the forget set stays whole. TOFU's own code
            takes at most the first 300 rows of every set.
        seed: Seed of the pick and of the intervals.
        definition: Whose truth ratio the splits show.
        memorization: Look at the tokens of the forget answers.
        membership: Measure the holdout set, where there is one (:meth:`missing`), and attack.
        holdout: Hub id or folder that holds the holdout set, if another than ``source``.
        min_k: Share of the tokens that both kinds of Min-K take; 0.4 as MUSE and OpenUnlearning.
        gradient_norm: Attack by gradient norms too: a backward pass for each forget and holdout answer.
        embedding: Measure ``embedding_accuracy``, which loads a sentence encoder.
        encoder: Its hub id or folder; empty for :data:`soul.embedding.ENCODER`.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Tofu(forget="forget01").forget
        'forget01'
    """

    version: ClassVar[int] = 3  # 3: memorization without the end of turn; the same questions in both
    citation: ClassVar[str] = "Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs, 2024, arXiv 2401.06121"
    local: ClassVar[dict[str, str]] = {"source": "tofu"}

    forget: ForgetSet = "forget10"
    source: str = "locuslab/TOFU"
    limit: int | None = None
    seed: int = 0
    definition: tofu.Definition = "leaderboard"
    memorization: bool = True
    membership: bool = True
    holdout: str = ""
    min_k: float = 0.4
    gradient_norm: bool = False
    embedding: bool = False
    encoder: str = ""

    def __post_init__(self) -> None:
        if self.forget not in get_args(ForgetSet):
            raise ValueError(f"unknown forget set {self.forget!r}; known: {', '.join(get_args(ForgetSet))}")
        if self.definition not in tofu.MEAN_OF:
            raise ValueError(f"unknown definition {self.definition!r}; known: {', '.join(tofu.MEAN_OF)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or left out for all rows; got {self.limit}")
        if not 0 < self.min_k <= 1:
            raise ValueError(f"min_k must be above 0 and at most 1, not {self.min_k}")
        if self.gradient_norm and not self.membership:
            raise ValueError("gradient_norm=true is an attack and needs membership=true")

    def splits(self) -> dict[str, list[Example]]:
        """Load ``forget``, ``retain``, ``real_authors`` and ``world_facts`` with their wrong answers, and ``holdout``.

        There is no ``holdout`` where it is not asked for or not to be had (:meth:`missing`).
        """
        utility = {
            split: pick(load_set(self.source, name), self.limit, self.seed) for split, name in _UTILITY_FILES.items()
        }
        unseen, _ = self._holdout()
        return {
            "forget": load_set(self.source, f"{self.forget}_perturbed"),
            **utility,
            **({"holdout": unseen} if unseen else {}),
        }

    def asks(self) -> dict[str, Ask]:
        """Ask for the tokens of forget and holdout answers, and for no generation on the latter."""
        unseen, _ = self._holdout()
        forget = Ask(tokens=self.memorization or bool(unseen), gradient_norm=self.gradient_norm and bool(unseen))
        asked = {"forget": forget}
        if unseen:
            asked["holdout"] = Ask(generate=False, tokens=True, gradient_norm=self.gradient_norm)
        return asked

    def missing(self) -> dict[str, str]:
        """Say why there is no membership inference, where it is asked for and its set is not to be had."""
        unseen, reason = self._holdout()
        return {"membership": reason} if self.membership and not unseen else {}

    def _holdout(self) -> tuple[list[Example], str]:
        """Return the holdout set that belongs to the forget set; or nothing, and why."""
        if not self.membership:
            return [], "not asked for"
        try:
            return load_set(self.holdout or self.source, self.forget.replace("forget", "holdout")), ""
        except ValueError as error:
            return [], f"{error}; a copy that has it can be given as holdout="

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
                scores.append(
                    bootstrap_of(
                        tofu.utility_of,
                        groups,
                        metric=metric,
                        seed=self.seed,
                        better="higher",
                        clusters=[subjects(rows[split]) for split in tofu.UTILITY_SPLITS],
                        within=SHARE,
                    )
                )
        if reference is not None and "forget" in known:
            if not reference.get("forget"):
                raise ValueError("forget quality: the reference has no rows of the forget split")
            sides = rows["forget"], reference["forget"]
            scores += forget_quality_scores(*sides)
            scores += forget_quality_scores(*sides, mean="arithmetic", suffix="_arithmetic")
        return scores + self._leakage(rows, reference) + (self._meant(rows) if self.embedding else [])

    def _leakage(self, rows: Rows, reference: Rows | None) -> list[Score]:
        """Return the scores of memorization and membership that the rows allow."""
        scores: list[Score] = []
        if self.memorization and rows.get("forget"):
            scores += memorization_scores(rows["forget"], "forget", seed=self.seed)
        if self.membership and rows.get("forget") and rows.get("holdout"):
            known = None
            if reference is not None and reference.get("holdout"):
                known = reference["forget"], reference["holdout"]
            scores += leakage_scores((rows["forget"], rows["holdout"]), known, k=self.min_k, seed=self.seed)
        return scores

    def _meant(self, rows: Rows) -> list[Score]:
        """Return ``embedding_accuracy`` of the splits that were generated on."""
        from soul.embedding import load_encoder

        encode = load_encoder(self.encoder)
        sets = {"forget": f"{self.forget}_perturbed", **_UTILITY_FILES}
        return [
            bootstrap_mean(
                nearest_is_right(rows[split], load_set(self.source, name), encode),
                metric="embedding_accuracy",
                split=split,
                seed=self.seed,
                better="lower" if split == "forget" else "higher",
                groups=subjects(rows[split]),
                within=SHARE,
            )
            for split, name in sets.items()
            if rows.get(split) and all("generated" in row for row in rows[split])
        ]

    def _split(self, rows: Sequence[Row], split: str) -> list[Score]:
        return split_scores(
            rows,
            split,
            normalised=split in tofu.NORMALISED_SPLITS,
            forget_side=split == "forget",
            mean=tofu.MEAN_OF[self.definition],
            better=("lower", "lower", "higher") if split == "forget" else ("higher",) * 3,
            seed=self.seed,
            grouped=True,
        )


def split_scores(
    rows: Sequence[Row],
    split: str,
    *,
    normalised: bool = False,
    forget_side: bool = False,
    mean: tofu.Mean = "geometric",
    better: Sequence[str] = ("higher", "higher", "higher"),
    seed: int = 0,
    grouped: bool = False,
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
        grouped: Resample whole subjects rather than rows.

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
    groups = subjects(rows) if grouped else None
    return [
        bootstrap_mean(
            values, metric=metric, split=split, seed=seed, better=direction[metric], groups=groups, within=SHARE
        )
        for metric, values in columns.items()
    ]


def forget_quality_scores(
    rows: Sequence[Row], reference: Sequence[Row], *, mean: tofu.Mean = "geometric", suffix: str = ""
) -> list[Score]:
    """Return ``forget_quality`` and ``forget_quality_ks``, their names followed by ``suffix``.

    The statistic's interval is :func:`soul.metrics.stats.ks_margin`. The p-value has none: it is itself a statement
    about sampling, and shrinks with more rows for the same distance between the two models.

    Raises:
        ValueError: One side is empty, a row has no wrong answers, or the two sides are not of the same questions.
    """
    ours, theirs = ({(row["prompt"], row["answer"]) for row in side} for side in (rows, reference))
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"forget quality compares two models on the same questions: {len(ours & theirs)} are in both, "
            f"{len(ours - theirs)} in the model's rows alone and {len(theirs - ours)} in the reference's; evaluate the "
            "reference on the same forget set"
        )
    statistic, pvalue = tofu.forget_quality(rows, reference, mean)
    n, margin = min(len(rows), len(reference)), ks_margin(len(rows), len(reference))
    low, high = max(0.0, statistic - margin), min(1.0, statistic + margin)
    return [
        Score(f"forget_quality{suffix}", "forget", pvalue, n, better="higher"),
        Score(f"forget_quality_ks{suffix}", "forget", statistic, n, low, high, method="dkw", better="lower"),
    ]


def _complete(rows: Sequence[Row]) -> bool:
    return all("rougeL_recall" in row and row.get("wrong_nll") for row in rows)
