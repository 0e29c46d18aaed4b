"""One process at a time: locks of the operating system, which go with the process that holds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from soul.stored import remove_parts, writing

LOCK = ".lock"
"""The file in a folder that its process holds a lock on. It stays behind and means nothing by itself."""


@contextlib.contextmanager
def attempt(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to lock ``file``, at once or waiting for who has it; yields whether it is ours until the block ends.

    A lock goes when its process does, however that ends, so that none needs to be cleaned up.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only process that writes into ``folder``, and begin by removing what an earlier one left half-written.

    Of several processes that train together (``RANK``, as torchrun sets it) the first one holds the lock for all.

    Raises:
        ValueError: Another process is at work there, or the folder cannot be written.
        StorageError: The disk refused something inside.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
    if int(os.environ.get("RANK") or 0) > 0:
        with writing(folder):
            yield
        return
    with contextlib.ExitStack() as held:
        try:
            ours = held.enter_context(attempt(folder / LOCK))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
        if not ours:
            raise ValueError(_busy(folder))
        if (folder / "recipe.yaml").is_file():  # a run, not just any folder that was named
            remove_parts(folder)
        try:
            with writing(folder):
                yield
        except BaseException:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:  # it came to nothing
                    (folder / LOCK).unlink()
                    folder.rmdir()
            raise


@contextlib.contextmanager
def alone_at(place: Path) -> Iterator[None]:
    """Be the only process that makes ``place``, which is not there yet: the lock is beside it, and goes at the end.

    Raises:
        ValueError: Another process is at work on it, or nothing can be written there.
        StorageError: The disk refused something inside.
    """
    lock = place.absolute().with_name(f".{place.absolute().name}{LOCK}")
    with contextlib.ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            ours = held.enter_context(attempt(lock))
        except OSError as error:
            raise ValueError(f"cannot write {place}: {error.strerror or error}; choose another --out") from error
        if not ours:
            raise ValueError(_busy(place))
        try:
            with writing(place):
                yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _busy(place: Path) -> str:
    return (
        f"another process is at work in {place}: wait until it has ended (nothing is to be removed by hand, its lock "
        "goes with it), or choose another --out"
    )
