"""EK-FAC: K-FAC's eigenbases with the true second moments along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from soul.curvature.inverses import EigenInverse
from soul.curvature.spec import CurvatureSpec
from soul.optim._kronecker_cost import kronecker_cost
from soul.optim.cost import RuleCost
from soul.optim.kfac import KFACSpec
from soul.optim.kronecker import KroneckerRule
from soul.registry import OPTIMIZERS


@OPTIMIZERS.register("ekfac")
@dataclasses.dataclass(frozen=True)
class EKFACSpec(KFACSpec):
    """Natural gradient by Kronecker factors with corrected eigenvalues (EK-FAC, arXiv 1806.03884).

    The eigenbases are found at the first refresh and kept. The moments along them begin as K-FAC's own, which count as
    many refreshes as the warm start is worth, and every later refresh corrects them. There must be later ones.
    """

    curvature: CurvatureSpec = dataclasses.field(
        default_factory=lambda: CurvatureSpec(warm_start=8, interval=1, general_text=2)
    )

    def __post_init__(self) -> None:
        if self.curvature.shuffled:
            raise ValueError("curvature.shuffled does not know ekfac: its moments belong to its bases; use kfac")
        super().__post_init__()
        if not self.curvature.interval:
            raise ValueError(
                "ekfac corrects its moments at refreshes after the first: curvature.interval must be 1 or more"
            )

    def build(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], model: nn.Module | None = None
    ) -> KroneckerRule:
        """Return the rule over ``params`` of ``model``."""
        factors = self.factors_of(model)
        return self.rule(params, factors, EigenInverse(factors, self.damping), self.newton)

    def cost(self, params: Sequence[torch.Tensor], model: nn.Module | None = None, device: str = "cpu") -> RuleCost:
        """Return the cost of momentum, both factors, their eigenbases and the moments along them."""
        del device
        assert model is not None, "a rule that watches layers is planned with its model"
        diagonal = self.others == "diagonal"
        return kronecker_cost(params, model, "eigen", largest=self.max_dim, diagonal=diagonal, every=self.every)
