"""K-FAC: natural-gradient steps in the Kronecker-factored curvature of the retain loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from soul.curvature.kronecker import KroneckerInverse
from soul.optim._elementwise import check_between
from soul.optim.kronecker import KroneckerRule, KroneckerSpec
from soul.registry import OPTIMIZERS


@OPTIMIZERS.register("kfac")
@dataclasses.dataclass(frozen=True)
class KFACSpec(KroneckerSpec):
    """Natural gradient by Kronecker factors (K-FAC, arXiv 1503.05671), bounded in predicted retain KL.

    ``1/2 lr^2`` is the KL (nats a token) a step is predicted to cost on the curvature's source. A few of these steps
    from the forget gradient are Gauss-Newton unlearning (arXiv 2602.10568).

    Attributes:
        newton: Largest share of the full Newton step; 0 for no bound.
    """

    newton: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("newton", self.newton, 0.0, float("inf"))

    def build(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], model: nn.Module | None = None
    ) -> KroneckerRule:
        """Return the rule over ``params`` of ``model``."""
        factors = self.factors_of(model, outputs=True)
        return self.rule(params, factors, KroneckerInverse(factors, self.damping), self.newton)
