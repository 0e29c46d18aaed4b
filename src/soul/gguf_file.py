"""Whether a GGUF file is whole: the same walk through it that a reader makes, with every length held against its size.

The library's reader believes lengths: one that is altered has it count to 2^64.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from soul.intact import BrokenModelError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the value types of fixed size (GGUF specification, ``gguf_metadata_value_type``)."""
_TEXT, _ARRAY, _U32, _U64 = 8, 9, 4, 10
_DEPTH, _DIMENSIONS = 4, 4
_WIDTHS = (".embedding_length", ".feed_forward_length", ".vocab_size", ".attention.head_count", ".attention.key_length")


class _BrokenError(Exception):
    """Says what is wrong with a file."""


def check_gguf(file: Path) -> None:
    """Make sure that a GGUF file (version 2 or 3) is as long as its header says, with sizes that its tensors have.

    Raises:
        ValueError: It is cut short, altered, or no GGUF file.
    """
    size = file.stat().st_size
    try:
        if size < 24:
            raise _BrokenError("it is shorter than a header")
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Walk(content, size).check()
    except _BrokenError as error:
        raise BrokenModelError(
            f"{file} ({size:,} bytes) is cut short, altered or no GGUF file ({error}); download or copy it again"
        ) from error


class _Walk:
    """A place in a file, which moves forward."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self.content, self.size, self.at = content, size, 0

    def take(self, count: int) -> int:
        """Step over so many bytes and return where they begin."""
        start = self.at
        if count > self.size - start:
            raise _BrokenError(f"{count:,} bytes are to follow at byte {start:,}, and {self.size - start:,} do")
        self.at += count
        return start

    def number(self, form: str) -> int:
        """Read a number."""
        return struct.unpack_from(f"<{form}", self.content, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        """Read a text."""
        length = self.number("Q")
        start = self.take(length)
        return self.content[start : start + min(length, 200)]

    def value(self, kind: int, depth: int = 0) -> int | None:
        """Step over a value; one that is a whole number is returned."""
        if kind == _TEXT:
            self.text()
        elif kind == _ARRAY and depth < _DEPTH:
            of, count = self.number("I"), self.number("Q")
            if of in _SIZES:
                self.take(count * _SIZES[of])
            else:
                self.take(0 if count <= self.size else count)  # each takes a byte at least
                for _ in range(count):
                    self.value(of, depth + 1)
        elif kind in (_U32, _U64):
            return self.number("I" if kind == _U32 else "Q")
        elif kind in _SIZES:
            self.take(_SIZES[kind])
        else:
            raise _BrokenError(f"a value of unknown type {kind} at byte {self.at:,}")
        return None

    def check(self) -> None:
        """Walk through the whole file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.content[self.take(4) : 4] != b"GGUF":
            raise _BrokenError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise _BrokenError(f"its version is {version}, and 2 and 3 are read")
        tensors, pairs = self.number("Q"), self.number("Q")
        known: dict[str, int] = {}
        for _ in range(min(pairs, self.size)):
            key, number = self.text().decode("utf-8", "replace"), self.value(self.number("I"))
            if number is not None:
                known[key] = number
        ends, elements = [0], 0
        for _ in range(min(tensors, self.size)):
            name, count = self.text().decode("utf-8", "replace"), self.number("I")
            if count > _DIMENSIONS:
                raise _BrokenError(f"{name!r:.60} has {count} dimensions")
            items = 1
            for _ in range(count):
                items *= self.number("Q")
            kind, offset = self.number("I"), self.number("Q")
            if kind not in GGMLQuantizationType._value2member_map_:
                raise _BrokenError(f"{name!r:.60} is of unknown type {kind}")
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            ends.append(offset + -(-items // block) * size)
            elements += items
        step = known.get("general.alignment", 32) or 32
        begin = -(-self.at // step) * step
        if begin + max(ends) > self.size:
            raise _BrokenError(f"its tensors end at byte {begin + max(ends):,}")
        for key, number in known.items():
            most = tensors if key.endswith(".block_count") else elements if key.endswith(_WIDTHS) else number
            if number > most:
                raise _BrokenError(f"{key:.60} is {number:,}, which its tensors have no room for")
