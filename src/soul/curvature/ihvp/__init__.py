"""Inverse-curvature-vector products: one verb, ``u = ihvp(v)``, and several ways to have it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from soul.curvature.ihvp.base import Inverse, InverseSpec
from soul.curvature.ihvp.cg import ConjugateGradient
from soul.curvature.ihvp.diagonal import Diagonal, Identity
from soul.curvature.ihvp.factored import EkFac, KFac, Whitening
from soul.curvature.ihvp.woodfisher import WoodFisher
from soul.data.batches import Batch

INVERSES: dict[str, type[Inverse]] = {
    "identity": Identity,
    "diagonal": Diagonal,
    "woodfisher": WoodFisher,
    "cg": ConjugateGradient,
    "kfac": KFac,
    "ekfac": EkFac,
    "whiten": Whitening,
}
"""The inverses by the name a recipe gives them."""

__all__ = ["INVERSES", "Inverse", "InverseSpec", "inverse_class", "make_inverse"]


def inverse_class(name: str) -> type[Inverse]:
    """Return the inverse called ``name``.

    Raises:
        ValueError: Unknown name.
    """
    if name not in INVERSES:
        raise ValueError(f"unknown inverse {name!r}; known: {', '.join(INVERSES)}")
    return INVERSES[name]


def make_inverse(
    name: str, model: nn.Module, batches: Sequence[Batch], spec: InverseSpec | None = None, seed: int = 0
) -> Inverse:
    """Build an inverse of the curvature of the mean loss over ``batches``.

    Example:
        >>> ihvp = make_inverse("ekfac", model, batches)  # doctest: +SKIP
        >>> update = ihvp(gradient)  # doctest: +SKIP
    """
    return inverse_class(name)(model, batches, spec, seed)
