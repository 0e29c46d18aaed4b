"""How files are written: whole or not at all, on the disk before they are named, and with the version of their form.

A file is written under a name that ends in ``.part`` in the folder where it belongs, flushed to the disk (``fsync`` of
file and folder), and renamed. A kill, a power cut or a full disk therefore leaves the last whole state, and beside it
at most a part, which the next run on that folder removes. Folders (models, checkpoints) are published the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soul.strict import json_value

PART = ".part"
FORMATS: Mapping[str, tuple[int, ...]] = {
    "record": (1,),
    "scores": (1, 2),  # the first is a run's, the second an evaluation's, which says what was measured
    "environment": (1,),
    "anchors": (1,),
    "origins": (1,),
    "checkpoint": (1,),
    "stopped": (1,),
    "trial": (1,),
    "export": (1,),
}
"""Kinds of stored records and the versions of their form that are read."""
_OURS = re.compile(r"(.+\.\d+|.+\.old|saving-\d+|model|before)\.part")  # a browser's film.part is none
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHUT = (errno.EROFS, errno.EACCES, errno.EPERM)


class StorageError(ValueError):
    """The disk did not take what was to be written; what was whole before still is."""


def check_format(kind: str, tree: Mapping[str, Any], where: Path | str) -> int:
    """Return the version of a record's form; all but ``record.json`` have been without a number once, which is 1.

    Raises:
        ValueError: This version of soul does not read it.

    Example:
        >>> check_format("record", {"format": 1}, "record.json"), check_format("scores", {}, "scores.json")
        (1, 1)
    """
    found, known = tree.get("format", None if kind == "record" else 1), FORMATS[kind]
    if type(found) is not int or found not in known:
        allowed = " or ".join(str(version) for version in known)
        raise ValueError(
            f"{where}: format must be {allowed}, not {found!r:.40}; was it written by a newer version of soul? Then "
            "read it with that one"
        )
    return found


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what a disk refuses inside into one message that says what to do.

    Where ``place`` is a folder, much else may happen inside: only what the disk itself says becomes the message.

    Raises:
        StorageError: ``place``, or something in it, could not be written.
    """
    try:
        yield
    except OSError as error:
        if place.is_dir() and not _of_the_disk(error, place):
            raise
        raise StorageError(_said(place, error)) from error
    except Exception as error:
        reason = _reason(str(error))  # safetensors and torch say it in types of their own
        if isinstance(error, ValueError) or not reason:
            raise
        raise StorageError(_said(place, OSError(reason, os.strerror(reason)))) from error


def _of_the_disk(error: OSError, folder: Path) -> bool:
    if error.errno in (*_FULL, errno.EROFS):
        return True
    inside = isinstance(error.filename, (str, Path)) and folder.resolve() in Path(error.filename).resolve().parents
    return error.errno in (*_SHUT, errno.EIO) and inside


def _reason(words: str) -> int:
    """Return the number of the system's error that another library's words mean; 0 where they mean none."""
    for number in (*_FULL, errno.EROFS):
        if os.strerror(number) in words:
            return number
    return errno.EIO if "PytorchStreamWriter" in words or "inline_container" in words else 0


def _said(place: Path, error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    # torch does not say why it could not write: mostly the disk is full
    do = f"see to the disk ({_free(place)})" if error.errno == errno.EIO else "choose another --out"
    if error.errno in _FULL:
        do = f"free some space ({_free(place)}) or lift the limit on it"
    elif error.errno in _SHUT:
        do = f"make {place if place.is_dir() else place.parent} writable, or choose another --out"
    if error.errno in (*_FULL, *_SHUT, errno.EIO):
        do = f"what was written before is whole: {do}; the same command goes on from there"
    return f"cannot write {place}: {reason}; {do}"


def _free(place: Path) -> str:
    for folder in (place, *place.parents):
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    return "how much is free there is unknown"


def part_of(file: Path) -> Path:
    """Return the name under which this process writes ``file`` until it is whole."""
    return file.with_name(f"{file.name}.{os.getpid()}{PART}")


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, and on the disk when this returns.

    Raises:
        StorageError: The disk does not take it; an earlier file of that name is as it was.
    """
    part = part_of(file)
    with writing(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_folder(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text as :func:`write_bytes` does."""
    write_bytes(file, text.encode())


def write_json(file: Path, value: Any) -> None:
    """Write JSON as :func:`write_bytes` does."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines as :func:`write_bytes` does."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(file: Path, row: Mapping[str, Any], *, flush: bool = False) -> None:
    """Add a JSON line; with ``flush`` it is on the disk when this returns.

    Raises:
        StorageError: The disk does not take it; part of it may be there, which :func:`read_lines` leaves out.
    """
    with writing(file), file.open("ab") as stream:
        stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        stream.flush()
        if flush:
            os.fsync(stream.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of JSON objects in a file that is appended to; one that a kill cut short is left out.

    Raises:
        ValueError: A line is no JSON object.
    """
    # split at "\n" alone: JSON strings may hold U+2028, at which splitlines() would cut; the last piece has no end
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        where = f"{file}, line {number}"
        try:
            row = json_value(line.decode(), where, lenient=True) if line.strip() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text (byte {error.start}); soul alone writes this file") from error
        if row is not None:
            if not isinstance(row, dict):
                raise ValueError(f"{where}: must hold an object, not {type(row).__name__}")
            found.append(row)
    return found


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    if os.name == "nt":  # folders cannot be opened there, and NTFS keeps a journal of names
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Put a file, or a folder and all below it, on the disk."""
    if not path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    for below in sorted(path.iterdir()):
        if not below.is_symlink():
            _sync(below)
    sync_folder(path)


def publish(part: Path, place: Path) -> None:
    """Give a file or a folder that is whole its name, all of it on the disk first; one that is there is replaced.

    Raises:
        StorageError: The disk refuses.
    """
    with writing(place):
        _sync(part)
        old = place.with_name(f"{place.name}.old{PART}")
        if place.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        part.replace(place)
        sync_folder(place.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_parts(folder: Path, *, older: float = 0.0) -> None:
    """Remove what kills left half-written in ``folder`` and below, by the names that this library gives.

    Args:
        folder: Nobody else may be at work in it, unless
        older: only what nobody has written to for so many seconds goes.
    """
    for path in sorted(folder.rglob(f"*{PART}")):
        with contextlib.suppress(OSError):
            if not _OURS.fullmatch(path.name) or (older and time.time() - path.stat().st_mtime < older):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """Return the digest of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
