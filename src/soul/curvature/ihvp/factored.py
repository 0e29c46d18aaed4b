"""Inverses from Kronecker factors of linear layers; everything else, embeddings and head among it, is left alone."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import nn

from soul.curvature.ihvp.base import Inverse, InverseSpec, curvature_gradients
from soul.curvature.inverses import EigenInverse, KroneckerInverse
from soul.curvature.kronecker import KroneckerFactors, Layer, linear_layers, pack, too_wide, unpack
from soul.curvature.products import count_answers, curvature_pass, evaluating, on_device
from soul.curvature.vectors import Vector
from soul.data.batches import Batch
from soul.forward import forward_answers

Layerwise = Callable[[str, torch.Tensor], torch.Tensor]


class _Factored(Inverse, abc.ABC):
    """Applies an inverse to each linear layer's matrix, the bias as its last column.

    Covered are the layers of :func:`soul.curvature.kronecker.linear_layers`. Not covered, and left out of ``u``:
    embeddings, the head, norms, layers whose weight is shared, and those that no pass went through.
    """

    def prepare(self) -> None:
        """Watch the layers, and make what inverts them."""
        self.factors = KroneckerFactors(self.model, outputs=self.needs_outputs, largest=self.spec.max_dim)
        self.watch()
        self.factors.absorb()
        self.known = {name for name in self.factors.layers if self.factors.knows(name)}
        self.solve: Layerwise = self.build()

    needs_outputs = True

    @classmethod
    def covers(cls, model: nn.Module, spec: InverseSpec) -> tuple[dict[str, Layer], dict[str, Layer]]:
        """Return the layers with factors, and those that are wider than ``max_dim``."""
        outputs = cls.needs_outputs
        return linear_layers(model, spec.max_dim, outputs=outputs), too_wide(model, spec.max_dim, outputs=outputs)

    def watch(self) -> None:
        """Run the passes from which the factors come."""
        weight = 1 / (count_answers(self.batches) * self.spec.draws)
        for draw in range(self.spec.draws):
            for i, batch in enumerate(self.batches):
                with self.factors.observing(_real(self.model, batch)):
                    curvature_pass(self.model, batch, weight, _drop, seed=[self.seed, draw, i, 7])

    @abc.abstractmethod
    def build(self) -> Layerwise:
        """Return what inverts a layer."""

    def matrices(self, v: Vector) -> dict[str, torch.Tensor]:
        """Return the part of ``v`` that belongs to each covered layer, ``[O, I]`` or with a bias ``[O, I + 1]``."""
        return {
            name: pack(layer, v[f"{name}.weight"], v.get(f"{name}.bias"))
            for name, layer in self.factors.layers.items()
            if f"{name}.weight" in v and name in self.known
        }

    @torch.no_grad()
    def __call__(self, v: Vector) -> Vector:
        """Return ``u`` for the covered layers."""
        u: Vector = {}
        for name, matrix in self.matrices(v).items():
            weight, bias = unpack(self.factors.layers[name], self.solve(name, matrix))
            u[f"{name}.weight"] = weight
            if bias is not None and f"{name}.bias" in v:
                u[f"{name}.bias"] = bias
        return u


class KFac(_Factored):
    """``(A (x) G + lambda_b)^-1 v`` for each layer, damped exactly in the eigenbases (arXiv 1503.05671)."""

    def build(self) -> Layerwise:
        """Find the eigenbases, after which of the factors only what LoRA's first halves look through is needed."""
        return self._eigen()

    def _eigen(self) -> EigenInverse:
        solve = EigenInverse(self.factors, self.spec.damping)
        for name in sorted(self.known):
            solve.basis(name)
        needed = {f"{name}.outputs" for name in self.factors.through.values()}
        self.factors.load_state({k: v for k, v in self.factors.state().items() if k in needed}, copy=False)
        return solve


class EkFac(KFac):
    """K-FAC with the true second moments along its eigenvectors (arXiv 1806.03884)."""

    def build(self) -> Layerwise:
        """Find the eigenbases, then the moments, from passes of their own."""
        solve = self._eigen()
        params = dict(self.model.named_parameters())
        wanted = {
            f"{name}.{part}": params[f"{name}.{part}"]
            for name, layer in self.factors.layers.items()
            for part, p in layer.named_parameters(recurse=False)
            if p.requires_grad
        }
        rank = self.spec.draws * len(self.batches)
        for n, g in enumerate(curvature_gradients(self.model, self.batches, rank, self.seed, wanted), 1):
            for name, matrix in self.matrices(g).items():
                solve.add(name, matrix)
            solve.absorb(1 / n)  # each is an estimate of its own
        return solve


class Whitening(_Factored):
    """``v (A + lambda_b)^-1``: only the second moments of what goes into each layer, from forward passes alone."""

    needs_outputs = False

    def watch(self) -> None:
        """Run the model once over the batches."""
        with evaluating(self.model), torch.no_grad():
            for batch in self.batches:
                with self.factors.observing(_real(self.model, batch)):
                    forward_answers(self.model, on_device(self.model, batch))

    def build(self) -> Layerwise:
        """Return the layerwise inverse, which is computed when first needed."""
        return KroneckerInverse(self.factors, self.spec.damping, outputs=False)


def _real(model: nn.Module, batch: Batch) -> torch.Tensor:
    return on_device(model, batch)["attention_mask"].bool()


def _drop(_name: str, _grad: torch.Tensor) -> None:
    """Keep no gradient: the layers' hooks have seen what is needed."""
