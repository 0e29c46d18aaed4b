"""Refusal with answer preservation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Batch, Retain, count_rows
from soul.objectives.po import PO
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("ap")
@dataclasses.dataclass(frozen=True)
class AnswerPreservation(PO):
    """Learn to refuse the forget questions and go on preferring answers to the retain ones (arXiv 2410.08109).

    ``L = mean NLL(refusal | forget question) - (preserve_weight/beta) mean_i log sigmoid(beta log [p(y_i | x_i) /
    p(refusal_i | x_i)])`` over retain pairs ``(x_i, y_i)``, log-probabilities summed over each answer. No reference.

    Attributes:
        beta: Inverse temperature, above 0.
        preserve_weight: Factor of the second term.
    """

    retain: Retain = "none"
    beta: float = 0.1
    preserve_weight: float = 1.0

    hint: ClassVar[str] = ": preserve_weight is what weighs the retained answers here"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        if not self.preserve_weight >= 0:
            raise ValueError(f"preserve_weight must be 0 or more, not {self.preserve_weight}")

    @property
    def views(self) -> tuple[str, ...]:
        """Roles a batch must hold."""
        return ("refusal", "retain", "retain_refusal")

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the items of each term."""
        return super().counts(batch) | {"preserve": count_rows(batch, "retain")}

    def further_terms(self, answers: Answers, logps_N: torch.Tensor, model: nn.Module) -> dict[str, Term]:
        """Return the preservation loss of the retain rows."""
        del model
        logps_B = answers.sum_rows(logps_N)
        answer, refusal = (logps_B[answers.view_B == VIEWS.index(view)] for view in ("retain", "retain_refusal"))
        total = -logsigmoid(self.beta * (answer - refusal)).sum() / self.beta
        return {"preserve": Term(total, len(answer), self.preserve_weight)}
