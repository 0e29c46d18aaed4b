"""What the command line writes to a terminal: words of others go through :mod:`soul.visible`."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from soul import processes
from soul.visible import message


def say(text: str, *, lead: str = "", style: str = "", error: bool = False, everywhere: bool = False) -> None:
    """Print one line, of which no part is read as markup or as a command to the terminal.

    Args:
        text: The line.
        lead: What comes before it, in ``style``.
        style: A style of rich.
        error: Print to standard error.
        everywhere: Print in every process; else the main one speaks for all.
    """
    if not (everywhere or processes.is_main()):
        return
    line = Text.assemble((lead, style), " ", message(text)) if lead else Text(message(text), style=style)
    Console(stderr=error, highlight=False).print(line, soft_wrap=True)


def fail(text: str) -> None:
    """Print an error, of whatever process."""
    say(text, lead="error:", style="bold red", error=True, everywhere=True)


def warn(text: str) -> None:
    """Print a warning."""
    say(text, lead="warning:", style="bold yellow", error=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[Any]:
    """Show one bar for each thing that is under way; yields the function that moves them.

    Of several processes the main one shows how far it has come itself.
    """
    if not processes.is_main():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tick(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(message(what, 80), total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tick


class _Said(logging.Handler):
    """Shows log records as warnings: their words quote file names and examples."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        warn(record.getMessage())


@contextlib.contextmanager
def safe_terminal() -> Iterator[None]:
    """Within it, warnings and logs are shown like all else, and no character stops a stream that cannot write it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # somebody put something else in its place
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper has it
    handler = _Said()
    logger = logging.getLogger("soul")
    logger.addHandler(handler)

    def show(text: Warning | str, category: type[Warning], *_where: Any, **_more: Any) -> None:
        warn(f"{text} ({category.__name__})")

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)


def quiet() -> None:
    """Silence transformers' notices that a person of this command line cannot act on."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
