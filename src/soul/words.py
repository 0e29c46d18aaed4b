"""What a word is, in any script."""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao; Burmese; Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"  # CJK
)
_MARKS = r"[^\w\s]*"  # of what is left beside letters, digits and spaces: vowel signs, tones, accents
_ALONE = rf"(?!\d)[{_UNSPACED}]"
_WORD = re.compile(rf"{_ALONE}{_MARKS}|(?:(?!{_ALONE})\w{_MARKS})+")


def _capitals() -> str:
    """Return what a name begins with, as a part of a character class: capital and title letters of all scripts."""
    found = [c for c in range(0x10000) if chr(c).isupper() or chr(c).istitle()]
    ranges = [[found[0], found[0]]]
    for c in found[1:]:
        if c == ranges[-1][1] + 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return "".join(f"{chr(a)}-{chr(b)}" if a < b else chr(a) for a, b in ranges)


CAPITALS = _capitals()
"""Capital letters, for a character class: ``rf"[{CAPITALS}]"``. Scripts without case have none."""


class _Blanks(dict[int, "int | str"]):
    """Code points that are neither letter, mark, digit nor underscore to spaces, found out as they turn up."""

    def __missing__(self, code: int) -> int | str:
        kind = unicodedata.category(chr(code))[0]
        self[code] = code if kind in "LMN" or code == ord("_") else " "
        return self[code]


_BLANKS = _Blanks()


def words(text: str) -> list[str]:
    """Return the words of a text, compatibility forms and case folded, without punctuation.

    Letters, digits and underscores in a row are a word, with the marks that belong to them. Scripts that put no space
    between words are taken apart: there a character is one, in Chinese, Japanese, Thai, Lao, Khmer and Burmese, and in
    Korean, whose particles follow a word without a space.

    Example:
        >>> words("The  Poet's prize, 1987!"), words("阿克拉 2.")
        (['the', 'poet', 's', 'prize', '1987'], ['阿', '克', '拉', '2'])
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"\w+", folded) if folded.isascii() else _WORD.findall(folded.translate(_BLANKS))
