"""The longest step whose price, measured and not predicted, is within bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a step of a given length led to.

    Attributes:
        alpha: The length.
        kl: Retain KL to the model before unlearning, in nats a token.
        nll: Forget NLL in nats a token; infinite where ``kl`` already rules the step out.
    """

    alpha: float
    kl: float
    nll: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where a step should end.

    Attributes:
        kl: Most retain KL.
        kl_before: Retain KL where the step starts.
        nll: Forget NLL to reach; infinite for none.
        alpha: Longest step.
        slack: A step is long enough within this share of a bound: above ``(1 - slack) kl``, or between ``nll`` and
            ``(1 + slack) nll``.
    """

    kl: float
    kl_before: float = 0.0
    nll: float = math.inf
    alpha: float = math.inf
    slack: float = 0.1

    def exceeded(self, trial: Trial) -> bool:
        """Say whether a step goes too far; what is not a number does."""
        return not (trial.kl <= self.kl and (trial.nll <= self.nll * (1 + self.slack)))

    def reached(self, trial: Trial) -> bool:
        """Say whether a step that is within bounds is long enough."""
        return trial.kl >= self.kl * (1 - self.slack) or trial.nll >= self.nll or trial.alpha >= self.alpha

    def price(self, trial: Trial) -> float:
        """Return how a step compares to one in the middle of what is long enough: 1 is just right."""
        kl = max(trial.kl, 1e-12) / (self.kl * (1 - self.slack / 2))
        return max(kl, trial.nll / (self.nll * (1 + self.slack / 2))) if math.isfinite(trial.nll) else kl


def longest(measure: Callable[[float], Trial], first: float, bounds: Bounds, trials: int = 12) -> Trial | None:
    """Return the longest step within ``bounds`` that ``trials`` measurements find; None if all went too far.

    The root of the KL grows nearly linearly with the length (``KL ~ 1/2 d^T G d``), which leads to a bracket; inside it
    the price is interpolated on logarithmic scales, and the bracket halved where that closes in from one side only.

    Example:
        >>> trial = longest(lambda a: Trial(a, kl=a * a, nll=0.0), first=0.01, bounds=Bounds(kl=4.0))
        >>> bool(1.89 < trial.alpha <= 2.0)
        True
    """
    low: Trial | None = None
    high: Trial | None = None
    side = 0  # how often in a row the same end of the bracket moved, with its sign
    alpha = min(first, bounds.alpha)
    for _ in range(trials):
        trial = measure(alpha)
        if bounds.exceeded(trial):
            high, side = trial, max(side, 0) + 1
        else:
            low, side = trial, min(side, 0) - 1
            if bounds.reached(trial):
                break
        if low and high:
            alpha = _inside(low, high, bounds, halve=abs(side) > 1)
        else:
            alpha = min(_towards(trial, bounds, up=low is not None), bounds.alpha)
    return low


def _towards(trial: Trial, bounds: Bounds, *, up: bool) -> float:
    """Return the length to try next where only one end of the bracket is known."""
    before = math.sqrt(bounds.kl_before)
    gained = math.sqrt(max(trial.kl, 0.0)) - before
    factor = (math.sqrt(bounds.kl * (1 - bounds.slack / 2)) - before) / gained if gained > 0 else math.inf
    if math.isfinite(trial.nll) and trial.nll > 0:
        factor = min(factor, bounds.nll * (1 + bounds.slack / 2) / trial.nll)
    low, high = (1.5, 10.0) if up else (0.01, 0.95)
    return trial.alpha * (min(max(factor, low), high) if math.isfinite(trial.kl) else low * 10)


def _inside(low: Trial, high: Trial, bounds: Bounds, *, halve: bool) -> float:
    """Return a length between both ends."""
    width = math.log(bounds.price(high)) - math.log(bounds.price(low)) if math.isfinite(high.kl) else 0.0
    share = -math.log(bounds.price(low)) / width if width > 0 and not halve else 0.5
    return low.alpha * (high.alpha / low.alpha) ** min(max(share, 0.1), 0.9)
