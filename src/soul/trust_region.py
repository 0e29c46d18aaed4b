"""A trust region around any update rule: propose, measure, accept or shrink."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from soul.curvature.sharded import reshard
from soul.data.batches import collate_rows
from soul.forward import forward_answers
from soul.objectives.base import kl_to_reference

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer

SHRINKS = 6  # a step that still costs too much after so many is taken back


class TrustRegion(TrainerCallback):
    """Bounds what each step may change on retained answers, whatever the update rule.

    A step ``delta`` that the rule proposes is measured as ``KL(p_before || p_after)`` on the answer tokens of a fixed
    batch of retained examples (nats a token). Above the budget it is scaled back to ``s delta``, with ``s`` from the
    quadratic ``KL ~ s^2``, until it fits; a step that never does is undone. The rule hears what its step cost
    (:meth:`soul.optim.base.UpdateRule.feedback`), so that one with a prediction can mend its damping (Levenberg,
    Marquardt). One forward pass a step, one more for each time a step is shrunk, and two copies of the trained weights.

    Args:
        trainer: The trainer whose steps are bounded.
        budget: Largest KL of a step.
        rows: Retained examples that are asked.
    """

    def __init__(self, trainer: UnlearnTrainer, budget: float, rows: int) -> None:
        self.trainer, self.budget, self.rows = trainer, budget, rows
        self.last: dict[str, float] = {}
        self._batch: dict[str, torch.Tensor] | None = None
        self._weights: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Keep the weights and what the model says."""
        if self._before is None:
            self._before = self._ask()
        rule = self.trainer.update_rule
        self._weights = [(p, p.detach().clone()) for g in rule.param_groups for p in g["params"] if p.grad is not None]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Measure the step, and shrink it until it fits."""
        assert self._before is not None
        moves = [p.detach() - old for p, old in self._weights]
        scale, shrinks = 1.0, 0
        says = self._ask()
        proposed = kl = self._kl(says)
        while not kl <= self.budget:  # a KL that is not a number does not fit either
            shrinks += 1
            ratio = math.sqrt(self.budget / kl) if math.isfinite(kl) else 0.0
            scale = 0.0 if shrinks > SHRINKS else scale * min(max(0.9 * ratio, 0.1), 0.9)
            with torch.no_grad():
                for (p, old), move in zip(self._weights, moves, strict=True):
                    p.copy_(old)  # and nothing more where the move may not even be finite
                    if scale:
                        p.add_(move, alpha=scale)
            says = self._ask()
            kl = self._kl(says)
            if scale == 0.0:
                break
        self._before, self._weights = says, []
        if scale:
            self.trainer.update_rule.feedback(scale, kl)
        self.last = {"step_kl": kl, "proposed_kl": proposed, "step_scale": scale}

    def _ask(self) -> torch.Tensor:
        """Return the logits at the retained answers, as training computes them but without dropout."""
        trainer = self.trainer
        model = trainer.model_wrapped
        assert model is not None
        if self._batch is None:
            rows = trainer.unlearn_data.encoded["retain"]
            rng = np.random.default_rng([trainer.training_spec.seed, 5])
            picks = rng.choice(len(rows), size=min(self.rows, len(rows)), replace=False)
            self._batch = trainer._prepare_inputs(collate_rows([rows[i] for i in picks], pad_id=trainer.pad_id))  # type: ignore[assignment]
        was_training = model.training
        model.eval()
        assert self._batch is not None
        with torch.no_grad(), trainer.compute_loss_context_manager():
            self._answers = forward_answers(model, self._batch)
        reshard(model)
        model.train(was_training)
        return self._answers.logits_NV

    def _kl(self, logits_NV: torch.Tensor) -> float:
        assert self._before is not None
        kl = float(kl_to_reference(self._answers, self._before)) / len(logits_NV)
        if self.trainer.args.world_size > 1:  # or last bits would scale each process's weights by another factor
            kl = broadcast_object_list([kl])[0]
        return kl
