"""Cross-entropy unlearning."""

from __future__ import annotations

import dataclasses

import torch

from soul.data.batches import VIEWS
from soul.forward import Answers
from soul.objectives.base import Batch, Objective, Retain
from soul.reference import Reference
from soul.registry import OBJECTIVES


@OBJECTIVES.register("ceu")
@dataclasses.dataclass(frozen=True)
class CEU(Objective):
    """Distil the model into itself without the forget token (CE-U, arXiv 2503.01224).

    ``L = mean_t H(softmax(z(t) with z_{y_t} = -inf, no gradient), p_theta(.|t))``, cross-entropy, mean over answer
    tokens. Needs no reference, and its gradient neither vanishes nor explodes as ``p(y_t)`` goes to 1 or 0. No retain
    term by default, as there.

    Attributes:
        skip_first: Answer tokens at the start of each answer that are left alone (1 in the paper's runs and code).
    """

    retain: Retain = "none"
    skip_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_first < 0:
            raise ValueError(f"skip_first must be 0 or more, not {self.skip_first}")

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the items of each term; tokens that are skipped do not count."""
        lengths = batch["answer_mask"][batch["view"] == VIEWS.index("forget")].sum(dim=1)
        return super().counts(batch) | {"forget": int((lengths - self.skip_first).clamp(min=0).sum())}

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the cross-entropy to the model without the forget tokens, summed over tokens."""
        del reference, logps_N
        chosen = answers.select("forget")
        rows = answers.row_N[chosen]
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # in its own answer
        keep = place >= self.skip_first
        logits = answers.wide_logits("forget")[keep]
        targets = answers.targets_N[chosen][keep][:, None]
        others = logits.detach().scatter(-1, targets, float("-inf")).softmax(dim=-1)
        return -(others * logits.log_softmax(dim=-1)).sum()
