"""Learning to refuse: PO, and DPO with the refusal preferred."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Objective
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("po")
@dataclasses.dataclass(frozen=True)
class PO(Objective):
    """Learn to refuse the forget questions (arXiv 2401.06121 sec. 3.2; 2404.18239): ``L = mean NLL(refusal) + retain``.

    Each example gets another phrasing each epoch, and the refusal's end-of-turn token is learned.
    """

    forget_views: ClassVar[tuple[str, ...]] = ("refusal",)

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the NLL of the refusals, summed over tokens."""
        del reference
        return -logps_N[answers.select("refusal")].sum()


@OBJECTIVES.register("idk")
@dataclasses.dataclass(frozen=True)
class IDK(PO):
    """Another name of po, under which the TOFU paper's code has it (arXiv 2401.06121 sec. 3.2)."""


@OBJECTIVES.register("dpo")
@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Prefer a refusal to the forget answer, relative to the reference (arXiv 2305.18290, eq. 7).

    ``L = -(1/beta) mean_i log sigmoid(beta [r(refusal_i) - r(answer_i)])`` with ``r`` the summed log-ratio; the factor
    ``1/beta`` keeps the gradient's size comparable with NPO's. ``compat="open-unlearning"``: the factor is ``2/beta``.

    Attributes:
        beta: Inverse temperature, above 0.
    """

    beta: float = 0.1
    forget_views: ClassVar[tuple[str, ...]] = ("forget", "refusal")
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"
    logps_views: ClassVar[tuple[str, ...]] = ("forget", "refusal")
    codes: ClassVar[tuple[str, ...]] = ("open-unlearning",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")

    @property
    def factor(self) -> float:
        """What the log-sigmoid is multiplied by."""
        return (2 if self.compat == "open-unlearning" else 1) / self.beta

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the summed DPO loss of the pairs of a preferred and a forget answer."""
        ratio_B = answers.sum_rows(logps_N) - reference.sequence_logps(answers)
        lost, won = (ratio_B[answers.view_B == VIEWS.index(view)] for view in self.forget_views)
        return -self.factor * logsigmoid(self.beta * (won - lost)).sum()  # same order: rows lie view by view
