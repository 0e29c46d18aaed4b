"""Negative preference optimization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("npo")
@dataclasses.dataclass(frozen=True)
class NPO(Objective):
    """Treat forget answers as dispreferred, relative to the reference (arXiv 2404.05868, eq. 3).

    ``L = -(2/beta) mean_i log sigmoid(-beta [log p_theta(y_i|x_i) - log p_ref(y_i|x_i)])``, log-ratios summed over each
    answer, mean over sequences. As beta -> 0 it becomes gradient ascent on the sequence.

    Attributes:
        beta: Inverse temperature, above 0.
    """

    beta: float = 0.1
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"
    needs_logps: ClassVar[tuple[str, ...]] = ("forget",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the summed NPO loss of the forget rows."""
        ratio_B = answers.sum_rows(logps_N) - reference.sequence_logps(answers)
        rows = answers.view_B == VIEWS.index("forget")
        return -(2 / self.beta) * logsigmoid(-self.beta * ratio_B[rows]).sum()
