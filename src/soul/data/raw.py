"""Rows of a file, a folder or a hub data set as they are, for sets whose columns are no single example."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soul.data.sources import check_local, data_files, file_rows, hub_rows, is_hub_id, source_options


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows with where they are, from a source as :func:`soul.data.sources.load_examples` reads it.

    Args:
        source: A file, a folder or a hub id, each with ``",config=...,split=...,limit=...,revision=..."`` behind it
            where needed.

    Raises:
        ValueError: The source cannot be read.

    Example:
        >>> next(read_rows("prompts.jsonl"))  # doctest: +SKIP
        ('prompts.jsonl, line 1', {'prompt': {'text': 'So the king', 'toxicity': 0.1}})
    """
    options: dict[str, Any] = {"split": None, "config": None, "limit": None, "revision": None}
    if "," in source and not Path(source).exists():
        source, options = source_options(source)
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(source):
        found = hub_rows(source, options["split"], options["config"], options["revision"])
    else:
        check_local(source, options["config"], options["revision"])
        found = itertools.chain.from_iterable(file_rows(file) for file in data_files(path, options["split"]))
    return itertools.islice(found, options["limit"])
