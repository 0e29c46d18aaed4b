"""Maximised entropy."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES

TINY = 1e-12


@OBJECTIVES.register("me")
@dataclasses.dataclass(frozen=True)
class MaximizedEntropy(Objective):
    """Make the model unsure at each token of a forget answer (ME, arXiv 2410.08109).

    ``L = mean_t KL(p_theta(.|t) || uniform) = mean_t [log V - H(p_theta(.|t))]``, mean over answer tokens; 0 at the
    uniform distribution. ``compat="closer-look"`` is the other direction, ``KL(uniform || p)`` with ``p + 1e-12``, as
    the paper's code has it: unlikely tokens weigh far more.
    """

    codes: ClassVar[tuple[str, ...]] = ("closer-look",)

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the divergence from or to the uniform distribution, summed over tokens."""
        del reference, logps_N
        logs = answers.wide_logits("forget").log_softmax(dim=-1)
        if self.compat == "closer-look":
            return (-math.log(logs.shape[-1]) - (logs.exp() + TINY).log().mean(dim=-1)).sum()
        return (math.log(logs.shape[-1]) + (logs.exp() * logs).sum(dim=-1)).sum()
