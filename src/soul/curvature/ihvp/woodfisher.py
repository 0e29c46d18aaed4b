"""The inverse of a low-rank estimate of the curvature, by the Woodbury identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from soul.curvature.ihvp.base import Inverse, block_damping, curvature_gradients
from soul.curvature.products import single_rows, trainable
from soul.curvature.vectors import Vector, axpy_, wide

SLICE = 1 << 20
"""Columns of the gradients that are turned to float64 at a time."""


@torch.no_grad()
def woodbury(gram: torch.Tensor, dots: torch.Tensor, damping: float) -> torch.Tensor:
    """Return ``a`` such that ``(lambda + 1/m B^T B)^-1 v = (v - B^T a) / lambda``, the ``m`` rows of ``B`` gradients.

    ``a = (lambda m + B B^T)^-1 B v``, an ``m`` by ``m`` system, solved in float64.

    Args:
        gram: ``B B^T``.
        dots: ``B v``.
        damping: ``lambda``, above 0.
    """
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    root = torch.linalg.cholesky(gram.double() + damping * len(gram) * eye)
    return torch.cholesky_solve(dots.double()[:, None], root)[:, 0]


class WoodFisher(Inverse):
    """``u = (lambda + 1/m sum_i g_i g_i^T)^-1 v``, exactly, for each parameter tensor or for all together.

    WoodFisher (arXiv 2004.14340) reaches the same matrix by ``m`` rank-one updates of the inverse, each of which needs
    ``F_{i-1}^{-1} g_i`` and so all gradients before it. The recursion that is often run in its place keeps one vector,
    ``o <- o (1 - g_i.o / (m + g_i.o))``, which only ever rescales ``g_0``: it subtracts from ``v`` a multiple of
    the first gradient. Here the gradients are kept, and one ``m`` by ``m`` system is solved.

    The gradients are of random cotangents (:func:`soul.curvature.ihvp.base.curvature_gradients`), not of the labels,
    whose gradients vanish on what a model has learned by heart. They take ``rank`` times the memory of the parameters;
    where that is more than ``buffers`` allows, parameters are taken in turns. They are made anew in every call.
    """

    def prepare(self) -> None:
        """Count the gradients: ``rank``, or a little more where every group of micro-batches gives equally many.

        With fewer micro-batches than gradients, rows stand alone: a pass over them then gives a gradient each.
        """
        if len(self.batches) < self.spec.rank:
            self.batches = single_rows(self.batches)
        groups = min(self.spec.rank, len(self.batches))
        self.rank = -(-self.spec.rank // groups) * groups

    def __call__(self, v: Vector) -> Vector:
        """Return ``u``."""
        params = trainable(self.model)
        most = self.spec.buffers * sum(p.numel() for p in params.values()) / self.rank
        turns = _turns({name: p.numel() for name, p in params.items() if name in v}, most)
        return (self._by_block if self.spec.blocks else self._whole)(v, params, turns)

    def _by_block(self, v: Vector, params: dict[str, nn.Parameter], turns: list[list[str]]) -> Vector:
        u: Vector = {}
        damping = self._block_damping(params)
        for names in turns:
            for name, rows in self._buffer(params, [name for name in names if name in damping]):
                gram, dots = _products(rows, v[name].flatten())
                shares = woodbury(gram, dots, damping[name])
                u[name] = torch.empty_like(v[name])
                parts = (x.flatten().split(SLICE) for x in (v[name], u[name]))
                for right, solved, part in zip(*parts, rows.split(SLICE, dim=1), strict=True):
                    solved.copy_((right.double() - part.double().T @ shares) / damping[name])
        return u

    def _block_damping(self, params: dict[str, nn.Parameter]) -> dict[str, float]:
        traces: dict[str, float] = {}
        for g in curvature_gradients(self.model, self.batches, self.spec.rank, self.seed, params):
            for name, value in g.items():
                traces[name] = traces.get(name, 0.0) + float(value.double().square().sum()) / self.rank
        return block_damping(self.spec.damping, traces, {name: p.numel() for name, p in params.items()})

    def _whole(self, v: Vector, params: dict[str, nn.Parameter], turns: list[list[str]]) -> Vector:
        sums: list[torch.Tensor] = []
        for names in turns:
            for name, rows in self._buffer(params, names):
                parts = _products(rows, v[name].flatten())
                sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else list(parts)
        size = sum(value.numel() for value in v.values())
        if not sums:
            return {}
        gram, dots = sums
        damping = self.spec.damping * float(gram.diagonal().mean()) / size
        if not damping > 0:
            return {}
        u = {name: value / damping for name, value in v.items()}
        gradients = curvature_gradients(self.model, self.batches, self.spec.rank, self.seed, {n: params[n] for n in v})
        for share, g in zip(woodbury(gram, dots, damping).tolist(), gradients, strict=True):
            axpy_(u, -share / damping, g)
        return u

    def _buffer(self, params: dict[str, nn.Parameter], names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter's gradients as a matrix ``[m, n]``, from one set of passes for all names."""
        mine = {name: params[name] for name in names}
        kept = {name: wide(p.new_zeros(self.rank, p.numel())) for name, p in mine.items()}
        for i, g in enumerate(curvature_gradients(self.model, self.batches, self.spec.rank, self.seed, mine)):
            for name, value in g.items():
                kept[name][i] = value.flatten()
            g.clear()
        for name in names:
            yield name, kept.pop(name)


@torch.no_grad()
def _products(rows: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``B B^T`` and ``B v`` in float64, a slice of columns at a time."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    dots = rows.new_zeros(len(rows), dtype=torch.float64)
    for part, v in zip(rows.split(SLICE, dim=1), right.split(SLICE), strict=True):
        wide_part = part.double()
        gram += wide_part @ wide_part.T
        dots += wide_part @ v.double()
    return gram, dots


def _turns(sizes: dict[str, int], most: float) -> list[list[str]]:
    """Deal parameters to turns, in their order, each with at most ``most`` numbers or a single parameter."""
    turns: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not turns or held + size > most:
            turns.append([])
            held = 0
        turns[-1].append(name)
        held += size
    return turns
