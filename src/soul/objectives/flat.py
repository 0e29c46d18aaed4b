"""Loss adjustment from the forget set alone, by an f-divergence."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch.nn.functional import softplus

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Objective, Retain
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("flat")
@dataclasses.dataclass(frozen=True)
class FLAT(Objective):
    """Pull refusals and forget answers apart by an f-divergence, with no retain set or reference (arXiv 2410.11143).

    ``L = mean_i [-g(P(refusal_i)) + f*(g(P(answer_i)))]`` with ``P`` the mean probability of an answer's tokens, ``g``
    the optimal variational function and ``f*`` the conjugate (table 2 there): ``tv`` ``g = tanh(v)/2, f*(u) = u``;
    ``kl`` ``g = v, f*(g) = exp(v - 1)``; ``pearson`` ``g = v, f*(g) = v^2/4 + v``; ``js`` ``g = log 2 - log(1 +
    exp(-v)), f*(g) = v + log(1 + exp(-v)) - log 2``. Its code averages ``P`` over a batch, with
    prompts and padding as zeros.

    Attributes:
        divergence: ``tv``, ``kl``, ``js`` or ``pearson``.
    """

    retain: Retain = "none"
    divergence: Literal["tv", "kl", "js", "pearson"] = "tv"
    forget_views: ClassVar[tuple[str, ...]] = ("forget", "refusal")
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in ("tv", "kl", "js", "pearson"):
            raise ValueError(f"divergence must be tv, kl, js or pearson, not {self.divergence!r}")

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the summed loss of the pairs of a refusal and a forget answer."""
        del reference
        p_B = answers.sum_rows(logps_N.exp()) / answers.sum_rows(torch.ones_like(logps_N)).clamp(min=1)
        lost, won = (p_B[answers.view_B == VIEWS.index(view)] for view in self.forget_views)
        return (self._conjugate(lost) - self._variational(won)).sum()

    def _variational(self, p: torch.Tensor) -> torch.Tensor:
        if self.divergence == "tv":
            return p.tanh() / 2
        return math.log(2) - softplus(-p) if self.divergence == "js" else p

    def _conjugate(self, p: torch.Tensor) -> torch.Tensor:
        """Return ``f*(g(p))``."""
        if self.divergence == "tv":
            return p.tanh() / 2
        if self.divergence == "kl":
            return (p - 1).exp()
        return p + softplus(-p) - math.log(2) if self.divergence == "js" else p.square() / 4 + p
