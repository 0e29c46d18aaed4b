"""Memorization of an answer, told from which of its tokens greedy decoding would choose (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soul.types import Row


def answer_matches(row: Row) -> list[int]:
    """Return ``Row["token_matches"]`` of the answer itself, without the end of turn.

    A model that recites an answer and then says more has leaked it: whether it stops there is no part of that. An
    answer of no tokens keeps its end.

    Raises:
        ValueError: The row has none: its tokens were not asked for.
    """
    matches = row.get("token_matches")
    if not matches:
        raise ValueError(f"row {row['id']!r} has no token_matches: ask for tokens")
    return matches[:-1] if row.get("ends") and len(matches) > 1 else matches


def exact_memorization(matches: Sequence[int], *, compat: bool = False) -> float:
    """Return the share of tokens that are the most likely ones, ``1/T sum_t [argmax_v p(v | x, y_<t) = y_t]``.

    Tirumala et al., arXiv 2205.10770; as an unlearning metric arXiv 2506.12618.

    Args:
        matches: 1 or 0 for each token of the answer (:func:`answer_matches`).
        compat: As OpenUnlearning's code, which leaves out the last token, whichever it is.

    Raises:
        ValueError: There is no token; with ``compat``, no second one.

    Example:
        >>> exact_memorization([1, 0, 1, 1])
        0.75
    """
    return float(np.mean(_taken(matches, compat)))


def extraction_strength(matches: Sequence[int], *, compat: bool = False) -> float:
    """Return ``ES = 1 - k / T``, ``k`` the fewest true tokens after which greedy decoding gives the rest.

    In the spirit of arXiv 2012.07805, defined so in arXiv 2506.12618. 1 where the question alone brings the answer; 0
    where even its last token must be given, as where that is wrong.

    Args:
        matches: 1 or 0 for each token of the answer (:func:`answer_matches`). With an end of turn among them that the
            model does not give, an answer that it recites has 0.
        compat: As OpenUnlearning's code, which leaves out the last token, whichever it is, and never tries ``k = T``:
            nothing is below ``1/T``, and an answer of one (other) token always has 1.

    Raises:
        ValueError: There is no token; with ``compat``, no second one.

    Example:
        >>> extraction_strength([1, 0, 1, 1]), extraction_strength([0]), extraction_strength([0, 1], compat=True)
        (0.5, 0.0, 1.0)
    """
    taken = _taken(matches, compat)
    wrong = np.flatnonzero(taken == 0)
    given = int(wrong[-1]) + 1 if len(wrong) else 0
    strength = 1 - given / len(taken)
    return max(strength, 1 / len(taken)) if compat else strength


def _taken(matches: Sequence[int], compat: bool) -> np.ndarray:
    taken = np.asarray(matches)[: -1 if compat else None]
    if taken.size == 0:
        raise ValueError(f"memorization needs at least one token{' besides the last' if compat else ''}")
    return taken
