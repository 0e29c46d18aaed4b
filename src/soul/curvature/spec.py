"""What a curvature pass is: over which examples, by which estimator, and how often."""

from __future__ import annotations

import dataclasses
from typing import Literal

from soul.choices import check_choices


@dataclasses.dataclass(frozen=True)
class CurvatureSpec:
    """When and from what an update rule's curvature is estimated.

    Attributes:
        estimator: How the diagonal is estimated (:mod:`soul.curvature.estimators`).
        source: The examples whose loss the curvature is of. Influence unlearning asks for what is to stay: ``retain``.
        interval: Steps from one refresh to the next; 0 freezes what was estimated before the first step.
        batch: Examples in a micro-batch of a pass.
        micro_batches: Micro-batches in a refresh; the estimate's variance falls as one over their number.
        warm_start: Micro-batches before the first step; 0 makes the first refresh like the others.
        general_text: Plain passages mixed in, for each micro-batch so many.
        cache: Keep what the warm start found on disk, by model and data, so that the next request starts with it.
        shuffled: A control, not a method: the right curvature in the wrong places. Diagonals are permuted within each
            tensor, Kronecker factors turned to random bases, spectra kept. What wins so does not win by curvature.
    """

    estimator: Literal["ggn", "gnb", "hutchinson", "empirical", "squared_gradient", "objective_squared"] = "ggn"
    source: Literal["retain", "retain+forget", "forget"] = "retain"
    interval: int = 10
    batch: int = 8
    micro_batches: int = 1
    warm_start: int = 0
    general_text: int = 0
    cache: bool = True
    shuffled: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "curvature")
        for name in ("batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"curvature.{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("interval", "warm_start", "general_text"):
            if getattr(self, name) < 0:
                raise ValueError(f"curvature.{name} must be 0 or more, not {getattr(self, name)}")

    def due(self, step: int) -> bool:
        """Say whether a pass should come before update number ``step``, counted from 0; the first step has one.

        Example:
            >>> [step for step in range(7) if CurvatureSpec(interval=3).due(step)]
            [0, 3, 6]
            >>> [step for step in range(7) if CurvatureSpec(interval=0).due(step)]
            [0]
        """
        return step == 0 or (self.interval > 0 and step % self.interval == 0)

    def passes(self, step: int) -> int:
        """Return how many micro-batches the pass before ``step`` has."""
        return self.warm_start if step == 0 and self.warm_start else self.micro_batches

    def worth(self, step: int) -> int:
        """Return how many refreshes the pass before ``step`` counts as in an average over refreshes.

        One that took a warm start for one refresh would give half of its weight to the next, many times as noisy.

        Example:
            >>> CurvatureSpec(warm_start=8, micro_batches=2).worth(0)
            4
        """
        return max(1, self.passes(step) // self.micro_batches)
