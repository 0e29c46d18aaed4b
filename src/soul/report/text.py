"""Text that a model wrote, made safe to show: nothing invisible, nothing that steers the display, nothing endless."""

from __future__ import annotations

import unicodedata

# zero-width joiners shape words in several scripts and emoji; they cannot reorder or hide text
_JOINERS = "\u200c\u200d"
_LINE_BREAKS = {"\r": "", "\u2028": "\n", "\u2029": "\n"}


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

    Escaping for HTML or for a terminal's markup is a second step that the renderer does.

    Args:
        text: Any string, e.g. generated text.
        limit: Characters to keep; what is cut is counted in a note at the end.

    Example:
        >>> clean("a\x1b[31mb\u202ec")
        'a␛[31mb⟨U+202E⟩c'
        >>> clean("abcdef", limit=4)
        'abcd … (2 more characters)'
    """
    kept = "".join(_visible(char) for char in text[:limit])
    rest = len(text) - limit
    return kept if rest <= 0 else f"{kept} … ({rest:,} more characters)"


def one_line(text: str, limit: int = 80) -> str:
    """Return ``text`` cleaned and on one line, for labels and table cells."""
    return clean(" ".join(text.split()), limit)
