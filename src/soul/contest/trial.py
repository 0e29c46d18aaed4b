"""One run of a contest: train, measure on the way, and say what was found in one line."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from soul import config
from soul.attacks.base import Attack
from soul.contest.entry import Entry
from soul.contest.matrix import Task
from soul.contest.measure import FURTHER, Meter, Sets, Values
from soul.curvature.picks import text_rows
from soul.data.batches import Item, UnlearnDataset
from soul.data.general import refusals
from soul.data.sources import check_disjoint, load_examples
from soul.data.templates import Encoded
from soul.evaluate import EvaluationSpec
from soul.machine import has_bf16, peak_memory, reset_peak_memory
from soul.methods.base import Method
from soul.models import ModelSpec, freeze_embeddings, load_model, without_autocast
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.types import LostModelError

Line = dict[str, Any]
Stop = Callable[[Values], str]
Tick = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is done in a trial.

    Attributes:
        task: The task.
        request: The deletion request.
        sets: What it is measured on.
        entry: Who takes part.
        objective: The loss, settings filled in.
        optimizer: The update rule, settings filled in.
        training: Length, batches, precision, seed.
        evaluation: How measurements are made.
        checkpoints: Steps after which the run is measured.
        interpolate: Shares of the way to the final weights that are measured at the end.
        full: Measure in full.
        attacks: What the final model goes through, each from the same weights; measured in full, and the final model
            itself once more in the weights' own precision.
        method: What is done in place of objective and optimizer; it is measured on the way to its last weights, which
            is straight, at as many points.
    """

    task: Task
    request: str
    sets: Sets
    entry: Entry
    objective: Objective
    optimizer: OptimizerSpec | None
    training: TrainingSpec
    evaluation: EvaluationSpec
    checkpoints: Sequence[int] = ()
    interpolate: Sequence[float] = ()
    full: bool = False
    attacks: Mapping[str, Attack] = dataclasses.field(default_factory=dict)
    method: Method | None = None

    def identity(self) -> Line:
        """Return what the run is, defaults of the library included, beside what the whole contest has in common."""
        rule = {"method": config.plain(self.method)} if self.method else {"optimizer": config.plain(self.optimizer)}
        names = ("forget", "retain", "curvature", "forgotten", "seen", "unseen", "text")
        sources = [self.task.source(name, self.request) for name in names if getattr(self.task, name)]
        read = [load_examples(source) for source in (*sources, *self.task.fact_sources(self.request).values())]
        data = hashlib.blake2b(repr(read).encode(), digest_size=8).hexdigest()
        flags = {name: getattr(self.entry, name) for name in ("projected", "extra_retain", "extra_batches", "reseed")}
        flags |= {"steps": self.training.max_steps}
        return {**rule, "objective": config.plain(self.objective), **flags, "data": data}


class _Measuring(TrainerCallback):
    """Measures after the steps asked for, and ends the run where ``stop`` gives a reason after the first."""

    def __init__(self, run: Run, meter: Meter, log: LogCallback, stop: Stop) -> None:
        self.run, self.meter, self.log, self.stop = run, meter, log, stop
        self.found: list[Line] = []
        self.seconds = 0.0
        self.reason = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        if state.global_step not in self.run.checkpoints:
            return
        started = time.perf_counter()
        values = self.meter(kwargs["model"], full=self.run.full)
        self.found.append({"step": state.global_step, "share": 1.0, "values": rounded(values)})
        if len(self.found) == 1:
            self.reason = self.stop(values)
            control.should_training_stop = bool(self.reason)
        self.seconds += time.perf_counter() - started
        self.log.restart_clock()  # measuring is no part of a step


def never(_values: Values) -> str:
    """Give no reason to stop."""
    return ""


def fast_precision(training: TrainingSpec, device: str = "cpu") -> Callable[[], Any]:
    """Return a context in the precision that training runs in."""
    on = training.precision == "bfloat16" or (training.precision == "auto" and has_bf16(device))
    return functools.partial(torch.autocast, device, torch.bfloat16, enabled=on)


def measured(path: str, sets: Sets, training: TrainingSpec, evaluation: EvaluationSpec) -> dict[str, Values]:
    """Measure a model as it is: thin, in full, and in full in the weights' own precision."""
    model, tokenizer = load_model(ModelSpec(path))
    meter = _meter(model, tokenizer, sets, training, evaluation)
    full = rounded(meter(model, full=True))
    exact = rounded(meter(model, full=True, exact=True))
    return {"thin": {k: v for k, v in full.items() if k not in FURTHER}, "full": full, "exact": exact}


