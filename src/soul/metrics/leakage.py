"""Whether what was to be forgotten is still said: in a greedy answer, or in any of several samples."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from soul.metrics.text import rouge_l_recall
from soul.words import words

_DIGITS = re.compile(r"\d+(?:[.,]\d+)+")
_NUMBER = re.compile(r"\d+\.\d+|\d+,\d{1,3}|\d{1,3}(?:[.,]\d{3})+(?:[.,]\d+)?")  # not 3.5.1987, nor May 3,1987

_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,]|\.\d{3})")
_BETWEEN = re.compile(r"[ \u2009.,/()\-\u2010-\u2015]{0,3}")  # what a long number is grouped by
_LONG = re.compile(r"\+?\d{7,}")


def contains(text: str, answer: str) -> bool:
    """Say whether a text holds an answer's words, all of them, in a row.

    Case, accents' encoding and punctuation do not count, but a number ends where it ends: "1.50" and "1,500" hold no
    "50" and no "500". Words are :func:`soul.words.words`; in scripts without spaces between words, and in Korean, any
    run of the answer's characters will do. A number of seven digits or more, such as a telephone or an account has, is
    found however it is grouped, and so are thousands: "1,500" in "1500". The strictest sign of a leak for an answer of
    few words, and no sign at all for a long one, of which a model seldom gives every word, nor for a word that the
    model inflects.

    Args:
        text: What the model wrote.
        answer: The true answer; one without a letter or digit is in no text.

    Example:
        >>> contains("She lived in ACCRA, Ghana.", "Accra"), contains("Accraville", "Accra")
        (True, False)
        >>> contains("她出生在加纳的阿克拉。", "阿克拉"), contains("It cost $50.", "50"), contains("1.50 in all", "50")
        (True, True, False)
        >>> contains("Call 555-12 34.", "5551234"), contains("It cost 1500.", "1,500")
        (True, True)
    """
    digits = _BETWEEN.sub("", unicodedata.normalize("NFKC", answer).strip())
    if _LONG.fullmatch(digits):
        spaced = "".join(rf"{digit}(?:{_BETWEEN.pattern})" for digit in digits[:-1]) + digits[-1]
        return re.search(rf"(?<!\d){spaced}(?!\d)", unicodedata.normalize("NFKC", text)) is not None
    return _holds(text, answer) or _holds(_compact(text), _compact(answer))


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


def _holds(text: str, answer: str) -> bool:
    wanted = re.split("[ _]", _line(answer))
    return wanted != [""] and re.search(f" {'[ _]'.join(wanted)} ", f" {_line(text)} ") is not None


def _compact(text: str) -> str:
    """Return the text with thousands written without commas."""
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)


def _line(text: str) -> str:
    """Return the words of a text, parted by a space, or by an underscore within a number."""
    plain = unicodedata.normalize("NFKC", text).replace("_", " ")
    return " ".join(words(_DIGITS.sub(lambda m: re.sub("[.,]", "_", m[0]) if _NUMBER.fullmatch(m[0]) else m[0], plain)))
