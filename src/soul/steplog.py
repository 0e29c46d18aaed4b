"""What a step leaves in the log."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from soul import processes
from soul.divergence import check_step
from soul.stored import append_line, read_lines, write_lines

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer


class LogCallback(TrainerCallback):
    """Writes one JSON line a step: loss terms, learning rate, seconds, and what the rule reports.

    ``seconds`` holds all of a step; ``curvature_seconds`` is there where a curvature pass came before it, and is its
    share. Of several processes the main one writes, and terms are those of all.

    Args:
        path: File to write; lines of steps that a resumed run repeats are dropped.
        progress: Called with (step, total steps, record) after each step.
    """

    def __init__(self, path: Path | None, progress: Any = None) -> None:
        self.path, self.progress = path, progress
        self.records: list[dict[str, float]] = []
        self.trainer: UnlearnTrainer | None = None
        self._started = time.perf_counter()
        self._rate = math.nan

    def restart_clock(self) -> None:
        """Leave what was done since the last step out of the next one's seconds."""
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Read back the lines of the steps a resumed run has behind it."""
        self.records = processes.from_main(functools.partial(self._read_back, state.global_step))
        self._started = time.perf_counter()

    def _read_back(self, step: int) -> list[dict[str, float]]:
        if self.path is None or not self.path.is_file():
            return self.records
        records = [r for r in read_lines(self.path) if r.get("step", math.inf) <= step]
        write_lines(self.path, records)
        return records

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Keep the learning rate that the step is made with: when it ends, the schedule has gone on to the next."""
        assert self.trainer is not None
        self._rate = float(self.trainer.update_rule.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Write the step's line, and stop a run whose model is lost."""
        assert self.trainer is not None
        now = time.perf_counter()
        terms = self.trainer.last_terms
        weights = self.trainer.term_weights
        record: dict[str, float] = {"step": state.global_step, **terms}
        record["loss"] = sum(weights[name] * value for name, value in terms.items())
        if self.trainer.objective.retain_schedule.kind != "constant":
            record["retain_weight"] = weights["retain"]
        record.update(self.trainer.update_rule.metrics())
        if self.trainer.trust:
            record.update(self.trainer.trust.last)
        if self.trainer.stopping:
            record.update(self.trainer.stopping.last)
        record["learning_rate"] = self._rate
        record["seconds"] = round(now - self._started, 4)
        if self.trainer.curvature_seconds is not None:
            record["curvature_seconds"] = round(self.trainer.curvature_seconds, 4)
        self._started = now
        self.records.append(record)
        if self.path is not None and processes.is_main():
            append_line(self.path, record, flush=control.should_save)  # a checkpoint is never ahead of its log
        if not (self.trainer.stopping and self.trainer.stopping.stopped):  # which gives back what a step has lost
            check_step(self.trainer, self.records, state.global_step)
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, record)