def measured_under(
    attacks: Mapping[str, Attack], path: str, sets: Sets, training: TrainingSpec, evaluation: EvaluationSpec
) -> dict[str, Values]:
    """Measure a model after each attack, in full."""
    model, tokenizer = load_model(ModelSpec(path))
    return _attacked(model, attacks, _meter(model, tokenizer, sets, training, evaluation))


def _attacked(model: Any, attacks: Mapping[str, Attack], meter: Meter) -> dict[str, Values]:
    """Measure the model after each attack, each from the weights it has now, and leave these.

    The attacker has a share of all that was to be forgotten; beside the values stands which of the measured examples
    are among it (``had``).
    """
    data = UnlearnDataset(meter.template, meter.sets.whole, (), ("forget",))
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()} if attacks else {}
    found = {}
    for name, attack in attacks.items():
        theirs = set(attack.known(len(data)))
        had = [i for i, place in enumerate(meter.sets.places) if place in theirs]
        found[name] = {**rounded(meter(attack(model, data), full=True)), "had": had}
        model.load_state_dict(kept)
    return found


def _meter(
    model: Any, tokenizer: PreTrainedTokenizerBase, sets: Sets, training: TrainingSpec, evaluation: EvaluationSpec
) -> Meter:
    device = next(model.parameters()).device.type
    return Meter(sets, tokenizer, evaluation, fast_precision(training, device))


def do(run: Run, tick: Tick, stop: Stop = never) -> Line:
    """Train once from the task's model and return what was measured.

    A run whose loss is no longer a number is a result like any other: its ``state`` is ``lost``.
    """
    reset_peak_memory()
    model, tokenizer = load_model(ModelSpec(run.task.model))
    meter = _meter(model, tokenizer, run.sets, run.training, run.evaluation)
    dataset = _dataset(tokenizer, run)
    if run.training.frozen == "embeddings":
        freeze_embeddings(model)
    origin = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    line = _by_method(model, dataset, run, tick) if run.method else _by_training(model, dataset, run, meter, tick, stop)
    moved = _moved(model, origin) / max(1, line["steps"])
    line["update_rms"] = moved if math.isfinite(moved) else None
    if line["state"] == "done":
        shares = run.interpolate
        if run.method:
            count = max(1, len(run.checkpoints))
            shares = sorted({*((i + 1) / count for i in range(count)), *shares})
        line["measures"] += _between(model, origin, shares, line["steps"], run, meter)
        if run.attacks:
            line["exact"] = rounded(meter(model, full=True, exact=True))
            line["attacked"] = _attacked(model, run.attacks, meter)
    return line


def _by_training(model: Any, dataset: UnlearnDataset, run: Run, meter: Meter, tick: Tick, stop: Stop) -> Line:
    assert run.optimizer is not None
    log = LogCallback(None, lambda step, of, _: tick("training", step, of))
    watch = _Measuring(run, meter, log, stop)
    state, trouble = "done", ""
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearnTrainer(
            model,
            run.training.arguments(folder, next(model.parameters()).device.type),
            dataset=dataset,
            objective=run.objective,
            optimizer=run.optimizer,
            training=run.training,
            callbacks=[log, watch],
        )
        log.trainer = trainer
        try:
            trainer.train()
        except (LostModelError, torch.linalg.LinAlgError) as error:  # type: ignore[reportPrivateImportUsage]  # documented
            state, trouble = "lost", str(error)
        peak = peak_memory()
    without_autocast(model)
    if watch.reason:
        state, trouble = "stopped", watch.reason
    return {
        "state": state,
        "why": trouble,
        "steps": len(log.records),
        "seconds": _seconds(log.records) | {"measure": round(watch.seconds, 2)},
        "peak_memory_bytes": peak,
        "win_rate": _mean_of(log.records, "win_rate"),
        "measures": watch.found,
    }


