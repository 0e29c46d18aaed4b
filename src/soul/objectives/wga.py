"""Gradient ascent with weighted tokens: WGA and SatImp."""

from __future__ import annotations

import dataclasses

import torch

from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("wga")
@dataclasses.dataclass(frozen=True)
class WGA(Objective):
    """Gradient ascent in which tokens count as much as they are still believed (arXiv 2502.19301).

    ``L = mean_t p_theta(y_t)^alpha log p_theta(y_t)``, the weight without gradient, mean over answer tokens. It undoes
    the ``1/p`` that lets gradient ascent run away. Public code agrees with the formula.

    Attributes:
        alpha: Exponent, 0 or more; 0 is gradient ascent.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be 0 or more, not {self.alpha}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the weighted log-probabilities, summed over tokens."""
        del reference
        logps = logps_N[answers.select("forget")]
        return ((self.alpha * logps.detach()).exp() * logps).sum()
