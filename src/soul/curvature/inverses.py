"""Dividing by Kronecker factors: by their damped inverses, or in their eigenbases by the moments found there."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from soul import processes
from soul.curvature.kronecker import KroneckerFactors, blend, fade
from soul.types import LostModelError

WIDE = 256
"""Rows from which on a product in bf16 is worth its rounding."""
ROUNDED = 0.01
"""Least damping at which a product may be rounded to bf16: with less, rounding puts back what was divided away."""


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Return ``M + damping tr(M)/n I``; the identity where the matrix is 0, which knows of no direction.

    Raises:
        LostModelError: It is not finite.
    """
    mean = float(matrix.diagonal().mean())
    if not math.isfinite(mean):
        raise LostModelError("a curvature factor is not finite: the weights are lost, lower optimizer.lr")
    if not mean > 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    out = matrix.clone()
    out.diagonal().add_(damping * mean)
    return out


def inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Return ``(M + damping tr(M)/n I)^-1``, in float64 where the precision of ``M`` does not suffice.

    Damping is a share of the mean eigenvalue, so that it means the same in every layer; it must be above 0 where ``M``
    is singular, as it is with fewer positions than inputs.
    """
    root, failed = torch.linalg.cholesky_ex(damped(matrix, damping))
    if bool(failed):
        root = torch.linalg.cholesky(damped(matrix.double(), damping))
    return torch.cholesky_inverse(root).to(matrix.dtype)


def floor_of(factors: KroneckerFactors, name: str) -> torch.Tensor:
    """Return the mean eigenvalue of ``G_B``, which damping counts beside that of ``G_A`` in the first half of a LoRA.

    ``G_A = B^T G_B B`` is next to nothing while ``B`` is, and a step in that metric alone moves ``A`` by many times its
    length. So damping is never less than if the columns of ``B`` were of about length 1.
    """
    return factors.outputs(factors.through[name]).diagonal().mean()


class KroneckerInverse:
    """``D -> (G + damping)^-1 D (A + damping)^-1``, with both inverses kept until the factors change.

    Inverses are found in fp32 at least. Kept and multiplied in bf16 they take half of the memory and, where the
    hardware multiplies bf16, less than half of the time. On a 135M model with both sides, ``(m . u)^2 / <u, F u>``
    (first-order gain for the curvature it costs) changes by .02 % at a damping of .1 and .1 % at .01. Inputs alone with
    a damping of .003 lose seven eighths of it: a language model has inputs with eigenvalues thousands of times the
    mean, and what rounding leaves along them costs more than all the rest. So little damping is always exact.

    Args:
        factors: The factors.
        damping: Share of each factor's mean eigenvalue that is added to it.
        outputs: Divide by ``G`` too; without it only inputs are whitened, ``D (A + damping)^-1``.
        products: Dtype that inverses of at least :data:`WIDE` rows are kept and multiplied in; None for their own.

    Raises:
        ValueError: ``damping`` is not above 0.
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        damping: float,
        *,
        outputs: bool = True,
        products: torch.dtype | None = None,
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping must be above 0, not {damping}")
        self.factors, self.damping, self.outputs, self.products = factors, damping, outputs, products
        self._version = -1
        self._left: dict[str, torch.Tensor] = {}
        self._right: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, matrix_OI: torch.Tensor) -> torch.Tensor:
        """Return the preconditioned matrix of a layer, in its dtype."""
        right = self._right_of(name)
        result = matrix_OI.to(right.dtype) @ right
        if self.outputs:
            left = self._left_of(name)
            result = left @ result.to(left.dtype)
        return result.to(matrix_OI.dtype)

    def _right_of(self, name: str) -> torch.Tensor:
        self._forget_stale()
        shared = self.factors.input_of(name)
        if shared not in self._right:
            self._right[shared] = self._inverse(self.factors.inputs(shared))
        return self._right[shared]

    def _left_of(self, name: str) -> torch.Tensor:
        self._forget_stale()
        if name in self.factors.through:  # which moves with B
            g = self.factors.outputs(name)
            g.diagonal().add_(self.damping * floor_of(self.factors, name))
            return inverse(g, self.damping)
        if name not in self._left:
            self._left[name] = self._inverse(self.factors.outputs(name))
        return self._left[name]

    def _forget_stale(self) -> None:
        if self._version != self.factors.version:
            self._left, self._right, self._version = {}, {}, self.factors.version

    def _inverse(self, factor: torch.Tensor) -> torch.Tensor:
        found = inverse(factor, self.damping)
        exact = self.products is None or len(found) < WIDE or self.damping < ROUNDED
        # rows in order, as a file keeps them: products of another layout round otherwise
        return (found if exact else found.to(self.products)).contiguous()

    def derivation(self) -> str:
        """Name what the inverses depend on beside the factors."""
        return f"inverses, damping {self.damping!r}, products {self.products}, outputs {self.outputs}"

    @torch.no_grad()
    def derived(self) -> dict[str, torch.Tensor]:
        """Return all inverses by name, found now where they were not: ``<layer>.left`` and ``<layer>.right``."""
        names = [name for name in self.factors.layers if self.factors.knows(name)]
        right = {f"{n}.right": self._right_of(n) for n in names if self.factors.input_of(n) == n}
        left = [n for n in names if n not in self.factors.through] if self.outputs else []
        return right | {f"{n}.left": self._left_of(n) for n in left}

    def load_derived(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over another's :meth:`derived` from the same factors."""
        self._forget_stale()
        for key, value in state.items():
            name, _, side = key.rpartition(".")
            kept = self._left if side == "left" else self._right
            kept[name] = value.to(self.factors.layers[name].weight.device)


class EigenInverse:
    """EK-FAC (arXiv 1806.03884): K-FAC's eigenbases with the true second moments along them.

    With ``A = Q_A diag(.) Q_A^T`` and ``G`` likewise, ``D -> Q_G [(Q_G^T D Q_A) / (L + damping mean(L))] Q_A^T``, where
    ``L[o, i] = E[(Q_G^T g a^T Q_A)[o, i]^2]`` is estimated by :meth:`add` and :meth:`absorb`. ``L`` begins as
    K-FAC's own, the outer product of the eigenvalues. First halves of LoRA keep it: their ``G_A`` and its eigenvectors
    are those of ``B`` as it is, and :attr:`moments` holds their inputs' eigenvalues alone.

    Args:
        factors: The factors; both sides.
        damping: Share of a layer's mean ``L`` that is added to it.
    """

    def __init__(self, factors: KroneckerFactors, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"damping must be above 0, not {damping}")
        self.factors, self.damping = factors, damping
        self._bases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.moments: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    @property
    def ready(self) -> bool:
        """Whether factors have been taken in, so that there are bases to correct in."""
        return self.factors.version > 0

    def state(self) -> dict[str, torch.Tensor]:
        """Return bases and moments, by layer; nothing is copied."""
        parts = {f"{n}.g_basis": q for n, (q, _) in self._bases.items()}
        parts |= {f"{n}.a_basis": q for n, (_, q) in self._bases.items()}
        return parts | {f"{n}.moments": v for n, v in self.moments.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over another's :meth:`state`, as copies."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition(".")
            found.setdefault(part, {})[name] = value.to(self.factors.layers[name].weight.device, copy=True)
        sides = found.get("g_basis", {}), found.get("a_basis", {})
        first = found.get("kfac", {}).keys() & self.factors.through.keys()  # older states' are of a B that was 0
        self._bases = {name: (sides[0][name], sides[1][name]) for name in sides[0] if name not in first}
        self.moments = found.get("kfac", {}) | found.get("moments", {})  # older states keep K-FAC's own beside them

    @torch.no_grad()
    def basis(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(Q_G, Q_A)`` of a layer, found once and then kept whatever the factors do."""
        if name not in self._bases:
            a, g = self.factors.inputs(name), self.factors.outputs(name)
            a_values, a_vectors = torch.linalg.eigh(a)
            g_values, g_vectors = torch.linalg.eigh(torch.eye(len(g)).to(g) if name in self.factors.through else g)
            self._bases[name] = (g_vectors, a_vectors)
            self.moments[name] = torch.outer(g_values.clamp(min=0), a_values.clamp(min=0))
        return self._bases[name]

    def _moments_of(self, name: str) -> torch.Tensor:
        self.basis(name)
        return self.moments[name]

    def rotate(self, name: str, matrix_OI: torch.Tensor) -> torch.Tensor:
        """Return ``Q_G^T D Q_A``."""
        q_g, q_a = self.basis(name)
        return q_g.T @ matrix_OI.to(q_a.dtype) @ q_a

    @torch.no_grad()
    def add(self, name: str, gradient_OI: torch.Tensor) -> None:
        """Add a micro-batch's square along the eigenvectors to the estimate of ``L``, where there is one.

        Args:
            name: The layer.
            gradient_OI: Gradient of a random cotangent (a whole curvature pass, terms between positions included). The
                cotangents' weights sum to 1 over the micro-batches of all processes, so that squares add up to an
                unbiased estimate (:mod:`soul.curvature.estimators`).
        """
        if name in self.factors.through:
            return
        squared = self.rotate(name, gradient_OI).square_()
        self._squares[name] = self._squares[name].add_(squared) if name in self._squares else squared

    @torch.no_grad()
    def absorb(self, share: float = 1.0) -> None:
        """Take in what was added, in all processes: ``L <- L + share (L_new - L)``; share 1 replaces the old.

        To be called before the factors take in theirs: a process that saw nothing of a layer finds its basis here.
        """
        seen = sorted(set().union(*processes.gather(list(self._squares))))  # in the same order everywhere
        for name in seen:
            squared = self._squares[name] if name in self._squares else torch.zeros_like(self._moments_of(name))
            if processes.count() > 1:
                dist.all_reduce(squared)
            blend(self.moments, name, squared, share)
        if seen:
            fade({n: m for n, m in self.moments.items() if n not in self.factors.through}, seen, share)
        self._squares = {}

    @torch.no_grad()
    def __call__(self, name: str, matrix_OI: torch.Tensor) -> torch.Tensor:
        """Return the preconditioned matrix of a layer, in its dtype."""
        q_g, q_a = self.basis(name)
        moments, least = self.moments[name], 0.0
        if name in self.factors.through:
            least = float(floor_of(self.factors, name) * moments.mean())
            values, q_g = torch.linalg.eigh(self.factors.outputs(name))
            moments = values.clamp(min=0)[:, None] * moments
        rotated = q_g.T @ matrix_OI.to(q_a.dtype) @ q_a
        mean = float(moments.mean()) + least
        if mean > 0:
            rotated = rotated / (moments + self.damping * mean)
        return (q_g @ rotated @ q_a.T).to(matrix_OI.dtype)
