"""Plots as SVG text: no global state, no words from outside, the same bytes for the same numbers.

Nothing that a person or a model wrote is drawn; runs are told apart by number and colour, and the page names them. A
label can then neither break the SVG nor need a font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from soul.report.record import RunRecord
from soul.report.view import Model, kind_of, models_of, split_order
from soul.types import Score

# told apart by people who see few colours (Okabe and Ito), dark enough for white ground
COLORS = ("#0b66a8", "#c2410c", "#0f766e", "#a21caf", "#7a5c00", "#4b5563")
_INK = "#374151"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # looks the same everywhere and needs no font
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "white",
    "legend.frameon": False,
}
_TERMS = ("loss", "forget", "retain", "kl")
_POINTS = 300


def color_of(run: int) -> str:
    """Return the colour of run number ``run``; the model as it came (0) is grey."""
    return "#6b7280" if run == 0 else COLORS[(run - 1) % len(COLORS)]


def color_rules(what: str) -> str:
    """Return style rules that give ``what`` the colour of a run: classes ``c0``, ``c1`` and so on, in order."""
    return "".join(f".c{i} {{ {what}: {color}; }}\n" for i, color in enumerate(COLORS))


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as SVG for a page that holds others: no prolog or style sheet, ids start with ``name``."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"soul-{name}", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # a style sheet inside an inline SVG applies to the whole page; the attributes say the same, here only
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, count=1, flags=re.S)
    svg = re.sub(r' style="([^"]*)"', _attributes, svg)
    svg = svg.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" aria-hidden="true" ', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg).strip() + "\n"


def _attributes(style: re.Match[str]) -> str:
    """Return a style's declarations as presentation attributes (SVG 1.1, 6.3): the page's policy allows no styles."""
    pairs = (declaration.partition(":") for declaration in style[1].split(";") if declaration.strip())
    return "".join(f' {name.strip()}="{value.strip()}"' for name, _, value in pairs)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _error(score: Score) -> tuple[list[float], list[float]] | None:
    if not (math.isfinite(score.low) and math.isfinite(score.high)):
        return None
    # an interval need not hold its point estimate; an error bar cannot have a negative length
    return [max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]


def _kept_score(model: Model, metric: str) -> Score | None:
    if metric == "model_utility":
        return next((score for (name, _), score in sorted(model.scores.items()) if name == metric), None)
    return _split_score(model, "kept")


def _split_score(model: Model, kind: str) -> Score | None:
    splits = sorted((split for name, split in model.scores if name == "probability"), key=split_order)
    return next((model.scores["probability", split] for split in splits if kind_of(split) == kind), None)


def tradeoff_points(runs: Sequence[RunRecord]) -> tuple[str, list[tuple[Model, Score, Score]]]:
    """Return the metric of the x axis and ``(model, kept, forget)`` for each model that has both.

    Kept probability where every model has it, model utility otherwise: one axis must mean one thing.
    """
    models = [model for model in models_of(runs) if _split_score(model, "forget")]
    choices = []
    for metric in ("probability", "model_utility"):
        points = []
        for model in models:
            kept, forget = _kept_score(model, metric), _split_score(model, "forget")
            if kept and forget and math.isfinite(kept.value) and math.isfinite(forget.value):
                points.append((model, kept, forget))
        choices.append((metric, points))
    return max(choices, key=lambda choice: len(choice[1]))


def _draw_point(axes: Axes, model: Model, kept: Score, forget: Score, *, numbered: bool) -> None:
    x, y, color = kept.value, 1 - forget.value, color_of(model.run)
    flipped = _error(forget)
    y_error = flipped[::-1] if flipped else None
    axes.errorbar(x, y, xerr=_error(kept), yerr=y_error, color=color, elinewidth=1.4, capsize=3, zorder=5)
    inside = bool(model.run) and numbered
    axes.scatter([x], [y], s=190 if inside else 70, color=color, edgecolor="white", zorder=6, clip_on=False)
    if inside:
        style: dict[str, Any] = {"color": "white", "ha": "center", "va": "center_baseline", "fontweight": "bold"}
        axes.annotate(str(model.run), (x, y), zorder=7, fontsize=9, **style)
        return
    side = -1 if x > 0.5 else 1  # towards the middle, where there is room
    place: dict[str, Any] = {
        "xytext": (9 * side, 8),
        "textcoords": "offset points",
        "ha": "right" if side < 0 else "left",
    }
    axes.annotate("after" if model.run else "before", (x, y), zorder=7, fontsize=9.5, color=color, **place)


def tradeoff_plot(runs: Sequence[RunRecord], name: str = "tradeoff") -> str:
    """Return the plot of what was kept (x) against what was forgotten (y), or ``""`` where neither was measured."""
    metric, points = tradeoff_points(runs)
    if not points:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(4.8, 4.2)
        axes.scatter(
            [1], [1], marker="*", s=260, facecolor="white", edgecolor="#9a6b00", linewidth=1.3, clip_on=False, zorder=4
        )
        axes.annotate(
            "ideal corner", (1, 1), xytext=(-1, 10), textcoords="offset points", ha="right", color="#7a5c00", fontsize=9
        )
        for model, kept, forget in points:
            _draw_point(axes, model, kept, forget, numbered=len(runs) > 1)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axes.set_xlabel("Kept: " + ("model utility" if metric == "model_utility" else "probability of kept answers"))
        axes.set_ylabel("Forgotten: 1 \N{MINUS SIGN} probability of forgotten answers")
        return _svg(figure, name)


def _series(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of ``key``; long logs are thinned to means of equal stretches."""
    points = [(line["step"], line[key]) for line in log if math.isfinite(line.get(key, math.nan))]
    width = math.ceil(len(points) / _POINTS) or 1
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    xs = [sum(step for step, _ in part) / len(part) for part in stretches]
    return xs, [sum(value for _, value in part) / len(part) for part in stretches]


