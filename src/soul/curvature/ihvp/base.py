"""What an inverse is: built from a model and batches, it divides a vector by their damped curvature."""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from soul.curvature.kronecker import LARGEST, Layer, linear_layers
from soul.curvature.products import Jvp, add_to, count_answers, curvature_pass
from soul.curvature.vectors import Vector
from soul.data.batches import Batch


@dataclasses.dataclass(frozen=True)
class InverseSpec:
    """How the inverses are computed; each reads what concerns it.

    Attributes:
        damping: What is added to the curvature, as a share of its mean over a block of ``n_b`` numbers:
            ``lambda_b = damping tr(C_b) / n_b``. A block is a parameter tensor; for ``kfac``, ``ekfac`` and ``whiten``
            a layer, its bias included. A tensor whose mean is below a millionth of that over all tensors (the bias of
            keys, say, which cancels in the softmax) is damped as if it were that; one of no curvature is left alone.
        draws: Random cotangents for each micro-batch (all but ``identity``, ``woodfisher`` and ``whiten``).
        rank: Gradients that ``woodfisher`` keeps.
        blocks: ``woodfisher``: an inverse for each parameter; otherwise one for all of them together.
        buffers: ``woodfisher``: memory for gradients, in units of the trainable parameters. Where ``rank`` is larger,
            parameters are taken in turns, each with passes over the data of its own.
        iterations: ``cg``: most iterations.
        tolerance: ``cg``: residual relative to the right-hand side at which it stops.
        precondition: ``cg``: precondition by the damped diagonal.
        max_dim: ``kfac``, ``ekfac``, ``whiten``: widest side of a factor; wider layers are left alone. A factor takes
            ``4 max_dim^2`` bytes.
        jvp: ``cg``: how Jacobian-vector products are had (:class:`soul.curvature.products.GaussNewton`).
    """

    damping: float = 0.1
    draws: int = 4
    rank: int = 32
    blocks: bool = True
    buffers: float = 2.0
    iterations: int = 100
    tolerance: float = 1e-5
    precondition: bool = True
    max_dim: int = LARGEST
    jvp: Jvp = "auto"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping}: without it the inverse need not exist")
        for name in ("draws", "rank", "iterations", "max_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not (self.buffers > 0 and self.tolerance > 0):
            raise ValueError(f"buffers and tolerance must be above 0, not {self.buffers} and {self.tolerance}")
        if self.jvp not in get_args(Jvp):
            raise ValueError(f"jvp must be one of {', '.join(get_args(Jvp))}, not {self.jvp!r}")


class Inverse(abc.ABC):
    """``v -> u``, which approximates ``(C + lambda)^-1 v`` with ``C`` the Gauss-Newton matrix of a mean loss.

    ``C`` is that of the weights when the inverse was built, where the inverse keeps an estimate of it; ``cg`` and
    ``woodfisher`` look at the model again in every call.

    Args:
        model: A causal language model; the matrix is over its trainable parameters.
        batches: Micro-batches of the examples whose loss the curvature is of.
        spec: Settings.
        seed: Decides the random cotangents.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], spec: InverseSpec | None = None, seed: int = 0
    ) -> None:
        self.model, self.batches, self.spec, self.seed = model, list(batches), spec or InverseSpec(), seed
        self.prepare()

    @classmethod
    def covers(cls, model: nn.Module, spec: InverseSpec) -> tuple[dict[str, Layer], dict[str, Layer]]:
        """Return the linear layers inside the model that it can move, and those that are too wide for it."""
        del spec
        return linear_layers(model, sys.maxsize), {}

    def prepare(self) -> None:  # noqa: B027 - some inverses keep nothing
        """Estimate what is kept between calls."""

    @abc.abstractmethod
    def __call__(self, v: Vector) -> Vector:
        """Return ``u``. Names the inverse does not cover are missing from it: those parameters are left alone."""

    def report(self) -> dict[str, float]:
        """Return numbers about the last call worth logging."""
        return {}


FLOOR = 1e-6
"""Least mean curvature of a tensor, as a share of that over all: below lies what rounding makes of nothing."""


def block_damping(damping: float, traces: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return ``lambda_b = damping max(tr(C_b) / n_b, FLOOR tr(C) / n)`` for each tensor with any curvature.

    Example:
        >>> block_damping(0.1, {"w": 8.0, "b": 0.0}, {"w": 4, "b": 2})
        {'w': 0.2}
    """
    least = FLOOR * sum(traces.values()) / max(1, sum(sizes[name] for name in traces))
    return {name: damping * max(trace / sizes[name], least) for name, trace in traces.items() if trace > 0}


def curvature_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    rank: int,
    seed: int,
    params: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Vector]:
    """Yield ``m`` vectors ``g`` whose ``1/m sum g g^T`` is an unbiased estimate of the Gauss-Newton matrix.

    Micro-batches are dealt to ``k = min(rank, batches)`` groups, and each group gives one vector a round, in as many
    rounds as make ``m >= rank``. With a weight of ``k/N`` a token, a group's vector has ``E[g g^T]`` equal to ``k/N``
    times the sum over its tokens of ``J_i^T (diag p_i - p_i p_i^T) J_i``, and the mean over groups is ``G``.
    """
    groups = min(rank, len(batches))
    weight = groups / count_answers(batches)
    for number in range(-(-rank // groups) * groups):
        g: Vector = {}
        for i, batch in enumerate(batches[number % groups :: groups]):
            draw = [seed, number, i, 5]
            curvature_pass(model, batch, weight, add_to(g), seed=draw, params=params)
        yield g
