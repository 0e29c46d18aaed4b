"""K-FAC: natural-gradient steps in the Kronecker-factored curvature of the retain loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from soul.curvature.inverses import KroneckerInverse
from soul.machine import has_bf16
from soul.optim._checks import check_between
from soul.optim._kronecker_cost import kronecker_cost
from soul.optim.cost import RuleCost
from soul.optim.kronecker import KroneckerRule
from soul.optim.kronecker_spec import KroneckerSpec
from soul.registry import OPTIMIZERS


@OPTIMIZERS.register("kfac")
@dataclasses.dataclass(frozen=True)
class KFACSpec(KroneckerSpec):
    """Natural gradient by Kronecker factors (K-FAC, arXiv 1503.05671), bounded in predicted retain KL.

    ``1/2 lr^2`` is the KL (nats a token) a step is predicted to cost on the curvature's source. A few of these steps
    from the forget gradient are Gauss-Newton unlearning (arXiv 2602.10568).

    Attributes:
        newton: Largest share of the full Newton step; 0 for no bound.
        products: ``auto`` multiplies by the inverses in bf16 where the hardware does so and weights are fp32, unless
            damping is too small for it; ``exact`` never.
    """

    newton: float = 0.0
    products: Literal["auto", "exact"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("newton", self.newton, 0.0, float("inf"))

    def build(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], model: nn.Module | None = None
    ) -> KroneckerRule:
        """Return the rule over ``params`` of ``model``."""
        factors = self.factors_of(model)
        weight = next(iter(factors.layers.values())).weight
        rounded = self.products == "auto" and weight.dtype == torch.float32 and has_bf16(weight.device.type)
        inverse = KroneckerInverse(factors, self.damping, products=torch.bfloat16 if rounded else None)
        return self.rule(params, factors, inverse, self.newton)

    def cost(self, params: Sequence[torch.Tensor], model: nn.Module | None = None, device: str = "cpu") -> RuleCost:
        """Return the cost of momentum, both factors of each layer and their inverses."""
        assert model is not None, "a rule that watches layers is planned with its model"
        return kronecker_cost(
            params,
            model,
            "both",
            largest=self.max_dim,
            diagonal=self.others == "diagonal",
            every=self.every,
            damping=self.damping,
            rounds_on=device if self.products == "auto" and all(p.dtype == torch.float32 for p in params) else "",
        )
