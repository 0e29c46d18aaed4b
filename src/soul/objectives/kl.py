"""Gradient ascent with KL on the retain set."""

from __future__ import annotations

import dataclasses

from soul.objectives.base import Retain
from soul.objectives.ga import GradDiff
from soul.registry import OBJECTIVES


@OBJECTIVES.register("kl")
@dataclasses.dataclass(frozen=True)
class KLMinimization(GradDiff):
    """Ascend on the forget answers while keeping what is said of the retain ones (arXiv 2401.06121 sec. 3.2).

    ``L = -mean NLL(forget) + retain_weight * mean_t KL(p_ref(.|t) || p_theta(.|t))``, means over answer tokens: the
    entropy of ``p_ref`` is in it and prompts are not.
    """

    retain: Retain = "kl"
