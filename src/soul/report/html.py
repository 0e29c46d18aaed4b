"""Renders run records as one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soul.report import examples, plots, view
from soul.report.page import frame
from soul.report.record import RunRecord
from soul.report.seeds import by_seed
from soul.visible import clean, one_line


def _finalize(value: object) -> object:
    """Clean what a template prints; escaping follows, by the environment. Markup passes: only our own code makes it."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


def _whole(text: str) -> Markup:
    """Return text that is shown verbatim, e.g. a recipe: cleaned at a larger limit, and escaped."""
    return Markup.escape(clean(text, limit=200_000))


def _line(text: object, limit: int = 80) -> str:
    return one_line(str(text), limit)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(line=_line, whole=_whole)
    environment.globals.update(
        colors=len(plots.COLORS),
        number=view.number,
        interval=view.interval,
        duration=view.duration,
        memory=view.memory,
        metric_label=view.metric_label,
        check_summary=view.check_summary,
        changes_of=view.changes_of,
        sentences=view.sentences,
        facts=view.facts,
    )
    return environment


def render_html(runs: Sequence[RunRecord], title: str = "Unlearning report") -> str:
    """Return a self-contained HTML page about one run, or several side by side.

    Args:
        runs: Records of :func:`soul.report.read_run`; at least one.
        title: Title of the page.

    Raises:
        ValueError: If ``runs`` is empty.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    splits = examples.splits_of(runs)
    losses = []
    for index, run in enumerate(runs, start=1):
        svg = plots.loss_plot(run, name=f"loss{index}")
        if svg:
            losses.append((index, run.label, _trusted(svg), ", ".join(plots.other_terms(run))))
    page = _environment().get_template("report.html.j2")
    body = page.render(
        title=title,
        runs=runs,
        asked=list(dict.fromkeys(run.asked for run in runs if run.asked)),
        unlearned=any(run.after for run in runs),
        tables=view.tables_of(runs),
        seeds=by_seed(runs),
        intervals=view.interval_note(runs),
        shares=view.shares_note(runs),
        tradeoff=_trusted(plots.tradeoff_plot(runs)),
        splits=splits,
        examples=examples.prominent(splits),
        losses=losses,
        win_rate=_trusted(plots.win_rate_plot(runs)),
        phases=view.phases_of(runs),
        limits=view.limits(runs, seeds=bool(by_seed(runs))),
    )
    return frame(title, _style(), Markup(body))  # noqa: S704 - the template escapes what it prints


@functools.cache
def _style() -> str:
    sheet = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return sheet + plots.color_rules("background")


def _trusted(svg: str) -> Markup:
    """Mark a plot as markup: it is safe because plots draw numbers only, never a word from a record."""
    return Markup(svg)  # noqa: S704 - see above
