"""The cheapest inverses: none, and one number a parameter."""

from __future__ import annotations

import torch

from soul.curvature.ihvp.base import Inverse, block_damping
from soul.curvature.products import count_answers, curvature_pass
from soul.curvature.vectors import Vector, copy


class Identity(Inverse):
    """``u = v``: plain gradient ascent, what every other inverse has to beat."""

    def __call__(self, v: Vector) -> Vector:
        """Return a copy of ``v``."""
        return copy(v)


class Diagonal(Inverse):
    """``u = v / (diag C + lambda_b)``, the diagonal a mean of squared gradients of random cotangents.

    Each micro-batch is squared on its own, so the estimate's relative standard deviation falls as ``sqrt(2 / (draws *
    micro-batches))`` where these are alike.
    """

    def prepare(self) -> None:
        """Estimate the diagonal; one buffer of the size of the parameters."""
        self.diagonal: Vector = {}
        weight = 1 / (count_answers(self.batches) * self.spec.draws)

        def take(name: str, grad: torch.Tensor) -> None:
            if name in self.diagonal:
                self.diagonal[name].addcmul_(grad, grad)
            else:
                self.diagonal[name] = grad.square_()

        for draw in range(self.spec.draws):
            for i, batch in enumerate(self.batches):
                curvature_pass(self.model, batch, weight, take, seed=[self.seed, draw, i, 6])
        traces = {name: float(d.sum()) for name, d in self.diagonal.items()}
        self.damping = block_damping(self.spec.damping, traces, {n: d.numel() for n, d in self.diagonal.items()})

    @torch.no_grad()
    def __call__(self, v: Vector) -> Vector:
        """Return ``v / (diag C + lambda_b)``."""
        known = {name: value for name, value in v.items() if name in self.damping}
        return {name: value / (self.diagonal[name] + self.damping[name]) for name, value in known.items()}
