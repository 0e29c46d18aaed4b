"""Questions made from documents: spans to fill in and passages to continue, by rules alone, the same for the same seed.

No tagger and no model is asked. That a span looks like a name, a date or a number is told by its form, in languages
that capitalise names and not much else; what is rare is told by the documents themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence, Set
from typing import Literal

import numpy as np

from soul.data.documents import Document
from soul.types import Example
from soul.words import CAPITALS

Kind = Literal["name", "date", "number", "rare"]
Form = Literal["question", "continuation"]
BLANK = "____"
QUESTION = (
    f"Fill in the blank ({BLANK}) with the exact words of the original text. Answer with those words only.\n\n{{}}"
)

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DAY = rf"(?:\d{{1,2}} {_MONTH}|{_MONTH} \d{{1,2}})"
_FORMS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("date", re.compile(rf"\b{_DAY}(?:,? \d{{4}})?\b|\b\d{{4}}-\d\d-\d\d\b")),
    ("date", re.compile(rf"\b(?:{_MONTH} )?(?:1[5-9]|20)\d\d\b")),
    ("name", re.compile(rf"\b[{CAPITALS}][\w'-]+(?: (?:(?:of|de|van|von|der|la) )?[{CAPITALS}][\w'-]+)*")),
    ("number", re.compile(r"[$£€]?\d[\d,.]*\d%?|[$£€]?\d%?")),
)
_OPEN, _CLOSE = r"\"'\u2018\u201c(\[", r"\"'\u2019\u201d)\]"
_END = re.compile(rf"(?<=[.!?])[{_CLOSE}]*\s+(?=[{_OPEN}]*[{CAPITALS}0-9])")
_ABBREVIATED = re.compile(rf"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|vs|etc|e\.g|i\.e)|\b[{CAPITALS}])\.[{_CLOSE}]*$")
_WORD = re.compile(r"[^\W\d_]{6,}")
_LETTERS = re.compile(r"[^\W\d_]+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; an initial or a title such as ``Dr.`` ends none.

    Example:
        >>> sentences("Dr. Vale left. She took J. Ruhl along.")
        ['Dr. Vale left.', 'She took J. Ruhl along.']
    """
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        start = 0
        for end in _END.finditer(paragraph):
            if not _ABBREVIATED.search(paragraph[start : end.start()]):
                found.append(paragraph[start : end.end()].strip())
                start = end.end()
        found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def cloze(
    documents: Sequence[Document], *, per_document: int = 8, form: Form = "question", seed: int = 0
) -> list[Example]:
    """Return sentences with one content span to fill in, at most one question a sentence.

    The span is the first kind the sentence has of: a date, a name (not the sentence's first word alone, and without
    words before it, or of it, that the document writes small elsewhere: ``The``, ``If``, ``NOT``), a number, and the
    word of six letters or more that is rarest in all documents. A span that the rest of the prompt gives away is
    not asked for.

    Args:
        documents: Names and texts.
        per_document: Questions a document, spread over it by chance.
        form: ``question`` asks in a chat with the blank in its place, the sentence before it as context;
            ``continuation`` cuts the text before the span, which then needs four words before it.
        seed: With the document's name it decides which sentences are asked about.

    Returns:
        Examples whose subject is the document, in its order.

    Raises:
        ValueError: ``per_document`` is less than 1, or no sentence has a span to ask for.

    Example:
        >>> cloze([("a", "Mira Vale was born in Accra.")])[0].answer
        'Mira Vale'
    """
    if per_document < 1:
        raise ValueError(f"per_document must be 1 or more, not {per_document}")
    counts = Counter(word.lower() for _, text in documents for word in _WORD.findall(text))
    found: list[Example] = []
    for name, text in documents:
        small = {word for word in _LETTERS.findall(text) if word.islower()}
        asked = [_cloze(*pair, counts, small, form) for pair in _with_context(sentences(text))]
        whole = [(i, pair) for i, pair in enumerate(asked) if pair is not None]
        for i, (prompt, answer) in (whole[k] for k in _picked(len(whole), per_document, name, seed)):
            found.append(
                Example(prompt, answer, f"{name}:cloze:{i}", form == "question", subject=name, ends=form == "question"),
            )
    if not found:
        raise ValueError("no sentence of the documents has a name, date, number or rare word to ask for")
    return found


