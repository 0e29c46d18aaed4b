"""Negative preference optimization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Batch, Objective
from soul.objectives.public import public_npo
from soul.reference import Reference
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("npo")
@dataclasses.dataclass(frozen=True)
class NPO(Objective):
    """Treat forget answers as dispreferred, relative to the reference (arXiv 2404.05868, eq. 3).

    ``L = -(2/beta) mean_i log sigmoid(-beta [log p_theta(y_i|x_i) - log p_ref(y_i|x_i)])``, log-ratios summed over each
    answer, mean over sequences. As beta -> 0 it becomes gradient ascent on the sequence. ``compat="soul"`` takes one
    ratio of mean losses for a whole batch, ``compat="muse"`` one for each entry of the vocabulary, of raw logits.

    Attributes:
        beta: Inverse temperature, above 0.
    """

    beta: float = 0.1
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"
    logps_views: ClassVar[tuple[str, ...]] = ("forget",)
    codes: ClassVar[tuple[str, ...]] = ("soul", "muse")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the summed NPO loss of the forget rows."""
        ratio_B = answers.sum_rows(logps_N) - reference.sequence_logps(answers)
        rows = answers.view_B == VIEWS.index("forget")
        return -(2 / self.beta) * logsigmoid(-self.beta * ratio_B[rows]).sum()

    @property
    def needs_model(self) -> bool:
        """Whether the reference must answer as a model."""
        return self.compat in self.codes or super().needs_model

    def public_terms(self, model: nn.Module, batch: Batch, reference: Reference) -> dict[str, Term]:
        """Return the terms that ``compat`` computes in place of the formula's."""
        terms = super().public_terms(model, batch, reference)
        if self.compat in self.codes:
            terms["forget"] = public_npo(self.compat, model, batch, reference, self.beta)
        return terms

    @property
    def public_counts(self) -> dict[str, int]:
        """Items of :meth:`public_terms`."""
        return super().public_counts | ({"forget": 1} if self.compat in self.codes else {})
