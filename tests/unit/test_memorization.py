"""Exact memorization, extraction strength and perplexity against what decoding would do."""

from __future__ import annotations

import itertools
import math

import pytest

from soul.metrics.memorization import answer_matches, exact_memorization, extraction_strength
from soul.metrics.perplexity import perplexity, perplexity_score
from soul.types import Row

ALL = [matches for n in range(1, 7) for matches in itertools.product((0, 1), repeat=n)]


@pytest.mark.parametrize("matches", ALL)
def test_extraction_strength_equals_trying_every_beginning(matches: tuple[int, ...]) -> None:
    fewest = next(k for k in range(len(matches) + 1) if all(matches[k:]))
    assert extraction_strength(matches) == pytest.approx(1 - fewest / len(matches))
    assert exact_memorization(matches) == pytest.approx(matches.count(1) / len(matches))


@pytest.mark.parametrize("matches", [m for m in ALL if len(m) > 1])
def test_compat_equals_public_code(matches: tuple[int, ...]) -> None:
    taken, k = matches[:-1], 0
    for k in range(len(taken)):  # as there: a loop that runs out leaves its last value
        if all(taken[k:]):
            break
    assert extraction_strength(matches, compat=True) == pytest.approx(1 - k / len(taken))
    assert exact_memorization(matches, compat=True) == pytest.approx(taken.count(1) / len(taken))


@pytest.mark.parametrize("length", [1, 2, 4, 10])
def test_public_code_has_a_floor_and_the_definition_has_none(length: int) -> None:
    nothing = [0] * (length + 1)
    assert extraction_strength(nothing) == 0
    assert extraction_strength(nothing, compat=True) == 1 / length


def test_no_tokens_is_an_error() -> None:
    for metric in (exact_memorization, extraction_strength):
        with pytest.raises(ValueError, match=r"at least one token$"):
            metric([])
        with pytest.raises(ValueError, match="besides the last"):
            metric([1], compat=True)


def row(nll: float, tokens: int, subject: str = "") -> Row:
    return {"id": "", "subject": subject, "prompt": "", "answer": "", "nll": nll, "tokens": tokens}


def test_perplexity_weighs_tokens() -> None:
    assert perplexity([1.0, 3.0], [3, 1]) == pytest.approx(math.exp(1.5))
    assert perplexity([800.0], [1]) == math.inf
    assert math.isnan(perplexity([math.nan], [2]))
    for nll, tokens in (([], []), ([1.0], []), ([math.nan], [0])):
        with pytest.raises(ValueError, match="perplexity needs the tokens"):
            perplexity(nll, tokens)


def test_perplexity_of_rows_has_an_interval_over_rows_or_groups() -> None:
    rows = [row(1.0 + 0.1 * (i % 7), 3 + i % 4, f"document {i // 5}") for i in range(40)]
    score = perplexity_score(rows, "text")
    assert score.value == pytest.approx(perplexity([r["nll"] for r in rows], [r["tokens"] for r in rows]))
    assert score.low < score.value < score.high
    assert (score.n, score.better, score.method) == (40, "lower", "bootstrap(2000)")
    grouped = perplexity_score(rows, "text", groups=[r["subject"] for r in rows])
    assert (grouped.value, grouped.n, grouped.method) == (score.value, 40, "bootstrap(2000, 8 groups, widened)")


def test_an_answer_that_is_recited_is_extracted_whether_or_not_the_model_stops_there() -> None:
    row = Row(id="a", subject="", prompt="Who?", answer="Ada", nll=1.0, tokens=4, token_matches=[1, 1, 1, 0], ends=True)
    assert extraction_strength(answer_matches(row)) == exact_memorization(answer_matches(row)) == 1
    row["ends"] = False  # a piece of something longer: its last token is its own
    assert extraction_strength(answer_matches(row)) == 0
    row["token_matches"], row["ends"] = [0], True
    assert answer_matches(row) == [0]
    del row["token_matches"]
    with pytest.raises(ValueError, match="ask for tokens"):
        answer_matches(row)
