"""Gradient ascent weighted by saturation and importance."""

from __future__ import annotations

import dataclasses

import torch

from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("satimp")
@dataclasses.dataclass(frozen=True)
class SatImp(Objective):
    """Gradient ascent on tokens that are neither forgotten yet nor beyond doubt (arXiv 2505.11953 sec. 5).

    ``L = mean_t p^beta1 (1 - p)^beta2 log p`` with ``p = p_theta(y_t)`` and the weight without gradient, mean over
    answer tokens. Public code agrees; of the two settings in circulation for the terms' weights, 1 and 0.1 are the
    paper's (forget, retain), and here the default.

    Attributes:
        beta1: Exponent of saturation, 0 or more.
        beta2: Exponent of importance, 0 or more.
    """

    retain_weight: float = 0.1
    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the weighted log-probabilities, summed over tokens."""
        del reference
        logps = logps_N[answers.select("forget")]
        p = logps.detach().exp()
        return (p**self.beta1 * (1 - p) ** self.beta2 * logps).sum()
