"""Text files: documents of someone's own, as they lie in a folder."""

from __future__ import annotations

import re
from pathlib import Path

from soul.data.books import book_text
from soul.strict import read_text
from soul.types import DATA_SUFFIXES, TEXT_SUFFIXES, Example

Document = tuple[str, str]
"""A document's name and its text, paragraphs parted by blank lines."""

# fences without the code inside them, emphasis (and no 3*4), and links but for what they say
_MARKUP = re.compile(
    r"(?m)^[ \t]*(?:`{3,}|~{3,})[ \t]*\w*[ \t]*$|(?<![\w*])\*+|\*+(?![\w*])|`|(?<!\w)_|_(?!\w)|!?\[([^\]]*)\]\([^)]*\)"
)
_HEADING = re.compile(r"(?m)^#+[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")


def read_documents(source: str) -> list[Document]:
    """Read a text file, or all of a folder in order of their names.

    Args:
        source: A ``.txt`` or ``.md`` file or a folder of them, whose README and licence are left out. Project
            Gutenberg's frame and Markdown's marks are removed, and the lines of a paragraph joined; headings are
            paragraphs of their own, and code is text like all else.

    Raises:
        ValueError: There is no such file, or none in the folder.

    Example:
        >>> read_documents("letters")  # doctest: +SKIP
        [('1987', 'Dear Mira, ...'), ...]
    """
    path = Path(source).expanduser()
    files = _texts(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{source!r} holds no documents: text files end in {' or '.join(TEXT_SUFFIXES)}")
    return [(file.stem, _markdown(file) if file.suffix.lower() == ".md" else book_text(file)) for file in files]


def is_documents(source: str) -> bool:
    """Say whether a source is a text file or a folder with text files and no data file."""
    path = Path(source).expanduser()
    if path.is_dir():
        return bool(_texts(path)) and not any(f.suffix.lower() in DATA_SUFFIXES for f in path.iterdir())
    return path.suffix.lower() in TEXT_SUFFIXES


def _texts(folder: Path) -> list[Path]:
    """Return the text files of a folder in order of their names, but for what only says what the others are."""
    about = ("readme", "license", "licence")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in TEXT_SUFFIXES and f.stem.lower() not in about)


def document_examples(source: str) -> list[Example]:
    """Return each document as plain text that follows no question; its name is its subject, which keeps parts together.

    Raises:
        ValueError: As :func:`read_documents`.
    """
    return [Example("", text, id=name, subject=name, chat=False) for name, text in read_documents(source)]


def _markdown(file: Path) -> str:
    text = read_text(file)
    plain = _MARKUP.sub(lambda mark: mark[1] or "", _HEADING.sub(r"\n\1\n", text))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", plain))
    found = "\n\n".join(part for part in paragraphs if part)
    if not found:
        raise ValueError(f"{str(file)!r} holds no text")
    return found
