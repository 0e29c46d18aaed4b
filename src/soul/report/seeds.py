"""Runs that differ in nothing but their seed: the mean of their scores, and how far seeds are apart."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from soul.report.record import RunRecord
from soul.report.view import metric_label, split_label, split_order
from soul.strict import yaml_tree

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """A score over the seeds of one recipe.

    Attributes:
        title: The split and the metric, as tables call them.
        better: ``higher``, ``lower`` or empty.
        before: The value before, where all runs agree on it; None otherwise.
        values: After each run, in the order of the runs.
    """

    title: str
    better: str
    before: float | None
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """The standard deviation over seeds, with ``n - 1``; nan where a seed has no finite value."""
        return float(np.std(self.values, ddof=1)) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def half(self) -> float:
        """Half of the 95 % interval of the mean: ``t sd / sqrt(n)``, Student's t with ``n - 1`` degrees of freedom.

        Example:
            >>> round(Spread("", "", None, (0.1, 0.2, 0.3)).half, 4)
            0.2484
        """
        n = len(self.values)
        return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * self.sd / math.sqrt(n)


def by_seed(runs: Sequence[RunRecord]) -> list[tuple[str, list[Spread]]]:
    """Return the runs' scores by recipe, for each recipe that was run with two seeds or more.

    A recipe is the same where nothing but ``training.seed`` differs. Scores that some run lacks are left out.
    """
    groups: dict[str, list[tuple[int, RunRecord]]] = {}
    for run in runs:
        tree: object = None
        with contextlib.suppress(ValueError):  # a recipe that cannot be read is no other's twin
            tree = yaml_tree(run.recipe, "recipe.yaml") if run.recipe and run.after else None
        training = tree.get("training") if isinstance(tree, dict) else None  # an evaluation has none
        if isinstance(tree, dict) and isinstance(training, dict) and isinstance(training.get("seed"), int):
            rest = {k: v for k, v in training.items() if k != "seed"}
            groups.setdefault(repr({**tree, "training": rest}), []).append((training["seed"], run))
    found = []
    for same in groups.values():
        if 1 < len({seed for seed, _ in same}) == len(same):  # a run and its copy are no two seeds
            run = same[0][1]
            name = run.method or f"{run.objective} + {run.optimizer}"
            found.append((f"{name}, {len(same)} seeds", _spreads([run for _, run in same])))
    return found


def _spreads(runs: Sequence[RunRecord]) -> list[Spread]:
    after = [{(s.split, s.metric): s for s in run.after} for run in runs]
    before = [{(s.split, s.metric): s.value for s in run.before} for run in runs]
    spreads = []
    for split, metric in sorted(set.intersection(*map(set, after)), key=lambda key: (split_order(key[0]), key[1])):
        values = tuple(scores[split, metric].value for scores in after)
        first = {scores.get((split, metric)) for scores in before}
        title = f"{split_label(split)}: {metric_label(metric)}" if split else metric_label(metric)
        known = first.pop() if len(first) == 1 else None
        spreads.append(Spread(title, after[0][split, metric].better, known, values))
    return spreads
