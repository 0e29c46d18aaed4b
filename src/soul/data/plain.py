"""Plain passages for the perplexity of running text, from the library's own, WikiText or any text file."""

from __future__ import annotations

from pathlib import Path

from soul.data.books import book_text, plain_passages
from soul.data.raw import read_rows
from soul.data.sources import load_examples
from soul.strict import read_text
from soul.types import Example


def plain_text(source: str, limit: int | None = None) -> list[Example]:
    """Return passages of plain text.

    Args:
        source: ``"general:heldout_text"``; a text file such as WikiText's ``wiki.test.tokens``, of which paragraphs of
            at least 60 words are cut to 90; or a file or hub data set with a column ``text``, its rows taken as such
            paragraphs (``"Salesforce/wikitext,config=wikitext-2-raw-v1,split=test"``).
        limit: Most passages, evenly spaced through the source.

    Raises:
        ValueError: The source cannot be read, or has no passage.

    Example:
        >>> len(plain_text("general:heldout_text", 8))
        8
    """
    if source.startswith(("general:", "people:")):
        return load_examples(source, limit=limit)
    most = limit if limit is not None else 1 << 30
    suffix = Path(source).suffix.lower()
    if suffix == ".tokens":  # WikiText: a paragraph a line
        paragraphs = read_text(Path(source).expanduser()).splitlines()
    elif suffix == ".txt":
        paragraphs = book_text(source).split("\n\n")
    else:
        paragraphs = [text for _, row in read_rows(source) if isinstance(text := row.get("text"), str)]
    return plain_passages(paragraphs, limit=most)
