"""What an objective is, and the retain term most of them share."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import torch
from torch import nn

from soul.data.batches import VIEWS
from soul.forward import Answers, forward_answers
from soul.reference import Reference
from soul.types import LossOut, Term

Batch = dict[str, torch.Tensor]


def count_tokens(batch: Batch, view: str) -> int:
    """Count the answer tokens of a view, without a model."""
    return int(batch["answer_mask"][batch["view"] == VIEWS.index(view)].sum())


def count_rows(batch: Batch, view: str) -> int:
    """Count the rows of a view."""
    return int((batch["view"] == VIEWS.index(view)).sum())


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """Hyper-parameters of a loss, with one verb: ``objective(model, batch, reference) -> LossOut``.

    A subclass says which roles it looks at, what it needs to know of the reference, how its forget term is counted
    (tokens or sequences), and computes that term; the fused forward pass and the retain term come from here.

    Attributes:
        retain: Retain term: ``nll``, ``kl`` (``KL(p_ref || p_theta)`` on answer tokens) or ``none``.
        retain_weight: Factor of the retain term.
    """

    retain: Literal["nll", "kl", "none"] = "nll"
    retain_weight: float = 1.0

    name: ClassVar[str]
    forget_views: ClassVar[tuple[str, ...]] = ("forget",)
    counted_in: ClassVar[Literal["tokens", "rows"]] = "tokens"
    needs_logps: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.retain not in ("nll", "kl", "none"):
            raise ValueError(f"retain must be nll, kl or none, not {self.retain!r}")
        if not self.retain_weight >= 0:  # refuses nan too
            raise ValueError(f"retain_weight must be 0 or more, not {self.retain_weight}")

    @property
    def views(self) -> tuple[str, ...]:
        """Roles a batch must hold."""
        return self.forget_views + (("retain",) if self.retain != "none" else ())

    @property
    def needs_distributions(self) -> tuple[str, ...]:
        """Views whose full reference distributions are needed."""
        return ("retain",) if self.retain == "kl" else ()

    @abc.abstractmethod
    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the forget loss summed over its items (a scalar)."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the items of each term in a batch, without running the model."""
        counts = {"retain": count_tokens(batch, "retain")} if self.retain != "none" else {}
        if self.forget_views:
            count = count_rows if self.counted_in == "rows" else count_tokens
            counts["forget"] = count(batch, self.forget_views[0])
        return counts

    def __call__(self, model: nn.Module, batch: Batch, reference: Reference) -> LossOut:
        """Run the model once over all views and return the terms of the loss."""
        answers = forward_answers(model, batch)
        logps = answers.token_logps()
        counts = self.counts(batch)
        terms: dict[str, Term] = {}
        if self.forget_views:
            terms["forget"] = Term(self.forget_term(answers, logps, reference), counts["forget"])
        if self.retain == "nll":
            terms["retain"] = Term(-logps[answers.select("retain")].sum(), counts["retain"], self.retain_weight)
        elif self.retain == "kl":
            total = kl_to_reference(answers, reference.logits(model, batch, answers, "retain"))
            terms["retain"] = Term(total, counts["retain"], self.retain_weight)
        return LossOut(terms)


def kl_to_reference(answers: Answers, reference_NV: torch.Tensor, view: str = "retain") -> torch.Tensor:
    """Return ``sum_t KL(p_ref(.|t) || p_theta(.|t))`` over the answer tokens of a view, entropy term included."""
    wide = torch.float64 if answers.logits_NV.dtype == torch.float64 else torch.float32
    ours = torch.log_softmax(answers.logits_NV[answers.select(view)].to(wide), dim=-1)
    theirs = torch.log_softmax(reference_NV.to(ours.device, wide), dim=-1)
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
