"""Vectors over a model's parameters: one tensor a name. A name that is missing stands for zeros."""

from __future__ import annotations

import math

import torch

Vector = dict[str, torch.Tensor]
"""Keyed by the names of ``model.named_parameters()``; in fp32 at least, whatever the weights' dtype."""


@torch.no_grad()
def dot(a: Vector, b: Vector) -> float:
    """Return ``a . b``, each tensor's part in its own dtype and the parts in float64.

    Example:
        >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0]), "b": torch.ones(1)})
        11.0
    """
    return sum(float(torch.dot(a[name].flatten(), b[name].flatten())) for name in a if name in b)


def norm(a: Vector) -> float:
    """Return the Euclidean norm of ``a``."""
    return math.sqrt(dot(a, a))


@torch.no_grad()
def axpy_(y: Vector, alpha: float, x: Vector) -> Vector:
    """Add ``alpha x`` to ``y`` in place, and return ``y``.

    Example:
        >>> axpy_({"w": torch.ones(2)}, 2.0, {"w": torch.ones(2)})
        {'w': tensor([3., 3.])}
    """
    for name, value in x.items():
        if name in y:
            y[name].add_(value, alpha=alpha)
        else:
            y[name] = value * alpha
    return y


def copy(a: Vector) -> Vector:
    """Return a copy that shares no memory with ``a``."""
    return {name: value.clone() for name, value in a.items()}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in fp32 at least, the same tensor where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
