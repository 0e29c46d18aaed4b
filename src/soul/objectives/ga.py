"""Gradient ascent and gradient difference."""

from __future__ import annotations

import dataclasses

import torch

from soul.forward import Answers
from soul.objectives.base import Objective, Retain
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("grad_diff")
@dataclasses.dataclass(frozen=True)
class GradDiff(Objective):
    """Ascend on the forget answers while descending on the retain ones (GradDiff, arXiv 2401.06121 sec. 3.2).

    ``L = -mean NLL(forget) + retain_weight * retain term``, means over answer tokens. Unbounded below: stop in time.
    """

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return ``sum log p`` over the forget answer tokens."""
        del reference
        return logps_N[answers.select("forget")].sum()


@OBJECTIVES.register("ga")
@dataclasses.dataclass(frozen=True)
class GradAscent(GradDiff):
    """Ascend on the forget answers alone: ``L = -mean NLL(forget)``. Destroys the model soon; a baseline."""

    retain: Retain = "none"
