"""What a contest is: its tasks, its cells, and the trials that each of them gets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from soul import config
from soul.attacks.base import Attack
from soul.contest.entry import Entry, entry_from, named
from soul.evaluate import EvaluationSpec
from soul.metrics.contest import Cell
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec
from soul.registry import ATTACKS, OBJECTIVES
from soul.training import TrainingSpec


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and deletion requests against it; ``{request}`` in a source stands for the request's name.

    Attributes:
        model: The model that knows everything.
        gold: The model retrained without the request's forget set.
        forget: What to forget, with a paraphrased question for each.
        retain: What the loss keeps.
        curvature: What the curvature is of; the loss's examples where empty.
        seen: Some of ``retain``, to be measured.
        unseen: Other examples that are to be kept, which neither loss nor curvature sees.
        forgotten: Some of ``forget``, to be measured; all of it where empty.
        facts: Further knowledge with wrong answers, by name.
        text: Plain passages.
        tune: Requests that settings are chosen on.
        report: Requests that results are of.
    """

    model: str
    gold: str
    forget: str
    retain: str
    seen: str
    unseen: str
    text: str
    tune: list[str]
    report: list[str]
    curvature: str = ""
    forgotten: str = ""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tune or not self.report:
            raise ValueError("a task needs requests to tune on and requests to report (tune, report)")
        both = set(self.tune) & set(self.report)
        if both:
            raise ValueError(f"{', '.join(sorted(both))}: a request is tuned on or reported, not both")
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sources = {name: value for name, value in {**named, **self.facts}.items() if isinstance(value, str)}
        for name, source in sources.items():
            if set("{}") & set(source.replace(_REQUEST, "")):
                raise ValueError(f"{name}: {source!r:.120} has braces, and {_REQUEST} alone stands for something")
        taken = {"forget", "paraphrased", "seen", "unseen"} & set(self.facts)
        if taken:
            raise ValueError(f"facts.{', '.join(sorted(taken))}: a measure has that name; call them otherwise")

    def source(self, name: str, request: str) -> str:
        """Return a source with the request's name filled in."""
        return _filled(getattr(self, name), request)

    def fact_sources(self, request: str) -> dict[str, str]:
        """Return those of the facts, by name."""
        return {name: _filled(source, request) for name, source in self.facts.items()}


_REQUEST = "{request}"


