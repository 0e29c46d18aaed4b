"""The record of a contest: one JSON line a job, appended whole, shared by all workers that see the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soul.folderlock import attempt
from soul.metrics.contest import read_lines
from soul.stored import append_line, writing

Line = dict[str, Any]


class Book:
    """Lines of ``trials.jsonl`` in a folder, and who is at work on which.

    A job is claimed by an operating-system lock that goes when its process does, so that a killed worker's job is free
    again at once and none needs to be cleaned up.

    Args:
        folder: The contest's folder.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "trials.jsonl"
        self._locks = folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error

    def lines(self) -> list[Line]:
        """Return what was recorded, in the order of recording; the first of a job counts."""
        return read_lines(self.file)

    def append(self, line: Line) -> None:
        """Add a job's line; one that a kill cut short before it is taken away.

        Raises:
            StorageError: The disk does not take it.
        """
        with self.alone(), writing(self.file):
            if self.file.is_file():
                raw = self.file.read_bytes()
                whole = raw[: raw.rfind(b"\n") + 1]
                if whole != raw:
                    with self.file.open("r+b") as file:
                        file.truncate(len(whole))
            append_line(self.file, {"format": 1, **line}, flush=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other worker writes into the contest's folder, and keep them waiting inside."""
        with attempt(self._locks / "book.lock", wait=True):
            yield

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Try to take a job; yields whether it is ours."""
        with attempt(self._locks / f"{key.replace('/', '~')}.lock") as ours:
            yield ours
