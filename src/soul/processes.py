"""One run in several processes: who am I, what only the main one does, and how all of them end together.

A launcher (``accelerate launch``, ``torchrun``) starts the same command several times and tells each its rank. Started
without one, everything here is what it is for a single process, and costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds without a sign of life after which a process is taken for lost."""
_BEAT = 0.5
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """Return how many processes a launcher started this command in; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes that have joined each other.

    Example:
        >>> place()
        (0, 1)
    """
    if "torch" not in sys.modules:  # nobody can have joined
        return 0, 1
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def count() -> int:
    """Return the number of processes that have joined each other."""
    return place()[1]


def is_main() -> bool:
    """Say whether this is the process that writes and speaks: the first one, also before they have joined."""
    return place()[0] == 0 if count() > 1 else launched() == 1 or os.environ["RANK"] == "0"


def join(device: str = "auto") -> None:
    """Join the other processes that a launcher started, if it did; each takes the GPU of its local rank.

    Args:
        device: ``cpu`` to leave GPUs alone.
    """
    if launched() == 1 or count() > 1:
        return
    from accelerate import PartialState

    # One process may measure for hours while the others wait: who is lost is told by its sign of life instead.
    PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    _Watch().start()


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def from_main(do: Callable[[], T]) -> T:
    """Return what ``do`` returns in the main process, in all of them; where it raises, all raise the same.

    Only the main process calls ``do``. Its result travels pickled, so it holds no tensor of a GPU.

    Example:
        >>> from_main(lambda: 1 + 1)
        2
    """
    if count() == 1:
        return do()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = do()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for ever
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def each(do: Callable[[], T]) -> list[T]:
    """Return what ``do`` returns in each process, by rank; where it raises in one, all raise the same."""
    if count() == 1:
        return [do()]
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = do(), None
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for ever
        outcome = None, error
    found = gather(outcome)
    for _, error in found:
        if error is not None:
            raise error
    return cast(list[T], [value for value, _ in found])


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share of ``items``: every one whose position leaves its rank over.

    Example:
        >>> share("abc")
        ['a', 'b', 'c']
    """
    rank, world = place()
    return list(items[rank::world])


def woven(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return what processes made of their :func:`share`, by rank, in the order of the whole.

    Example:
        >>> woven(["ac", "b"])
        ['a', 'b', 'c']
    """
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def is_loss(error: Exception) -> bool:
    """Say whether ``error`` is how the loss of another process shows itself."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "TCPStore"))


def end(code: int, last: Callable[[], Any] | None = None) -> int:
    """Return ``code`` after the last words; of several processes end this one and, where it failed, all others.

    Taking gloo down in an orderly way leaves one process waiting for ever, now and then; so nothing is taken down.

    Args:
        code: Exit code.
        last: Says why, where something failed; called in the first process to fail alone.
    """
    if count() == 1:
        if last and is_main():  # before they have joined, all fail alike
            last()
        return code
    if code == 0:
        wait()
    elif _claim():
        if last:
            last()
    else:  # it ends because another one does
        time.sleep(2 * _BEAT)  # whose word a launcher would cut short, as soon as one has left
        code = 2
    _leave(code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _store() -> Any:
    """Return a client of the store through which the processes found each other."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = int(os.environ["MASTER_PORT"])
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)


def _claim() -> bool:
    """Say whether this process is the first to fail, and tell the others that one has."""
    try:
        return _store().add("soul/failed", 1) == 1
    except Exception:  # noqa: BLE001 - the store went with its process; better said twice than never
        return True


class _Watch(threading.Thread):
    """Shows that this process lives, and ends it where another one failed.

    The main process looks after all others, and they look after it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="soul-watch")

    def run(self) -> None:
        """Look twice a second, for as long as the process lives."""
        store, (rank, world) = _store(), place()
        watched = range(1, world) if rank == 0 else range(1)
        seen = dict.fromkeys(watched, (0, time.monotonic()))
        while True:
            try:
                store.add(f"soul/alive/{rank}", 1)
                failed = store.add("soul/failed", 0) > 0
                beats = {other: store.add(f"soul/alive/{other}", 0) for other in watched}
            except Exception:  # noqa: BLE001 - the store is gone, and so is who kept it
                time.sleep(4 * _BEAT)  # it may be an orderly end, which this process is about to reach as well
                _leave(2)
            if failed:
                time.sleep(4 * _BEAT)  # the process that failed has the word
                _leave(2)
            now = time.monotonic()
            seen = {other: old if old[0] == beats[other] else (beats[other], now) for other, old in seen.items()}
            lost = [other for other, (_, when) in seen.items() if now - when > PATIENCE]
            if lost:
                end(2, functools.partial(_say, f"process {lost[0]} of {world} is lost; the same command goes on"))
            time.sleep(_BEAT)


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