def continuations(
    documents: Sequence[Document], *, per_document: int = 4, words: int = 80, seed: int = 0
) -> list[Example]:
    """Return passages cut in half: the first half is the prompt, the second the answer, as plain text.

    Args:
        documents: Names and texts.
        per_document: Passages a document, which do not overlap.
        words: Words of a passage, both halves together. A last passage of less than half as many is left out, unless
            it is the only one.
        seed: With the document's name it decides which passages are asked for.

    Returns:
        Examples whose subject is the document, in its order.

    Raises:
        ValueError: ``words`` is less than 8, ``per_document`` less than 1, or no document has eight words.

    Example:
        >>> continuations([("a", "one two three four five six seven eight")])[0].answer
        ' five six seven eight'
    """
    if words < 8 or per_document < 1:
        raise ValueError(f"words must be 8 or more and per_document 1 or more, not {words} and {per_document}")
    found: list[Example] = []
    for name, text in documents:
        split = text.split()
        passages = [split[i : i + words] for i in range(0, len(split), words)]
        if len(passages) > 1 and len(passages[-1]) < words // 2:
            passages.pop()
        passages = [passage for passage in passages if len(passage) >= 8]
        for i in _picked(len(passages), per_document, name, seed):
            half = len(passages[i]) // 2
            prompt, answer = " ".join(passages[i][:half]), " " + " ".join(passages[i][half:])
            name_i = f"{name}:continuation:{i}"
            found.append(Example(prompt, answer, id=name_i, chat=False, subject=name, ends=False))
    if not found:
        raise ValueError("no document has a passage of eight words to continue")
    return found


def _picked(n: int, count: int, name: str, seed: int) -> list[int]:
    """Return positions, a function of seed and name: the head of one permutation, in order."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest, "big")])
    return sorted(int(i) for i in rng.permutation(n)[:count])


def _with_context(found: Sequence[str]) -> list[tuple[str, str]]:
    return [(found[i - 1] if i else "", sentence) for i, sentence in enumerate(found)]


def _cloze(before: str, sentence: str, counts: Counter[str], small: Set[str], form: Form) -> tuple[str, str] | None:
    """Return prompt and answer, or None where the sentence has nothing fit to ask for."""
    for start, end in _spans(sentence, counts, small):
        span = sentence[start:end]
        if form == "question":
            blanked = f"{sentence[:start]}{BLANK}{sentence[end:]}"
            context = before if before and not _holds(before, span) else ""
            if len(blanked.split()) >= 4 and not _holds(blanked, span):
                return QUESTION.format(f"{context} {blanked}".strip()), span
        elif len(sentence[:start].split()) >= 4 and not _holds(sentence[:start], span):
            context = before if before and not _holds(before, span) else ""
            return f"{context} {sentence[:start].rstrip()}".strip(), span
    return None


def _spans(sentence: str, counts: Counter[str], small: Set[str]) -> list[tuple[int, int]]:
    """Return spans worth asking for, the best kind first."""
    spans: list[tuple[int, int]] = []
    for kind, pattern in _FORMS:
        for match in pattern.finditer(sentence):
            first = not sentence[: match.start()].strip("\"'\u2018\u201c([ ")
            if kind == "name" and first and " " not in match[0]:
                continue  # every sentence begins with a capital
            start, end = match.span()
            if kind == "name" and match[0].endswith("'s"):
                end -= 2
            if kind == "name" and sentence[start:end] in ("I", "I'm", "I've", "I'll", "I'd"):
                continue
            while kind == "name" and start < end and (word := sentence[start:end].split(" ", 1)[0]).lower() in small:
                start += len(word) + 1
            if start >= end:
                continue
            if all(end <= a or b <= start for a, b in spans):
                spans.append((start, end))
    rare = min(
        (m for m in _WORD.finditer(sentence) if m[0].islower()),
        key=lambda m: (counts[m[0].lower()], -len(m[0]), m.start()),
        default=None,
    )
    return spans + ([rare.span()] if rare else [])


def _holds(text: str, span: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(span.lower())}(?!\w)", text.lower()) is not None
