"""The win rate of the released SOUL optimizer and of Sophia along a real run, layer by layer.

    python experiments/first_run.py --tofu ../shared/data/tofu   # once: makes the taught model and the data
    python benchmarks/win_rate.py

Each rule serves the same request (``forget01`` under GradDiff, the recipe in ``recipes/first-run``) on the model that
knows the answers. After every step the share of coordinates with momentum that were not clipped is counted in each
tensor, over all its coordinates. Sophia's authors want 10 to 50 % (the README of their code); near 0 the step is the
sign of the momentum and no curvature is in it. Sophia is shown as the recipe has it (undamped), damped, and with
``win_rate: 0.3``, where ``rho`` is set so that it comes out, which by itself proves nothing.

Writes ``docs/results/win-rate.json`` and the figure ``docs/results/win-rate.png``, and prints the means; five minutes
on two cores. A rule that is in the record is not run again; ``--figure`` only draws.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from soul.cli import progress_bars
from soul.console import quiet
from soul.inputs import load_request
from soul.models import load_model
from soul.recipe import read_recipe
from soul.run import tokenise, train

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/results/win-rate.json"
RUNS: dict[str, tuple[str, list[str]]] = {
    "soul_release": ("grad_diff-soul_release.yaml", []),
    "sophia": ("grad_diff-sophia.yaml", []),
    "sophia, damping 0.1": ("grad_diff-sophia.yaml", ["optimizer.relative_damping=0.1"]),
    "sophia, win_rate 0.3": ("grad_diff-sophia.yaml", ["optimizer.win_rate=0.3", "optimizer.relative_damping=0.1"]),
}
SMALLEST = 1e-4
"""Of the figure's scale: below it nothing is worth telling apart."""


class Watch(TrainerCallback):
    """Asks the rule after every step."""

    def __init__(self, model: Any) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        self.steps: list[dict[str, float]] = []
        self.whole: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Take down the step's win rates."""
        rule = kwargs["optimizer"].optimizer  # inside accelerate's wrapper
        self.steps.append({self.names[p]: round(rate, 5) for p, rate in rule.win_rates().items()})
        self.whole.append({k: round(v, 5) for k, v in rule.metrics().items()})


def measure(file: str, overrides: Sequence[str], tick: Any) -> dict[str, Any]:
    """Train as the recipe says and return the win rates of each step."""
    recipe = read_recipe(ROOT / "recipes/first-run" / file, overrides)
    request = load_request(recipe.data)
    model, tokenizer = load_model(recipe.model)
    watch = Watch(model)
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenise(tokenizer, recipe, request), recipe, Path(folder), tick, [watch])
    names = {name: p.numel() for name, p in model.named_parameters() if any(name in step for step in watch.steps)}
    return {
        "lr": recipe.optimizer.lr,
        "names": list(names),
        "sizes": list(names.values()),
        "rates": [[step.get(name) for name in names] for step in watch.steps],  # null: no momentum
        "rule": watch.whole,
    }


def block_of(name: str) -> int | None:
    """Return the number of the transformer block a parameter is in."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """Return what a parameter is: ``q_proj`` and the like, ``norm`` or ``embedding``."""
    if "norm" in name:
        return "norm"
    return name.split(".")[-2] if block_of(name) is not None else "embedding"


def grid(found: dict[str, Any], group: Any) -> tuple[list[Any], np.ndarray]:
    """Return the groups and the win rate ``[group, step]`` of their tensors, each weighing as much as it is large."""
    of = [group(name) for name in found["names"]]
    groups = list(dict.fromkeys(g for g in of if g is not None))
    rates, sizes = np.array(found["rates"], dtype=float), np.array(found["sizes"], dtype=float)
    values = []
    for g in groups:
        mine = np.array([x == g for x in of])
        weights = np.where(np.isnan(rates[:, mine]), 0, sizes[mine])
        values.append((np.nan_to_num(rates[:, mine]) * weights).sum(1) / np.maximum(weights.sum(1), 1))
    return groups, np.array(values)


def draw(record: dict[str, Any]) -> None:
    """Draw a row of two maps for each rule: by block and by kind of tensor."""
    figure = Figure(figsize=(10, 2.3 * len(record)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(record), 2, squeeze=False)
    image = None
    for row, (title, found) in zip(axes, record.items(), strict=True):
        for axis, group, what in zip(row, (block_of, kind_of), ("block", ""), strict=True):
            names, values = grid(found, group)
            shown = np.clip(values, SMALLEST, 1)
            extent = (0.5, values.shape[1] + 0.5, len(names) - 0.5, -0.5)
            norm = LogNorm(SMALLEST, 1)
            axis.xaxis.get_major_locator().set_params(integer=True)
            image = axis.imshow(shown, aspect="auto", norm=norm, cmap="viridis", extent=extent, interpolation="nearest")
            axis.set_ylabel(what)
            if group is kind_of:
                axis.set_yticks(range(len(names)), names, fontsize=7)
        row[0].set_title(title, loc="left", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    assert image is not None
    figure.colorbar(image, ax=axes, label="win rate: share of coordinates not clipped", extend="min")
    figure.savefig(RECORD.with_suffix(".png"), dpi=110, metadata={"Software": None})


def show(record: dict[str, Any]) -> None:
    """Print the means over all steps."""
    table = Table(title="win rate: mean over steps (lowest to highest step)")
    for head in ("rule", "lr", "matrices and norms", "embedding", "cos(update, sign m)", "cos(update, m)"):
        table.add_column(head)
    for title, found in record.items():
        cells = []
        for key in ("win_rate", "win_rate_embedding", "cos_sign", "cos_momentum"):
            values = [step[key] for step in found["rule"] if key in step]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        table.add_row(title, f"{found['lr']:g}", *cells)
    Console(width=140).print(table)


def main() -> int:
    """Measure what is missing, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="only draw and print what was measured")
    args = parser.parse_args()
    quiet()
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for title, (file, overrides) in RUNS.items() if not args.figure else ():
        if title not in record:
            try:
                with progress_bars() as tick:
                    record[title] = measure(file, overrides, lambda w, d, n, title=title: tick(f"{title}: {w}", d, n))
            except ValueError as error:
                print(f"error: {error}\nexperiments/first_run.py makes the taught model and the data", file=sys.stderr)
                return 2
            RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if not record:
        parser.error(f"nothing was measured yet: {RECORD.name} is not there")
    record = {title: record[title] for title in RUNS if title in record}
    draw(record)
    show(record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
