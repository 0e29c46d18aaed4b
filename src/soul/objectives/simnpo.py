"""NPO without a reference."""

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


@OBJECTIVES.register("simnpo")
@dataclasses.dataclass(frozen=True)
class SimNPO(Objective):
    """NPO with length-normalised likelihoods and no reference (arXiv 2410.07163, eq. 4).

    ``L = -(2/beta) mean_i log sigmoid(beta * NLL_i / |y_i| - gamma)``; where other code has a delta inside beta,
    ``gamma = beta * delta``.

    Attributes:
        beta: Inverse temperature, above 0.
        gamma: Margin.
    """

    beta: float = 4.5
    gamma: float = 0.0
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the summed SimNPO loss of the forget rows."""
        del reference
        nll_B = -answers.sum_rows(logps_N) / answers.sum_rows(torch.ones_like(logps_N)).clamp(min=1)
        rows = answers.view_B == VIEWS.index("forget")
        return -(2 / self.beta) * logsigmoid(self.beta * nll_B[rows] - self.gamma).sum()
