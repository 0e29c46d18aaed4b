"""What the trainer does between steps: the objective of the moment, and the curvature that the update rule asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from soul.curvature.estimators import ESTIMATORS

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
