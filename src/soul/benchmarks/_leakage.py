"""What is still there after forgetting, beyond answers: membership, memorized tokens, answers that mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from soul.metrics.membership import membership_scores, subjects
from soul.metrics.memorization import answer_matches, exact_memorization, extraction_strength
from soul.metrics.privacy import privleak_score
from soul.metrics.stats import SHARE, bootstrap_mean
from soul.types import Example, Row, Score

Encode = Callable[[Sequence[str]], np.ndarray]
Sides = tuple[Sequence[Row], Sequence[Row]]


def leakage_scores(sides: Sides, reference: Sides | None, *, k: float, seed: int) -> list[Score]:
    """Return AUC and TPR at 1 % FPR of each membership attack and, against a retained model, ``privleak``.

    The retained model is also the reference of the reference attack: it has not seen the forget set. Its own Min-K AUC
    stands beside ``privleak`` (``mia_min_k_auc_of_reference``): it is .5 where the two sets are alike, and ``privleak``
    cannot say it, being -100 for any reference once the model tells the sets apart without an error.

    Args:
        sides: The model's rows of the forget set and of a holdout set.
        reference: The retained model's rows of both.
        k: Share of the tokens that Min-K takes.
        seed: Seed of the intervals.

    Raises:
        ValueError: A side is empty, or the two models' rows are of other examples.
    """
    scores = membership_scores(*sides, reference=reference, k=k, seed=seed)
    if reference is not None and all("token_logps" in row for side in (*sides, *reference) for row in side):
        scores.append(privleak_score(*sides, *reference, k=k, seed=seed))
        theirs = membership_scores(*reference, k=k, seed=seed)
        known = next(score for score in theirs if score.metric == "mia_min_k_auc")
        scores.append(dataclasses.replace(known, metric="mia_min_k_auc_of_reference", better=""))
    return scores


def memorization_scores(rows: Sequence[Row], split: str, *, seed: int) -> list[Score]:
    """Return ``exact_memorization`` and ``extraction_strength`` where all rows know which of their tokens match.

    Args:
        rows: The split's rows.
        split: Its name.
        seed: Seed of the intervals, which are over subjects.
    """
    if not all(row.get("token_matches") for row in rows):
        return []
    matches = [answer_matches(row) for row in rows]
    groups = subjects(rows)
    return [
        bootstrap_mean(
            [measure(found) for found in matches],
            metric=name,
            split=split,
            seed=seed,
            better="lower",
            groups=groups,
            within=SHARE,
        )
        for name, measure in (
            ("exact_memorization", exact_memorization),
            ("extraction_strength", extraction_strength),
        )
    ]


def nearest_is_right(rows: Sequence[Row], examples: Sequence[Example], encode: Encode) -> list[float]:
    """Return 1 for each row whose generation means the right answer rather than one of the wrong ones, else 0.

    ``[cos(e(g), e(right)) > max_j cos(e(g), e(wrong_j))]``, ``e`` the sentence encoder and ``right`` the paraphrased
    answer, or the answer where there is no paraphrase. Other words for the truth count as it, which ROUGE misses.
    Nothing generated is not right, and neither is a tie.

    Args:
        rows: Rows with a generation.
        examples: The examples they are of, in any order.
        encode: From texts to unit vectors (texts, D).

    Raises:
        ValueError: A row has no generation, is of no example, or its example has no wrong answers.
    """
    known = {(e.prompt, e.answer): e for e in examples}
    sets: list[list[str]] = []
    for row in rows:
        example = known.get((row["prompt"], row["answer"]))
        if example is None or not example.wrong_answers:
            raise ValueError(f"row {row['id']!r} is of no example with wrong answers, which embedding accuracy needs")
        if "generated" not in row:
            raise ValueError(f"row {row['id']!r} has no answer: evaluate with generation switched on")
        sets.append([row["generated"], example.paraphrased_answer or example.answer, *example.wrong_answers])
    texts = list(dict.fromkeys(text for found in sets for text in found if text.strip()))
    vectors = dict(zip(texts, encode(texts), strict=True))
    values = []
    for generated, *options in sets:
        if not generated.strip():
            values.append(0.0)
            continue
        right, *wrong = (float(vectors[generated] @ vectors[option]) for option in options)
        values.append(float(right > max(wrong)))
    return values
