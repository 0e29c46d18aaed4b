"""Conjugate gradients on exact Gauss-Newton-vector products."""

from __future__ import annotations

import torch

from soul.curvature.ihvp.base import Inverse
from soul.curvature.ihvp.diagonal import Diagonal
from soul.curvature.products import GaussNewton
from soul.curvature.vectors import Vector, axpy_, copy, dot, norm


class ConjugateGradient(Inverse):
    """``u`` with ``|(G + lambda_b) u - v| <= tolerance |v|``, by preconditioned conjugate gradients.

    The damping of each parameter tensor is a share of its mean curvature, which a :class:`Diagonal` estimates; that is
    also the preconditioner. One iteration is one product with ``G``; one more measures the residual. Besides the
    diagonal it keeps ``u``, the residual, the direction and its product.
    """

    def prepare(self) -> None:
        """Estimate the diagonal."""
        self.product = GaussNewton(self.model, self.batches, self.spec.jvp)
        self.diagonal = Diagonal(self.model, self.batches, self.spec, self.seed)
        if not self.spec.precondition:
            self.diagonal.diagonal = {}
        self.last: dict[str, float] = {}

    def damped(self, v: Vector) -> Vector:
        """Return ``(G + lambda_b) v``, for the names of ``v``."""
        product = self.product(v)
        with torch.no_grad():
            return {
                name: product[name].add_(value, alpha=self.diagonal.damping[name])
                if name in product
                else value * self.diagonal.damping[name]
                for name, value in v.items()
            }

    def _precondition(self, r: Vector) -> Vector:
        return self.diagonal(r) if self.spec.precondition else r

    @torch.no_grad()
    def __call__(self, v: Vector) -> Vector:
        """Return ``u``; :meth:`report` says how near it came."""
        r = copy({name: value for name, value in v.items() if name in self.diagonal.damping})
        u = {name: torch.zeros_like(value) for name, value in r.items()}
        size = norm(r)
        z = self._precondition(r)
        p, rz = copy(z), dot(r, z)
        del z
        iterations, residual = 0, 1.0
        while size > 0 and residual > self.spec.tolerance and iterations < self.spec.iterations:
            q = self.damped(p)
            curvature = dot(p, q)
            if not curvature > 0:  # rounding, or differences that are too rough: what there is is the best there is
                break
            axpy_(u, rz / curvature, p)
            axpy_(r, -rz / curvature, q)
            del q
            iterations, residual = iterations + 1, norm(r) / size
            z = self._precondition(r)
            rz, before = dot(r, z), rz
            for name in p:
                p[name].mul_(rz / before).add_(z[name])
        if iterations:  # the residual above is carried from step to step, and rounding parts it from the true one
            q = self.damped(u)
            residual = norm({name: v[name] - value for name, value in q.items()}) / size
        self.last = {"cg_iterations": float(iterations), "cg_residual": residual}
        return u

    def report(self) -> dict[str, float]:
        """Return the iterations and the relative residual of the last call, measured at its end."""
        return self.last
