"""Fine-tuning on the retain set."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("ft")
@dataclasses.dataclass(frozen=True)
class FineTune(Objective):
    """Train on the retain set alone and hope for forgetting: ``L = mean NLL(retain)``. Also how a model is taught."""

    forget_views: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain == "none":
            raise ValueError(f"{self.name} has nothing but its retain term: retain must be nll, kl or hidden")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return 0: there is no forget term."""
        del reference, answers
        return logps_N.new_zeros(())
