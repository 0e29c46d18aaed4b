"""Muon: torch's own for matrices, with torch's AdamW for what is no matrix of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from soul.optim._checks import check_above, check_between, check_common
from soul.optim._torch import TorchRule, fusable
from soul.optim.base import OptimizerSpec
from soul.optim.cost import RuleCost, plain_cost
from soul.optim.groups import embedding_ids
from soul.registry import OPTIMIZERS

# What torch's classes expect to find in their groups beside our settings; for Muon, its own defaults.
_MUON = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "adjust_lr_fn": "match_rms_adamw", "eps": 1e-7}
_ADAMW = {"amsgrad": False, "foreach": None, "capturable": False}


class Muon(TorchRule):
    """Momentum whose singular values are all set to about 1 (Muon, arXiv 2502.16982), AdamW for the rest.

    ``m <- b m + (1 - b) g``, ``O`` the matrix of the same singular vectors as ``g (1 - b) + b m`` (Nesterov) from
    ``ns_steps`` Newton-Schulz iterations, ``p <- p (1 - lr wd) - .2 sqrt(max(rows, columns)) lr O``. The factor gives a
    step the root mean square of AdamW's, so both halves share one learning rate. A control that, like K-FAC, knows that
    weights are matrices, and unlike it knows no curvature.

    Matrices are the parameters with two axes, except those of groups marked ``embedding`` and those that ``model`` uses
    as embedding or head. Each group given is split in two (``matrix`` true or false).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate of both halves, of AdamW's size.
        momentum: Decay ``b`` of the matrices' momentum.
        nesterov: Look ahead.
        ns_steps: Newton-Schulz iterations.
        betas: Decay of AdamW's averages.
        eps: Floor of AdamW's denominator.
        weight_decay: Decoupled weight decay.
        model: Tells embeddings and head from other matrices.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> p.grad = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
        >>> Muon([p], lr=0.1).step()
        >>> bool(p[1, 1] < -0.01)  # the small singular value counts about as much as the large
        True
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 3e-5,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        model: torch.nn.Module | None = None,
    ) -> None:
        _check(lr, weight_decay, momentum, ns_steps, betas, eps)
        self._embeddings = embedding_ids(model)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "maximize": False,
            "embedding": False,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group as up to two: its matrices, and the rest.

        Raises:
            ValueError: Parameters that are not real floating-point, or ``differentiable``.
        """
        if "matrix" in param_group:
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        halves: dict[bool, list[Any]] = {True: [], False: []}
        for entry in given:
            p = entry[1] if isinstance(entry, tuple) else entry
            flat = param_group.get("embedding", False) or id(p) in getattr(self, "_embeddings", ())
            halves[p.ndim == 2 and not flat].append(entry)
        for matrix, members in halves.items():
            if members or (not matrix and not given):
                super().add_param_group({**param_group, "params": members, "matrix": matrix})

    def _advance(self, closure: Callable[[], Any] | None = None) -> None:
        del closure  # it has been called
        matrices = [group for group in self.param_groups if group["matrix"]]
        rest = [group for group in self.param_groups if not group["matrix"]]
        ascending = [p.grad for g in matrices if g["maximize"] for p in g["params"] if p.grad is not None]
        for gradient in ascending:  # torch's Muon only descends
            gradient.neg_()
        try:
            self._delegate(torch.optim.Muon, [{**group, **_MUON} for group in matrices])
        finally:
            for gradient in ascending:
                gradient.neg_()
        self._delegate(torch.optim.AdamW, [{**g, **_ADAMW, "fused": all(map(fusable, g["params"]))} for g in rest])

    def _delegate(self, cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> None:
        """Let torch's class make its step on our state, with groups of ours; it is made anew, so nothing is kept."""
        if groups:
            inner = cls.__new__(cls)
            inner.__setstate__({"defaults": {}, "state": self.state, "param_groups": groups})
            inner.step()


def _check(
    lr: float, weight_decay: float, momentum: float, ns_steps: int, betas: tuple[float, float], eps: float
) -> None:
    check_common(lr, weight_decay, momentum=momentum, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    check_above("eps", eps, 0.0)
    check_between("ns_steps", ns_steps, 1, 100)


@OPTIMIZERS.register("muon")
@dataclasses.dataclass(frozen=True)
class MuonSpec(OptimizerSpec):
    """Orthogonalised momentum for matrices, AdamW for the rest (Muon, arXiv 2502.16982): a control without curvature.

    Attributes:
        momentum: Decay of the matrices' momentum.
        nesterov: Look ahead.
        ns_steps: Newton-Schulz iterations.
        betas: Decay of AdamW's averages.
        eps: Floor of AdamW's denominator.
    """

    lr: float = 3e-5
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    needs_whole = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.lr, self.weight_decay, self.momentum, self.ns_steps, self.betas, self.eps)

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> Muon:
        """Return :class:`Muon` over ``params``, with embeddings and head as ``model`` has them."""
        return Muon(params, **self.settings(), model=model)

    def cost(
        self, params: Sequence[torch.Tensor], model: torch.nn.Module | None = None, device: str = "cpu"
    ) -> RuleCost:
        """Return the cost of one number a coordinate of matrices, two of the rest, and the iterations in bf16.

        One iteration on ``[m, n]`` with ``m <= n`` is ``X X^T``, its square and a product with ``X``:
        ``4 m^2 n + 2 m^3`` operations.
        """
        del device
        flat = embedding_ids(model)
        matrices = [p for p in params if p.ndim == 2 and id(p) not in flat]
        rest = plain_cost([p for p in params if p.ndim != 2 or id(p) in flat], slots=2, scalars=1)
        ours = plain_cost(matrices, slots=1)
        sides = [sorted(p.shape) for p in matrices]
        return RuleCost(
            state=ours.state + rest.state,
            step=max((p.numel() * (p.itemsize + 6) + 4 * min(p.shape) ** 2 for p in matrices), default=0),
            traffic=ours.traffic + rest.traffic,
            products=self.ns_steps * sum(4 * m * m * n + 2 * m**3 for m, n in sides),
        )
