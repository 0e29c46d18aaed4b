"""What every update rule declares, so that the trainer has one branch and no list of names."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch


class UpdateRule(torch.optim.Optimizer):
    """A torch optimizer with the two extra verbs the trainer uses; both do nothing by default."""

    def curvature_due(self, step: int) -> bool:
        """Say whether a curvature pass should come before update number ``step`` (counted from 0)."""
        del step
        return False

    def update_curvature(self) -> None:
        """Take in a curvature estimate.

        The caller has just run a curvature pass (:mod:`soul.optim.curvature`), so each ``param.grad`` holds a vector
        whose elementwise square is an unbiased estimate of the diagonal curvature. The caller clears the gradients.
        """

    def metrics(self) -> dict[str, float]:
        """Return numbers about the last step worth logging, e.g. ``{"win_rate": 0.3}``."""
        return {}


@dataclasses.dataclass(frozen=True)
class OptimizerSpec(abc.ABC):
    """Hyper-parameters of an update rule; its fields are the schema of recipes, command line and record.

    Attributes:
        lr: Learning rate (peak of the schedule).
        weight_decay: Decoupled weight decay, ``p <- p (1 - lr * weight_decay)``.
    """

    lr: float = 1e-5
    weight_decay: float = 0.0

    name: ClassVar[str]
    needs_curvature: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")

    @abc.abstractmethod
    def build(self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]) -> UpdateRule:
        """Return the torch optimizer over ``params`` (parameters, or torch's parameter groups)."""
