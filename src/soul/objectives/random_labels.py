"""Random labels: another question's answer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("random_labels")
@dataclasses.dataclass(frozen=True)
class RandomLabels(Objective):
    """Learn answers to the forget questions that belong to other questions (random mismatch, arXiv 2310.10683).

    ``L = mean NLL(y_random | x_forget) + retain``, mean over answer tokens; ``y_random`` is the answer of a retain
    example drawn anew in each epoch. SOUL's code takes that of the paired retain example, cut where its padding and
    the original answer's attention mask happen to end; that is not reproduced.
    """

    forget_views: ClassVar[tuple[str, ...]] = ("mismatch",)

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the NLL of the mismatched answers, summed over tokens."""
        del reference
        return -logps_N[answers.select("mismatch")].sum()
