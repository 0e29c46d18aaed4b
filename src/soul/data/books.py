"""A book as a test of memory: its text without a publisher's frame, cut at word boundaries by a tokenizer's count."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from soul.types import Example

Count = Callable[[str], int]
"""How many tokens a text has, e.g. ``lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])``."""

ASKED = "Continue this passage word for word:\n\n{}"
"""How a passage is asked for in a chat, so that there is a question a refusal can answer."""

_FRAME = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
_LAST = re.compile(r"\s*^End of (?:the |this )?Project Gutenberg.*\Z", re.MULTILINE | re.DOTALL)
_MADE = re.compile(r"\A\s*Produced by .*?\n[ \t]*\n", re.DOTALL)
_TRIES = 200  # word boundaries looked at for one where all prompts have exactly the tokens asked for


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of a book that a model may know by heart.

    Attributes:
        id: ``"name:number"``.
        text: The whole piece, prompt and continuation.
        prompts: By number of tokens, the text right before the continuation; the longer ones end with the shorter.
        continuation: What follows, with the white space it begins with.
    """

    id: str
    text: str
    prompts: dict[int, str]
    continuation: str

    def example(self, tokens: int, *, asked: bool = False) -> Example:
        """Return the continuation after the prompt of so many tokens, as plain text or (``asked``) in a chat."""
        prompt, name = self.prompts[tokens], f"{self.id}:{'asked' if asked else 'plain'}:{tokens}"
        if asked:
            return Example(ASKED.format(prompt), self.continuation.strip(), id=name, subject=self.id, ends=False)
        return Example(prompt, self.continuation, id=name, chat=False, subject=self.id, ends=False)


