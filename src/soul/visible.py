"""Text that somebody else wrote, made safe to show: nothing invisible, nothing that steers, nothing endless."""

from __future__ import annotations

import re
import unicodedata

# zero-width joiners shape words in several scripts and emoji; they cannot reorder or hide text
_JOINERS = "\u200c\u200d"
_LINE_BREAKS = {"\r": "", "\u2028": "\n", "\u2029": "\n"}
_BREAK = re.compile(r"\s*[\n\r\u2028\u2029\x0b\x0c\x85]\s*")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _visible(char: str) -> str:
    """Return ``char``, or what stands for it where it would be invisible or would steer the display."""
    if char in "\n\t" or char in _JOINERS:
        return char
    if char in _LINE_BREAKS:
        return _LINE_BREAKS[char]
    category = unicodedata.category(char)
    if category == "Cs":  # half of a surrogate pair: JSON can carry it, UTF-8 cannot
        return "\ufffd"
    if category in ("Cc", "Cf"):
        code = ord(char)
        if code < 0x20:
            return chr(0x2400 + code)
        return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
    return char


def clean(text: str, limit: int = 1200) -> str:
    r"""Return ``text`` with control, bidirectional and invisible characters made visible, cut after ``limit``.

    Escaping for HTML or Markdown, and keeping a terminal's markup out, is a second step that whoever shows it does.

    Args:
        text: Any string, e.g. generated text.
        limit: Characters to keep; what is cut is counted in a note at the end.

    Example:
        >>> clean("a\x1b[31mb\u202ec")
        'a␛[31mb⟨U+202E⟩c'
        >>> clean("abcdef", limit=4)
        'abcd … (2 more characters)'
    """
    return _cut(text[:limit], max(0, len(text) - limit))


def _cut(kept: str, rest: int) -> str:
    shown = "".join(_visible(char) for char in kept)
    return f"{shown} … ({rest:,} more characters)" if rest else shown


def one_line(text: str, limit: int = 80) -> str:
    """Return ``text`` cleaned and on one line, for labels and table cells."""
    head = text[: 16 * limit]  # of a text of megabytes no more is looked at
    words = " ".join(head.split())
    return _cut(words[:limit], max(0, len(words) - limit) + len(text) - len(head))


def message(text: str, limit: int = 2000) -> str:
    r"""Return a message to a person on one line, its spaces as they are: a path may hold two in a row.

    A message that is too long is cut in the middle: a long name begins it, and what to do ends it.

    Example:
        >>> message("no such file: a  b\n\x1b[2J")
        'no such file: a  b ␛[2J'
        >>> message("a" * 99 + ": no such file", limit=24)
        'aaaaaaaaaa … (89 more characters) … : no such file'
    """
    first, last = limit - 7 * limit // 12, 7 * limit // 12
    if len(text) > limit:
        return f"{message(_cut(text[:first], len(text) - limit), 4 * limit)} … {message(text[-last:], limit)}"
    return clean(_BREAK.sub(" ", text), limit)


def hides(text: str) -> bool:
    r"""Say whether ``text`` holds a character that :func:`clean` would make visible.

    Example:
        >>> hides("Zoë"), hides("a\u202eb")
        (False, True)
    """
    return bool(_HIDDEN.search(text)) or any(
        unicodedata.category(char) in ("Cf", "Zl", "Zp") and char not in _JOINERS for char in set(text) if char > "\x9f"
    )
