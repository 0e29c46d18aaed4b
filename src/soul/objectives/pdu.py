"""Primal-dual unlearning: flat logits under a constraint on the retain loss."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from soul.forward import Answers
from soul.objectives.base import Batch, Objective
from soul.objectives.public import public_margin
from soul.objectives.schedule import RetainSchedule
from soul.reference import Reference
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("pdu")
@dataclasses.dataclass(frozen=True)
class PDU(Objective):
    """Flatten the logits of forget answers while the retain loss stays below a bound (arXiv 2506.05314).

    ``min mean_t (max_v z_v(t) - mean_v z_v(t))^2  subject to  L_retain <= epsilon``, mean over answer tokens. The
    weight of the retain term is the constraint's multiplier, ascended after each step (``retain_schedule``). The forget
    term is a square of logits, so the multiplier starts high. ``compat="open-unlearning"`` flattens the positions of
    answer tokens, not those before them: what predicts the first answer token is left alone.
    """

    retain_weight: float = 50.0
    retain_schedule: RetainSchedule = dataclasses.field(default_factory=lambda: RetainSchedule("dual", rate=5.0))
    codes: ClassVar[tuple[str, ...]] = ("open-unlearning",)

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the squared margins between the largest and the mean logit, summed over tokens."""
        del reference, logps_N
        logits = answers.wide_logits("forget")
        return (logits.amax(dim=-1) - logits.mean(dim=-1)).square().sum()

    def public_terms(self, model: nn.Module, batch: Batch, reference: Reference) -> dict[str, Term]:
        """Return the terms that ``compat`` computes in place of the formula's."""
        terms = super().public_terms(model, batch, reference)
        return terms | ({"forget": public_margin(model, batch)} if self.compat in self.codes else {})

    @property
    def public_counts(self) -> dict[str, int]:
        """Items of :meth:`public_terms`."""
        return super().public_counts | ({"forget": 1} if self.compat in self.codes else {})
