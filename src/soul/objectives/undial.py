"""Self-distillation on adjusted logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from soul.forward import Answers, wide
from soul.objectives.base import Batch, Objective, Retain
from soul.objectives.public import public_undial
from soul.reference import Reference
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("undial")
@dataclasses.dataclass(frozen=True)
class Undial(Objective):
    """Distil the reference with the forget token's logit struck down (UNDIAL, arXiv 2402.10052).

    ``L = mean_t H(softmax(z_ref(t) - strength * onehot(y_t)), p_theta(.|t))``, cross-entropy, mean over the answer
    tokens of the forget set. Bounded below, and its optimum is a fixed model. No retain term by default, as there.
    ``compat="open-unlearning"`` averages over all positions, where the label -100 of prompts and padding strikes down
    the vocabulary's hundredth entry from its end.

    Attributes:
        strength: What is taken off the logit (gamma there), 0 or more.
    """

    retain: Retain = "none"
    strength: float = 10.0
    distribution_views: ClassVar[tuple[str, ...]] = ("forget",)
    codes: ClassVar[tuple[str, ...]] = ("open-unlearning",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0:
            raise ValueError(f"strength must be 0 or more, not {self.strength}")

    @property
    def needs_distributions(self) -> tuple[str, ...]:
        """Views whose full reference distributions are needed."""
        needed = super().needs_distributions
        return tuple(view for view in needed if view != "forget") if self.compat in self.codes else needed

    @property
    def needs_model(self) -> bool:
        """Whether the reference must answer as a model."""
        return self.compat in self.codes or super().needs_model

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the cross-entropy to the struck-down reference, summed over tokens."""
        del reference, logps_N
        ours = answers.wide_logits("forget").log_softmax(dim=-1)
        theirs = wide(answers.reference_NV["forget"]).to(ours.device, ours.dtype)
        targets = answers.targets_N[answers.select("forget")][:, None]
        struck = theirs.scatter_add(-1, targets, torch.full_like(theirs[:, :1], -self.strength))
        return -(struck.softmax(dim=-1) * ours).sum()

    def public_terms(self, model: nn.Module, batch: Batch, reference: Reference) -> dict[str, Term]:
        """Return the terms that ``compat`` computes in place of the formula's."""
        terms = super().public_terms(model, batch, reference)
        if self.compat in self.codes:
            terms["forget"] = public_undial(model, batch, reference, self.strength)
        return terms

    @property
    def public_counts(self) -> dict[str, int]:
        """Items of :meth:`public_terms`."""
        return super().public_counts | ({"forget": 1} if self.compat in self.codes else {})
