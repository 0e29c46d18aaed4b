"""Whether what was to be forgotten is still said: in a greedy answer, or in any of several samples."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from soul.metrics.text import rouge_l_recall

_NO_WORD = re.compile(r"[\W_]+")


def contains(text: str, answer: str) -> bool:
    """Say whether a text holds an answer's words, all of them, in a row.

    Case, accents' encoding and punctuation do not count. The strictest sign of a leak for an answer of few words, and
    no sign at all for a long one, of which a model seldom gives every word.

    Args:
        text: What the model wrote.
        answer: The true answer; one without a letter or digit is in no text.

    Example:
        >>> contains("She lived in ACCRA, Ghana.", "Accra"), contains("Accraville", "Accra")
        (True, False)
    """
    words, wanted = _words(text), _words(answer)
    return bool(wanted.strip()) and wanted in words


def best_rouge(texts: Sequence[str], answer: str) -> float:
    """Return the largest ROUGE-L recall of several texts: what a person gets who asks as often and keeps the best.

    Args:
        texts: Sampled answers.
        answer: The true answer.

    Raises:
        ValueError: There is no text.

    Example:
        >>> best_rouge(["No idea.", "In Accra"], "in Accra, Ghana")
        0.6666666666666666
    """
    if not texts:
        raise ValueError("the best of no samples is not defined; sample at least one answer")
    return max(rouge_l_recall(text, answer) for text in texts)


def _words(text: str) -> str:
    return f" {_NO_WORD.sub(' ', unicodedata.normalize('NFKC', text).casefold()).strip()} "
