"""Reads run records and writes reports, without torch: the same record gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soul.report.html import render_html
from soul.report.record import RunRecord, read_run, read_runs
from soul.report.terminal import render_terminal
from soul.stored import write_text

__all__ = ["RunRecord", "read_run", "read_runs", "render_html", "render_terminal", "write_report"]


def write_report(run_dirs: Sequence[Path | str], out: Path | str, title: str = "Unlearning report") -> Path:
    """Write one HTML report about the runs in ``run_dirs`` and return its path.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        run_dirs: Run directories, in the order in which they are to be shown.
        out: The HTML file to write; folders above it are made, an old report is replaced.
        title: Title of the page.

    Raises:
        ValueError: If there is no run, a folder is not a run or its record is broken, or ``out`` is a folder or a file
            that is no page.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the report a file name, e.g. {out / 'report.html'}")
    if out.is_file():
        with out.open("rb") as file:
            if not file.read(15).lower().startswith(b"<!doctype html"):
                raise ValueError(f"{out} is there and is no HTML page, which a report would replace: name another file")
    page = render_html(read_runs(run_dirs), title=title)
    write_text(out, page)
    return out