def _filled(source: str, request: str) -> str:
    return source.replace(_REQUEST, request)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every cell gets.

    Attributes:
        points: Trials of a cell.
        settings: Of these, how many go on to the report requests.
        checkpoints: Equally spaced measurements in a run.
        interpolate: Shares of the way from the original to the final weights that are measured too, on report requests.
        decades: Width of the learning rate's range around the pilot.
        retain_weight: Range of the retain weight, even in the logarithm.
        update_rms: Root mean square change of a weight in a step, by which the pilot centres learning rates.
        pilot_steps: Steps of the pilot.
        ahead: What a trial must lack, in forgetting and in utility, against another of its cell at the first checkpoint
            to be stopped there.
        seconds: Give every run as many steps as fit into so many seconds, curvature included, by what the pilot took;
            0 gives every run ``training.max_steps``.
        cold: Count the curvature before the first step as the pilot met it, with nothing in the cache.
    """

    points: int = 12
    settings: int = 2
    checkpoints: int = 3
    interpolate: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    decades: float = 2.0
    retain_weight: tuple[float, float] = (0.5, 8.0)
    update_rms: float = 3e-5
    pilot_steps: int = 3
    ahead: tuple[float, float] = (0.05, 0.01)
    seconds: float = 0.0
    cold: bool = False

    def __post_init__(self) -> None:
        if min(self.points, self.settings, self.checkpoints, self.pilot_steps) < 1 or self.settings > self.points:
            raise ValueError("budget: points, settings, checkpoints, pilot_steps must be 1 or more, settings <= points")
        if not 0 < self.retain_weight[0] <= self.retain_weight[1]:
            raise ValueError("budget.retain_weight must be a range above 0, e.g. [0.5, 8]")
        if self.seconds and self.pilot_steps < 2:
            raise ValueError(
                "budget.seconds is priced by the pilot's steps after the first: set budget.pilot_steps to 2 or more"
            )


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A contest.

    Attributes:
        label: Its title.
        tasks: By name.
        objectives: As in recipes; their retain weight is tuned.
        optimizers: Who takes part.
        training: Length, batches, precision: the same for all; its ``max_steps`` must be given.
        budget: What every cell gets.
        evaluation: How measurements are made.
        attacks: What the better setting of each side's best cell, the model before and the retrained one go through.
        seed: Of the trials' points and of training.
    """

    tasks: dict[str, Task]
    objectives: list[dict[str, Any]]
    optimizers: list[Entry]
    training: TrainingSpec
    label: str = "contest"
    budget: Budget = dataclasses.field(default_factory=Budget)
    evaluation: EvaluationSpec = dataclasses.field(default_factory=EvaluationSpec)
    attacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.training.max_steps:
            raise ValueError("training.max_steps must be given: a contest's runs are of so many steps")
        if self.training.max_steps < self.budget.checkpoints:
            raise ValueError("training.max_steps must be at least budget.checkpoints")
        for what, names in (("objectives", self.objective_names), ("optimizers", [e.name for e in self.optimizers])):
            if len(set(names)) != len(names):
                raise ValueError(f"two of the {what} have the same label: {', '.join(names)}; give each its own label")
        for entry in self.optimizers:
            if entry.settings and not 1 <= entry.settings <= self.budget.settings:
                raise ValueError(
                    f"{entry.name}: settings must be from 1 to budget.settings ({self.budget.settings}), or 0 for as "
                    f"many, not {entry.settings}"
                )
            least = entry.settings or self.budget.settings
            if entry.points and not least <= entry.points <= self.budget.points:
                raise ValueError(
                    f"{entry.name}: points must be from the settings that go on ({least}) to budget.points "
                    f"({self.budget.points}), or 0 for all of these, not {entry.points}"
                )
            if entry.steps and self.budget.seconds:
                raise ValueError(f"{entry.name}: steps or budget.seconds: each says how many; leave one of them at 0")
            if entry.match == "run" and not entry.steps:
                raise ValueError(f"{entry.name}: match: run is for an entry with steps of its own, and it has none")
            if entry.steps and not self.budget.checkpoints <= entry.steps <= self.training.max_steps:
                raise ValueError(
                    f"{entry.name}: steps must be from budget.checkpoints ({self.budget.checkpoints}) to "
                    f"training.max_steps ({self.training.max_steps}), or 0 for all of these, not {entry.steps}"
                )
            for name in entry.objectives:
                if name not in self.objective_names:
                    raise ValueError(
                        f"{entry.name}: objectives names {name!r:.60}, which the matrix has not. "
                        f"It has: {', '.join(self.objective_names)}."
                    )

    @property
    def objective_names(self) -> list[str]:
        """What tables call the objectives."""
        return [str(tree.get("label") or tree["name"]) for tree in self.objectives]

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order of the file."""
        return [
            Cell(t, o, e.name)
            for t, o, e in itertools.product(self.tasks, self.objective_names, self.optimizers)
            if o in (e.objectives or self.objective_names)
        ]

    @property
    def attackers(self) -> dict[str, Attack]:
        """The attacks, by what tables call them."""
        trees = [dict(tree) for tree in self.attacks]
        names = [str(tree.pop("label", "") or tree["name"]) for tree in trees]
        return {name: config.component(ATTACKS, tree, "") for name, tree in zip(names, trees, strict=True)}

    def checkpoints(self, steps: int) -> list[int]:
        """Return the steps after which a run of so many is measured."""
        parts = self.budget.checkpoints
        return [round(steps * (i + 1) / parts) for i in range(parts)]

    def steps(self, pilot: Mapping[str, Any], optimizer: OptimizerSpec | None = None) -> int:
        """Return the steps of a cell's runs, whose pilot is given; at least one for each checkpoint.

        A step takes the mean of the pilot's after the first, moves of a rule that makes one only at times included, and
        its share of the refreshes to come, each priced by the pilot's curvature pass.

        Raises:
            ValueError: The pilot's record knows of no time that its later steps took.
        """
        budget, took = self.budget, pilot["seconds"]
        if not budget.seconds:
            return self.training.max_steps
        later = took["train"] - took["curvature"] - took.get("refreshes", 0.0) - took["first"]
        each = later / max(1, pilot["steps"] - 1)
        spec = getattr(optimizer, "curvature", None)
        if spec is not None and spec.interval:
            each += took["curvature"] * spec.passes(spec.interval) / spec.passes(0) / spec.interval
        if not each > 0:
            raise ValueError(
                f"the pilot's {pilot['steps']} steps were too quick for what its record keeps of their seconds: raise "
                "budget.pilot_steps in another --out, or set budget.seconds to 0"
            )
        left = budget.seconds - took["first"] - (took["curvature"] if budget.cold else 0.0)
        return max(budget.checkpoints, 1 + int(left / each))

    def tree(self) -> dict[str, Any]:
        """Return the plain tree that :func:`matrix_from_tree` reads back."""
        plain = config.plain(self)
        plain["optimizers"] = [{**e.pop("optimizer"), **e} for e in plain["optimizers"]]
        return plain

    def entry(self, name: str) -> Entry:
        """Return the update rule that tables call so."""
        return next(e for e in self.optimizers if e.name == name)

    def trials(self, name: str) -> int:
        """Return how many trials a cell of the update rule that tables call so has."""
        return self.entry(name).points or self.budget.points

    def sizes(self, name: str) -> tuple[int, int]:
        """Return how many trials a cell of the update rule that tables call so has, and how many of these go on."""
        return self.trials(name), self.entry(name).settings or self.budget.settings

    def objective(self, name: str, settings: Mapping[str, float]) -> Objective:
        """Return the objective that tables call so, with the tuned retain weight where it has a retain term."""
        tree = dict(self.objectives[self.objective_names.index(name)])
        tree.pop("label", None)
        plain: Objective = config.component(OBJECTIVES, tree, "")
        if "retain_weight" not in settings or plain.retain == "none":
            return plain
        return config.component(OBJECTIVES, tree | {"retain_weight": settings["retain_weight"]}, "")

    def points(self) -> np.ndarray:
        """Return the points of the unit cube that all cells share, [points, 3]: the head of a scrambled Sobol sequence.

        Its columns are learning rate, retain weight and knob. More points leave those before as they were.
        """
        power = int(np.ceil(np.log2(max(2, self.budget.points))))
        return qmc.Sobol(3, scramble=True, rng=np.random.default_rng(self.seed)).random_base2(power)[
            : self.budget.points
        ]

    def settings(self, name: str, point: int, centre: float) -> dict[str, float]:
        """Return the settings of a trial: ``lr``, ``retain_weight`` and, where the rule has one, ``knob``.

        Args:
            name: What tables call the update rule.
            point: Which trial.
            centre: Learning rate in the middle of the range.
        """
        x, y, z = (float(v) for v in self.points()[point])
        entry = self.entry(name)
        if entry.method:
            assert entry.knob is not None
            return {"knob": entry.knob.at(x)}
        low, high = self.budget.retain_weight
        found = {
            "lr": centre * 10 ** ((x - 0.5) * self.budget.decades),
            "retain_weight": low ** (1 - y) * high**y,
        }
        return found if entry.knob is None else {**found, "knob": entry.knob.at(z)}


def matrix_from_tree(tree: Mapping[str, Any]) -> Matrix:
    """Validate a plain tree.

    Raises:
        ValueError: An unknown or missing section, or a wrong value in one.
    """
    known = [f.name for f in dataclasses.fields(Matrix)]
    for key in tree:
        if key not in known:
            raise ValueError(f"unknown section {key!r} in the matrix. Known: {', '.join(known)}.")
    for key in ("tasks", "objectives", "optimizers", "training"):
        if not tree.get(key):
            raise ValueError(f"the matrix lacks {key}: see recipes/contests/tofu20.yaml for one that is complete")
    for key, kind in (("tasks", Mapping), ("objectives", list), ("optimizers", list), ("attacks", list)):
        if tree.get(key) and not isinstance(tree[key], kind):
            raise ValueError(f"{key} of the matrix must be a {'mapping' if kind is Mapping else 'list'}")
    tasks = {str(name): config.parse(Task, task, f"tasks.{name}") for name, task in tree["tasks"].items()}
    objectives = [named(tree, "objectives") for tree in tree["objectives"]]
    optimizers = [entry_from(item, i) for i, item in enumerate(tree["optimizers"])]
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed of the matrix must be a whole number from 0, not {seed!r:.60}")
    parts: dict[str, Any] = {"attacks": [named(item, "attacks") for item in tree.get("attacks") or []]}
    for name, cls in (("training", TrainingSpec), ("budget", Budget), ("evaluation", EvaluationSpec)):
        parts[name] = config.parse(cls, tree.get(name) or {}, name)
    matrix = Matrix(tasks, objectives, optimizers, label=str(tree.get("label", "contest")), seed=seed, **parts)
    for name in matrix.objective_names:  # whatever is wrong with a component is found before the first trial
        matrix.objective(name, {"retain_weight": 1.0})
    if len(matrix.attackers) < len(matrix.attacks):
        raise ValueError("two of the attacks have the same label; give each its own label")
    for entry in matrix.optimizers:
        middle = {} if entry.knob is None else {"knob": entry.knob.at(0.5)}
        _ = entry.do(middle) if entry.method else entry.spec(middle)
    return matrix


def read_matrix(path: Path, overrides: Sequence[str] = ()) -> Matrix:
    """Read a YAML matrix and apply ``key.sub=value`` overrides."""
    return matrix_from_tree(config.override(config.read_yaml(path), overrides))
