"""What a limit cut off: said in its row, and of all rows to the reader of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soul.types import Row

_SAID = {
    "prompt": "had a prompt longer than max_length, and lost its beginning: raise max_length",
    "likelihood": "have likelihoods of a text that lost its end (evaluation.max_length, or the model's positions)",
    "generated": "were answered in fewer tokens than the true answer has (evaluation.max_new_tokens, or the model's "
    "positions): what is recited of it is underestimated",
    "samples": "were sampled in fewer tokens than the true answer has (evaluation.max_new_tokens, or the model's "
    "positions): what is recited of it is underestimated",
}


def mark(row: Row, part: str, cut: bool) -> None:
    """Add a part, one of those that :class:`soul.types.Row` names, to what of a row was cut."""
    assert part in _SAID
    if cut:
        row["truncated"] = sorted({*row.get("truncated", ()), part})


def truncation_warnings(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Say of which splits how many rows were cut, and by what.

    Example:
        >>> row = Row(id="a", subject="", prompt="Who?", answer="Ada", nll=1.0, tokens=2, truncated=["likelihood"])
        >>> truncation_warnings({"forget": [row]})[0][:50]
        'forget: 1 of 1 items have likelihoods of a text th'
    """
    found: list[str] = []
    for split, items in rows.items():
        for part, said in _SAID.items():
            count = sum(part in row.get("truncated", ()) for row in items)
            if count:
                found.append(f"{split}: {count} of {len(items)} items {said}")
    return found


def training_cuts(lost: Mapping[str, Sequence[int]]) -> list[str]:
    """Say of which sets how many rows ``training.max_length`` cut, given the tokens that each row lost.

    Example:
        >>> training_cuts({"forget": [0, 7], "retain": [0]})
        ['forget: 1 of 2 items are longer than training.max_length: the rest of each was not trained on']
    """
    found = []
    for name, rows in lost.items():
        if count := sum(tokens > 0 for tokens in rows):
            what = "items are longer than training.max_length: the rest of each was not trained on"
            found.append(f"{name}: {count} of {len(rows)} {what}")
    return found
