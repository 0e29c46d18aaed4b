"""A trust region around any update rule: propose, measure, accept or shrink."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from soul.curvature.quiet import full_precision
from soul.curvature.sharded import reshard
from soul.data.batches import collate_rows
from soul.forward import forward_answers
from soul.objectives.base import kl_to_reference
from soul.optim._shards import local, start_of
from soul.optim._storage import noise_key, round_by_noise

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer

log = logging.getLogger(__name__)

SHRINKS = 6  # a step that still costs too much after so many is taken back
LEAST = 2e-3
"""Smallest budget where the model is asked in 16 bits: two roundings of what a 135M model says are .001 apart."""


class TrustRegion(TrainerCallback):
    """Bounds what each step may change on retained answers, whatever the update rule.

    A step ``delta`` that the rule proposes is measured as ``KL(p_before || p_after)`` on the answer tokens of a fixed
    batch of retained examples (nats a token). Above the budget it is scaled back to ``s delta``, with ``s`` from the
    quadratic ``KL ~ s^2``, until it fits; a step that never does is undone. The rule hears what its step cost
    (:meth:`soul.optim.base.UpdateRule.feedback`), so that one with a prediction can mend its damping (Levenberg,
    Marquardt). One forward pass a step, one more for each time a step is shrunk, and two copies of the trained weights.
    The model is asked in fp32, also where it trains under autocast: what bf16 rounds away does not shrink with a step.

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
        self._told = False

    @property
    def rough(self) -> bool:
        """Whether the model can only be asked in 16 bits: those of its weights, or of what FSDP2 gathers them in."""
        trainer = self.trainer
        assert trainer.model is not None
        gathered = trainer.shards and trainer.numerics != "no"
        return gathered or any(p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())

    def check(self) -> None:
        """Make sure that what is measured is the step, and not rounding.

        Raises:
            ValueError: The budget is below the noise.
        """
        if self.budget < LEAST and self.rough:
            raise ValueError(
                f"training.trust_kl={self.budget:g} is less than rounding to 16 bits changes of what this model says "
                f"(about .001 nats a token), so that no step would fit: set it to {LEAST:g} or more, or compute in "
                "fp32 (model.dtype=float32; training.precision=float32 where weights are sharded)"
            )

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
                for i, ((p, old), move) in enumerate(zip(self._weights, moves, strict=True)):
                    p.copy_(old)  # and nothing more where the move may not even be finite
                    if scale:
                        _move(p, move, scale, noise_key(_DRAWS + 8 * state.global_step + shrinks, i))
            says = self._ask()
            kl = self._kl(says)
            if scale == 0.0:
                break
        self._before, self._weights = says, []
        if scale:
            self.trainer.update_rule.feedback(scale, kl)
        elif not self._told:
            self._told = True
            log.warning(
                "training.trust_kl=%g: step %d cost %.2g nats a token on retained answers, still more after %d "
                "shrinkings, and was undone, as others may be: lower optimizer.lr, or raise training.trust_kl",
                self.budget, state.global_step + 1, proposed, SHRINKS,
            )  # fmt: skip
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
        with torch.no_grad(), trainer.compute_loss_context_manager() if self.rough else full_precision(model):
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


_DRAWS = 1 << 31
"""Where the noise of shrunk steps begins, apart from that of steps."""


def _move(p: torch.Tensor, move: torch.Tensor, scale: float, key: int) -> None:
    """Do ``p <- p + scale move``; bf16 is rounded up or down at random, since a part of a last place is none."""
    if p.dtype != torch.bfloat16:
        p.add_(move, alpha=scale)
        return
    ours = local(p)
    exact = ours.float().add_(local(move), alpha=scale)
    rounded = torch.empty(exact.numel(), dtype=p.dtype, device=exact.device)
    round_by_noise(exact.reshape(-1), rounded, key, start_of(p))
    ours.copy_(rounded.view_as(exact))
