"""What a run is: a frozen, validated tree. How it is done is in :mod:`soul.run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from soul import config
from soul.adapters import AdapterSpec
from soul.benchmarks.base import Benchmark
from soul.data.sources import listed
from soul.evaluate import EvaluationSpec
from soul.methods.base import Method
from soul.models import ModelSpec
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec
from soul.registry import BENCHMARKS, METHODS, OBJECTIVES, OPTIMIZERS
from soul.stopping import StopSpec
from soul.training import TrainingSpec


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where the data come from: files, folders, hub ids, or ``people:`` and ``general:``.

    Attributes:
        forget: The set to forget; several sources may be given as a list.
        retain: The set to keep, likewise. Without one, where one is needed, ``anchors``
            stand in.
        refusals: A text file with a refusal a line; the built-in phrasings by default.
        curvature: Where ``retain`` is a curvature's source, examples to take in its place; the retain set by default.
        anchors: What stands in for a retain set that is not given: ``samples`` of the model before it is changed,
            ``general`` everyday requests, or ``both``; ``none`` refuses to go on without one.
        samples: How many samples to take.
        overlap: What is done where an item to forget is hidden in the retain set: ``warn``, ``refuse`` to go on,
            ``drop`` it from the retain set, or ``ignore`` it and do not look.
        copied: Least share of common shingles (three words) by which it is found as a near-duplicate.
        alike: Least cosine of the sentence embeddings by which it is found as a paraphrase.
        encoder: The sentence encoder, a folder or a hub id; by default all-MiniLM-L6-v2 where it is on this machine;
            ``none`` looks for near-duplicates alone.
    """

    forget: str | list[str] = ""
    retain: str | list[str] = ""
    refusals: str = ""
    curvature: str | list[str] = ""
    anchors: Literal["both", "samples", "general", "none"] = "both"
    samples: int = 48
    overlap: Literal["warn", "refuse", "drop", "ignore"] = "warn"
    copied: float = 0.6
    alike: float = 0.8
    encoder: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(
                f"data.samples must be 1 or more, not {self.samples}: set data.anchors to general for none"
            )
        for name in ("copied", "alike"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is a similarity above 0 and at most 1, not {getattr(self, name)}")

    @property
    def forget_sources(self) -> list[str]:
        """The sources of what is to be forgotten as a list."""
        return listed(self.forget)

    @property
    def retain_sources(self) -> list[str]:
        """The retain sources as a list."""
        return listed(self.retain)

    @property
    def curvature_sources(self) -> list[str]:
        """The sources of the curvature's examples as a list; empty where they are the retain set's."""
        return listed(self.curvature)


DEFAULT_OBJECTIVE, DEFAULT_OPTIMIZER = "npo", "kfac"
"""What serves a request that asks for nothing else: ``docs/second-order.md`` says why."""


def request_defaults(settings: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a request without a recipe begins with: it ends when it has forgotten, or has spent its budget.

    Args:
        settings: ``key.sub=value`` of the person. Who sets the length keeps it, and what does not train has no steps.
    """
    given = {setting.partition("=")[0] for setting in settings}
    if any(name.split(".")[0] == "method" for name in given):
        return {}
    sized = given & {"training.epochs", "training.max_steps"}
    stop = {"when": "forgotten", **({"steps": 0} if sized else {})}
    # of the 100 steps such a run may take, an interruption loses no more than this
    return {"stop": stop, "training": {"schedule": "constant", "save_steps": 25}}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        label: What reports call it.
        model: The model to change.
        adapter: LoRA settings; None trains the weights.
        data: What to forget and what to keep.
        objective: The loss.
        optimizer: The update rule.
        method: What is done in place of training with objective and optimizer, e.g. ``influence``; None trains.
        training: Length, batch size, precision, seed.
        stop: When training ends before its length does.
        benchmark: How the result is judged; None judges it on the two sets, general facts and plain text.
        reference_run: A run of a retained model, for metrics that compare with one (TOFU's forget quality).
        evaluation: How measurements are made.
    """

    label: str = ""
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    adapter: AdapterSpec | None = None
    data: DataSpec = dataclasses.field(default_factory=DataSpec)
    objective: Objective = dataclasses.field(default_factory=lambda: OBJECTIVES.get(DEFAULT_OBJECTIVE)())
    optimizer: OptimizerSpec = dataclasses.field(default_factory=lambda: OPTIMIZERS.get(DEFAULT_OPTIMIZER)())
    method: Method | None = None
    training: TrainingSpec = dataclasses.field(default_factory=TrainingSpec)
    stop: StopSpec = dataclasses.field(default_factory=StopSpec)
    benchmark: Benchmark | None = None
    reference_run: str = ""
    evaluation: EvaluationSpec = dataclasses.field(default_factory=EvaluationSpec)

    def __post_init__(self) -> None:
        if self.method is not None:
            self._check_method(self.method)
        if self.stop.when == "never":
            return
        if self.method is not None:
            raise ValueError(
                f"stop.when={self.stop.when} ends training, and the method {self.method.name} does not train: leave "
                "one of them out"
            )
        if not self.objective.forget_views:
            raise ValueError(
                f"stop.when={self.stop.when} waits until something is forgotten, and {self.objective.name} forgets "
                "nothing: set stop.when=never"
            )

    def _check_method(self, method: Method) -> None:
        longest = getattr(getattr(method, "training", None), "max_length", TrainingSpec.max_length)
        if longest not in (TrainingSpec.max_length, self.training.max_length):
            raise ValueError(
                f"method.training.max_length={longest} has no effect: rows are as long as training.max_length allows "
                f"({self.training.max_length}); set that in its place"
            )
        if not method.replaces_weights:
            return
        if self.adapter is not None and not self.adapter.merge:
            raise ValueError(
                f"adapter.merge=false keeps an adapter alone, and {method.name} trains one on other weights than those "
                "of model.path, on which it would be loaded: set adapter.merge=true"
            )
        if self.data.forget and not self.data.retain_sources:
            raise ValueError(
                f"{method.name} learns the retain set and nothing else, so that what stands in for one that is not "
                "given (samples of the model that knows what is to be forgotten) will not do: give data.retain"
            )

    @property
    def needs_anchors(self) -> bool:
        """Whether something must be kept, and no set says what."""
        if self.data.retain_sources or not self.data.forget or self.data.anchors == "none":
            return False
        curvature = getattr(self.optimizer, "curvature", None)
        by_curvature = bool(curvature) and "retain" in curvature.source and not self.data.curvature_sources
        return "retain" in (self.method or self.objective).views or (self.method is None and by_curvature)


SECTIONS = tuple(f.name for f in dataclasses.fields(Recipe))


def recipe_from_tree(tree: Mapping[str, Any]) -> Recipe:
    """Validate a plain tree.

    Raises:
        ValueError: An unknown section or setting, an unknown component, or a value of the wrong kind.

    Example:
        >>> recipe_from_tree({"objective": "npo", "optimizer": {"name": "adamw", "lr": 3e-5}}).optimizer.lr
        3e-05
    """
    sections = dict(tree)
    for key, value in sections.items():
        if key == "model" and isinstance(value, str):
            sections[key] = {"path": value}
    unknown = config.parse(_Sections, sections, "recipe")
    parts: dict[str, Any] = {"label": unknown.label or "", "reference_run": unknown.reference_run or ""}
    classes = {"model": ModelSpec, "data": DataSpec, "training": TrainingSpec, "stop": StopSpec}
    classes |= {"evaluation": EvaluationSpec}
    for name, cls in classes.items():
        parts[name] = config.parse(cls, sections.get(name) or {}, name)
    if sections.get("adapter") is not None:
        parts["adapter"] = config.parse(AdapterSpec, sections["adapter"], "adapter")
    parts["objective"] = config.component(OBJECTIVES, sections.get("objective"), DEFAULT_OBJECTIVE)
    parts["optimizer"] = config.component(OPTIMIZERS, sections.get("optimizer"), DEFAULT_OPTIMIZER)
    if sections.get("method") is not None:
        parts["method"] = config.component(METHODS, sections["method"], "")
    if sections.get("benchmark") is not None:
        parts["benchmark"] = config.component(BENCHMARKS, sections["benchmark"], "")
    return Recipe(**parts)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``key.sub=value`` overrides."""
    return recipe_from_tree(config.override(config.read_yaml(path), overrides))


@dataclasses.dataclass(frozen=True)
class _Sections:
    """The top level of a recipe, before its parts are read."""

    label: str | None = None
    model: Any = None
    adapter: Any = None
    data: Any = None
    objective: Any = None
    optimizer: Any = None
    method: Any = None
    training: Any = None
    stop: Any = None
    benchmark: Any = None
    reference_run: str | None = None
    evaluation: Any = None