def book_text(path: str | Path) -> str:
    """Read a plain text file: Project Gutenberg's header and licence removed, lines of a paragraph joined.

    Raises:
        ValueError: There is no such file, it is not UTF-8, or nothing is left.

    Example:
        >>> book_text("alice.txt")[:30]  # doctest: +SKIP
        "ALICE'S ADVENTURES IN WONDERLA"
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file {str(path)!r}: a book is a plain text file (.txt, UTF-8)")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    marks = {match.group(1): match for match in _FRAME.finditer(text)}
    start = marks["START"].end() if "START" in marks else 0
    end = marks["END"].start() if "END" in marks else len(text)
    body = _LAST.sub("", _MADE.sub("", text[start:end])) if marks else text
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", body))
    found = "\n\n".join(part for part in paragraphs if part)
    if not found:
        raise ValueError(f"{path}: holds no text")
    return found


def cut_passages(
    text: str,
    count: Count,
    *,
    prompts: Sequence[int] = (50, 100, 200, 300),
    continuation: int = 200,
    first: int = 0,
    limit: int | None = None,
    name: str = "book",
) -> list[Passage]:
    """Cut a text into passages, one after the other, each with prompts of several lengths before one continuation.

    All prompts of a passage end at the same place, so that their continuations are one text and only the length of
    what the model is given differs. Cuts are at word boundaries where every prompt, read on its own, has exactly the
    tokens asked for; where the next 200 words hold no such place, the one that misses by the fewest tokens.

    Args:
        text: A book, see :func:`book_text`.
        count: Tokens of a text, by the tokenizer of the model that is asked.
        prompts: Lengths of the prompts in tokens.
        continuation: Largest length of the continuation in tokens, its leading space included.
        first: Passages to leave out at the start.
        limit: Passages to keep after those; None for all.
        name: First part of the passages' ids.

    Raises:
        ValueError: A length is below 1, or the text is too short for the passages asked for.

    Example:
        >>> count = lambda text: len(text.split())
        >>> cut_passages("a b c d e f g", count, prompts=(1, 2), continuation=2)[0].prompts
        {1: 'b', 2: 'a b'}
    """
    if not prompts or min(prompts) < 1 or continuation < 1:
        raise ValueError(f"prompts and continuation have at least 1 token, got {list(prompts)} and {continuation}")
    words = _Words(text, count)
    found: list[Passage] = []
    at = 0
    while limit is None or len(found) < first + limit:
        cut = _cut(words, at, sorted(prompts))
        if cut is None:
            break
        end = max(cut + 1, words.forward(cut, continuation, lead=True))
        if end == len(words):  # what is left of the book is shorter than a continuation
            break
        starts = {n: words.backward(cut, n, at) for n in sorted(prompts)}
        pieces = {n: words.slice(start, cut) for n, start in starts.items()}
        begin = min(starts.values())
        number = len(found)
        found.append(Passage(f"{name}:{number}", words.slice(begin, end), pieces, words.slice(cut, end, lead=True)))
        at = end
    if len(found) <= first or (limit is not None and len(found) < first + limit):
        wanted = "one passage" if limit is None else f"{limit} passages"
        raise ValueError(
            f"{name}: the text has {max(0, len(found) - first)} passages of {max(prompts)} + {continuation} tokens "
            f"after the first {first}, and {wanted} must be there; give a longer text, or ask for fewer or shorter ones"
        )
    return found[first:]


def pieces(
    passage: Passage, count: Count, *, prompt: int = 50, answer: int = 100, asked: bool = False
) -> list[Example]:
    """Cut a whole passage into examples that follow each other, each given the last words before it.

    The first has the passage's first ``prompt`` tokens as its prompt; together the answers are all the rest. This is
    what objectives train on that act on answers: not one continuation is to be forgotten but the passage.

    Args:
        passage: A passage.
        count: Tokens of a text.
        prompt: Largest length of the prompts in tokens.
        answer: Largest length of the answers in tokens.
        asked: In a chat (:data:`ASKED`) rather than as plain text.

    Raises:
        ValueError: The passage is shorter than the first prompt.
    """
    words = _Words(passage.text, count)
    at = words.forward(0, prompt)
    if not 0 < at < len(words):
        raise ValueError(f"{passage.id} is no longer than {prompt} tokens, which leaves nothing to answer")
    found: list[Example] = []
    while at < len(words):
        end = max(at + 1, words.forward(at, answer, lead=True))
        given, rest = words.slice(words.backward(at, prompt, 0), at), words.slice(at, end, lead=True)
        name = f"{passage.id}:piece:{len(found)}"
        if asked:
            found.append(Example(ASKED.format(given), rest.strip(), id=f"{name}:asked", subject=passage.id, ends=False))
        else:
            found.append(Example(given, rest, id=name, chat=False, subject=passage.id, ends=False))
        at = end
    return found


def plain_passages(lines: Iterable[str], *, limit: int, words: tuple[int, int] = (60, 90)) -> list[Example]:
    """Return paragraphs of running text, evenly spaced through a corpus, for the perplexity of plain text.

    WikiText's tokenised punctuation (``" @-@ "``, ``" ,"``) is mended; headings, paragraphs with ``<unk>`` and short
    ones are left out.

    Args:
        lines: A paragraph each.
        limit: How many are kept.
        words: Least words of a paragraph, and how many of them are kept.

    Raises:
        ValueError: No paragraph is long enough.
    """
    found: list[str] = []
    for line in lines:
        text = re.sub(r" @(.)@ ", r"\1", line.strip())
        text = re.sub(r" ([.,;:!?)'])", r"\1", text).replace("( ", "(")
        split = text.split()
        if not text.startswith("=") and len(split) >= words[0] and "<unk>" not in text:
            found.append(" ".join(split[: words[1]]))
    if not found:
        raise ValueError(f"no paragraph of at least {words[0]} words for the perplexity of plain text")
    n = min(limit, len(found))
    chosen = [found[i * len(found) // n] for i in range(n)]
    return [Example("", text, id=f"text:{i}", chat=False) for i, text in enumerate(chosen)]


def _cut(words: _Words, at: int, prompts: Sequence[int]) -> int | None:
    """Return the word before which prompts that start at ``at`` or later have exactly their tokens, or nearly."""
    first = words.forward(at, prompts[-1])
    best: tuple[int, int] | None = None
    for cut in range(first, min(first + _TRIES, len(words))):
        missed = 0
        for n in prompts:
            start = words.backward(cut, n, at)
            missed += abs(n - words.count(start, cut))
        if cut > at and (best is None or missed < best[0]):
            best = missed, cut
        if best and best[0] == 0:
            break
    return best[1] if best else None


class _Words:
    """The words of a text, and how many of them fit into so many tokens."""

    def __init__(self, text: str, count: Count) -> None:
        self.text, self._count = text, count
        self.spans = [match.span() for match in re.finditer(r"\S+", text)]

    def __len__(self) -> int:
        return len(self.spans)

    def slice(self, start: int, end: int, *, lead: bool = False) -> str:
        """Return the words ``start .. end - 1``, with the white space before them where ``lead``."""
        if start >= end:
            return ""
        begin = self.spans[start - 1][1] if lead and start else self.spans[start][0]
        return self.text[begin : self.spans[end - 1][1]]

    def count(self, start: int, end: int, *, lead: bool = False) -> int:
        return self._count(self.slice(start, end, lead=lead)) if start < end else 0

    def forward(self, start: int, tokens: int, *, lead: bool = False) -> int:
        """Return the largest end for which the words from ``start`` have at most so many tokens."""
        low, high = start, min(len(self), start + tokens)  # a word has at least one token
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(start, middle, lead=lead) <= tokens else (low, middle - 1)
        return low

    def backward(self, end: int, tokens: int, floor: int) -> int:
        """Return the smallest start, not below ``floor``, from which the words to ``end`` fit into so many tokens."""
        low, high = max(floor, end - tokens), end
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.count(middle, end) <= tokens else (middle + 1, high)
        return low