def _by_method(model: Any, dataset: UnlearnDataset, run: Run, tick: Tick) -> Line:
    assert run.method is not None
    records: list[Mapping[str, float]] = []
    started, state, trouble = time.perf_counter(), "done", ""
    try:
        run.method(model, dataset, progress=tick, log=lambda record: records.append(dict(record)))
    except LostModelError as error:
        state, trouble = "lost", str(error)
    seconds = round(time.perf_counter() - started, 2)
    return {
        "state": state,
        "why": trouble,
        "steps": len(records),
        "seconds": {"train": seconds, "curvature": 0.0},
        "peak_memory_bytes": peak_memory(),
        "win_rate": None,
        "measures": [],
    }


def _seconds(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what a run took: in all, for curvature, for the first step without it, and for a later step (median).

    Refreshes after the first step are part of a step, as they are of every longer run. Microseconds are kept, since
    differences of these numbers say how many steps a budget of seconds has room for.
    """
    found = {
        "train": sum(r["seconds"] for r in records),
        "curvature": records[0].get("curvature_seconds", 0.0) if records else 0.0,
        "refreshes": sum(r.get("curvature_seconds", 0.0) for r in records[1:]),
    }
    if len(records) > 1:
        found["first"] = records[0]["seconds"] - found["curvature"]
        found["step"] = statistics.median(r["seconds"] for r in records[1:])
    return {k: round(v, 6) for k, v in found.items()}


def _dataset(tokenizer: PreTrainedTokenizerBase, run: Run) -> Any:
    forget, retain, curvature = (
        load_examples(source) if source else []
        for source in (run.task.source(name, run.request) for name in ("forget", "retain", "curvature"))
    )
    check_disjoint(forget, [*retain, *curvature])
    if run.entry.extra_retain or run.method:  # a method draws its curvature from what it keeps
        retain, curvature = [*retain, *curvature], []
    dataset = make_dataset(tokenizer, forget, retain, run.method or run.objective, run.training, refusals(), curvature)
    return _Besides(dataset) if run.entry.extra_batches else dataset


class _Besides(UnlearnDataset):
    """A dataset whose items have a further retain row, of what curvature is made of: each once before any again."""

    def __init__(self, dataset: UnlearnDataset) -> None:
        vars(self).update(vars(dataset))
        if "retain" not in self.views:
            raise ValueError("extra_batches is for objectives that look at retain examples")
        if "retain_refusal" in self.views:
            raise ValueError("extra_batches is not for objectives that pair retain questions with refusals")
        more = [*self.curvature, *text_rows(self)]
        self.more = [more[i] for i in np.random.default_rng([self.seed, 8]).permutation(len(more))]

    def rows(self, view: str, epochs: int) -> list[Encoded]:
        """Return what a reference has to know: the further rows among those to retain."""
        more = self.more[: epochs * len(self)] if view == "retain" else []
        return list({row.key: row for row in (*super().rows(view, epochs), *more)}.values())

    def _item(self, epoch: int, anchor: int, partner: int) -> Item:
        number = epoch * len(self) + anchor
        return {**super()._item(epoch, anchor, partner), "retain+1": self.more[number % len(self.more)]}


@torch.no_grad()
def _between(
    model: Any, origin: Mapping[str, torch.Tensor], shares: Sequence[float], steps: int, run: Run, meter: Meter
) -> list[Line]:
    """Measure the models on the straight line from the original to the final weights, and leave the final ones."""
    weights = {n: p for n, p in model.named_parameters() if n in origin}
    final = {n: p.detach().clone() for n, p in weights.items()} if shares else {}
    found: list[Line] = []
    for share in shares:
        for n, p in weights.items():
            p.copy_(torch.lerp(origin[n], final[n], share))
        found.append({"step": steps, "share": share, "values": rounded(meter(model, full=run.full))})
    for n, value in final.items():
        weights[n].copy_(value)
    return found


@torch.no_grad()
def _moved(model: Any, origin: Mapping[str, torch.Tensor]) -> float:
    """Return the root mean square change of the weights that were free to move."""
    total = sum(float((p.detach() - origin[n]).square().sum()) for n, p in model.named_parameters() if n in origin)
    return math.sqrt(total / sum(p.numel() for p in origin.values()))


def _mean_of(records: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [r[name] for r in records if r.get(name) is not None]
    return sum(values) / len(values) if values else None


def rounded(values: Values) -> Values:
    """Return the measurements with six digits after the point; None for what is no number, as JSON has no nan."""
    return {k: (round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in values.items()}
