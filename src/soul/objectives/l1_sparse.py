"""Fine-tuning on the retain set under an L1 penalty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from soul.forward import Answers
from soul.objectives.base import Batch, Objective
from soul.objectives.ft import FineTune
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("l1_sparse")
@dataclasses.dataclass(frozen=True)
class L1Sparse(FineTune):
    """Fine-tune on the retain set while weights shrink, so that what nothing holds goes (arXiv 2304.04934).

    ``L = mean NLL(retain) + gamma_t ||theta||_1`` over the weights that are trained (with LoRA: the adapter's), and
    ``gamma_t = gamma (1 - t)`` at the share ``t`` of training: the penalty decays, so that the end of training mends
    what it cost. The paper's code decays epoch by epoch, this step by step.

    Attributes:
        gamma: Weight of the penalty at the start.
        decay: ``linear``, or ``none`` for a constant weight.
    """

    gamma: float = 5e-4
    decay: Literal["linear", "none"] = "linear"

    needs_whole: ClassVar[bool] = True
    """The penalty is of whole weights: what it adds to the gradient of a shard, no backward pass would average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, not {self.gamma}")
        if self.decay not in ("linear", "none"):
            raise ValueError(f"decay must be linear or none, not {self.decay!r}")

    def at(self, progress: float, state: Mapping[str, float]) -> Objective:
        """Return this objective with the penalty's weight of that moment."""
        now = super().at(progress, state)
        return dataclasses.replace(now, gamma=self.gamma * (1 - progress)) if self.decay == "linear" else now

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the items of each term; the penalty is there once in each batch."""
        return super().counts(batch) | {"sparsity": 1}

    def further_terms(self, answers: Answers, logps_N: torch.Tensor, model: nn.Module) -> dict[str, Term]:
        """Return the L1 norm of the trained weights."""
        del answers
        total = logps_N.new_zeros(())
        for p in model.parameters():
            if p.requires_grad:
                total = total + p.abs().sum(dtype=total.dtype)
        return {"sparsity": Term(total, 1, self.gamma)}
