"""What the trainer does between steps: the objective of the moment, and the curvature that the update rule asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from soul.combine import DualRule
from soul.curvature.estimators import ESTIMATORS
from soul.divergence import finite_gradients, refuse_gradients

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer


class ObjectiveCallback(TrainerCallback, ExportableState):
    """Gives each step the objective of its moment, and keeps what objectives learn, in checkpoints too."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer, self.base = trainer, trainer.objective
        self.learned: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"learned": self.learned}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Take up what a checkpoint holds."""
        self.learned = dict(state.stateful_callbacks.setdefault(type(self).__name__, {}).get("learned", {}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Give the step the objective of its moment."""
        self.trainer.objective = self.base.at(state.global_step / max(1, state.max_steps), self.learned)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Let the objective learn from what the step said."""
        progress = (state.global_step - 1) / max(1, state.max_steps)
        self.learned = self.base.learn(self.learned, self.trainer.last_terms, progress)


class GradientCallback(TrainerCallback):
    """Takes no step whose gradients are no numbers: the run ends, or a stopping rule gives back what it kept.

    Under fp16 such steps are common, and accelerate's scaler, which leaves them out, is left to it.
    """

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Look at the gradients, clipped as they are."""
        trainer = self.trainer
        trainer.broken = ""
        if trainer.accelerator.scaler is not None or finite_gradients(trainer):
            return
        told = not all(map(math.isfinite, trainer.last_terms.values()))  # the step's losses say more, at its end
        if not told and trainer.stopping is None:
            refuse_gradients(trainer, state.global_step + 1)
        trainer.broken = "" if told else "a gradient"
        rule = trainer.update_rule
        for group in rule.param_groups:
            for p in group["params"]:
                p.grad = None
        if isinstance(rule, DualRule):
            rule.retain_gradients = {}


class CurvatureCallback(TrainerCallback):
    """Brings the curvature the rule asks for: before a step's first micro-batch, while gradients are empty.

    An estimator that makes no passes is given the gradient that the step is about to take, clipped as it is.
    """

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Tell the rule how many steps are to come."""
        self.trainer.update_rule.expect(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Make the pass that is due, while gradients are empty."""
        self.trainer.refresh_curvature(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Hand over the gradient where that is what the estimate is made of."""
        spec = self.trainer.curvature
        if spec is not None and not ESTIMATORS[spec.estimator].needs_pass:
            self.trainer.update_rule.update_curvature()
