"""How the weight of the retain term moves: not at all, along a line, or as the multiplier of a constraint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from soul.choices import check_choices


@dataclasses.dataclass(frozen=True)
class RetainSchedule:
    """The weight of the retain term over training, from ``retain_weight`` on.

    ``linear`` walks from ``retain_weight`` to ``end``. ``dual`` takes the weight for the multiplier of the constraint
    ``L_retain <= epsilon`` and ascends on it after each step (primal-dual, arXiv 2506.05314):
    ``w <- max(0, w + rate (L_retain - epsilon))``. With no ``epsilon`` it is the paper's
    ``(1 + tolerance) L_retain(reference)``, taken of the very answers that the step saw, so that the difference does
    not swing with which answers those were.

    Attributes:
        kind: ``constant``, ``linear`` or ``dual``.
        end: Weight at the end of ``linear``.
        rate: Step of the multiplier of ``dual``, above 0.
        tolerance: How much worse the retain answers may become, as a share of their loss before.
        epsilon: Largest retain loss in nats a token, in place of ``tolerance``.
        warmup: Share of training before the multiplier first moves.

    Example:
        >>> RetainSchedule("linear", end=3.0).weight(1.0, 0.5, {})
        2.0
        >>> RetainSchedule("dual", rate=2.0, epsilon=0.5).learn({}, 1.0, {"retain": 0.75}, 0.0)
        {'multiplier': 1.5}
    """

    kind: Literal["constant", "linear", "dual"] = "constant"
    end: float = 0.0
    rate: float = 1.0
    tolerance: float = 0.1
    epsilon: float | None = None
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, "retain_schedule")
        if not self.rate > 0:
            raise ValueError(f"retain_schedule.rate must be above 0, not {self.rate}")
        for name in ("end", "tolerance", "epsilon"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"retain_schedule.{name} must be 0 or more, not {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"retain_schedule.warmup is a share of the steps in [0, 1), not {self.warmup}")
        read = {"constant": (), "linear": ("end",), "dual": ("tolerance", "epsilon", "warmup")}[self.kind]
        for field in dataclasses.fields(self):  # a rate may be what an objective has by default
            if field.name not in ("kind", "rate", *read) and getattr(self, field.name) != field.default:
                raise ValueError(f"retain_schedule.{field.name} is not read by the kind {self.kind}: leave it out")

    @property
    def compares(self) -> bool:
        """Whether the retain loss is held against the reference's."""
        return self.kind == "dual" and self.epsilon is None

    def weight(self, start: float, progress: float, state: Mapping[str, float]) -> float:
        """Return the weight at ``progress`` (0 to 1) of training that began with ``start``."""
        if self.kind == "linear":
            return start + progress * (self.end - start)
        return state.get("multiplier", start) if self.kind == "dual" else start

    def learn(
        self, state: Mapping[str, float], start: float, terms: Mapping[str, float], progress: float
    ) -> dict[str, float]:
        """Return the state after a step whose terms (means) are given."""
        if self.kind != "dual" or progress < self.warmup:
            return dict(state)
        allowed = (1 + self.tolerance) * terms["reference"] if self.epsilon is None else self.epsilon
        moved = state.get("multiplier", start) + self.rate * (terms["retain"] - allowed)
        return {**state, "multiplier": max(0.0, moved)}