def loss_terms(run: RunRecord) -> tuple[str, ...]:
    """Return the keys of the log that are terms of the loss: the known ones, then those named ``*_loss``."""
    keys = {key for line in run.log for key in line}
    return (*(key for key in _TERMS if key in keys), *other_terms(run))


def other_terms(run: RunRecord) -> tuple[str, ...]:
    """Return the terms whose names come from the log alone, in the order in which the plot counts them."""
    return tuple(sorted({key for line in run.log for key in line if key.endswith("_loss")}))


def loss_plot(run: RunRecord, name: str) -> str:
    """Return the loss and its terms over steps, or ``""`` without a log.

    Terms of other names are drawn as ``term 1``, ``term 2``: the page says what they are.
    """
    others = other_terms(run)
    known = {"loss": ("loss", "#111827"), "forget": ("forget term", COLORS[1]), "retain": ("retain term", COLORS[0])}
    known["kl"] = ("KL term", COLORS[2])
    styles = known | {term: (f"term {i + 1}", COLORS[3 + i % 3]) for i, term in enumerate(others)}
    curves = [(term, *_series(run.log, term)) for term in loss_terms(run)]
    curves = [(term, steps, values) for term, steps, values in curves if steps]
    if not curves:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(4.8, 3.0)
        for term, steps, values in curves:
            label, color = styles[term]
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=color, linewidth=2 if term == "loss" else 1.4, label=label, marker=marker)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(curves)), fontsize=9)
        return _svg(figure, name)


def win_rate_plot(runs: Sequence[RunRecord], name: str = "winrate") -> str:
    """Return the win rate of each run over steps, or ``""`` where no run has one."""
    curves = [(index, *_series(run.log, "win_rate")) for index, run in enumerate(runs, start=1)]
    curves = [(index, steps, values) for index, steps, values in curves if steps]
    if not curves:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(4.8, 3.0)
        for index, steps, values in curves:
            axes.plot(steps, values, color=color_of(index), linewidth=1.8, marker="o" if len(steps) == 1 else None)
            if len(runs) > 1:
                end, color = (steps[-1], values[-1]), color_of(index)
                axes.annotate(str(index), end, (5, 0), textcoords="offset points", va="center", color=color, fontsize=9)
        axes.set(xlabel="step", ylabel="win rate", ylim=(0, 1.02))
        return _svg(figure, name)
