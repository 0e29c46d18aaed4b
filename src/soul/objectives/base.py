"""What an objective is, and the retain terms they share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from soul.choices import check_choices
from soul.data.batches import VIEWS
from soul.data.templates import Encoded
from soul.forward import Answers, decoder_blocks, forward_answers, wide
from soul.objectives.public import CODES, public_kl
from soul.objectives.schedule import RetainSchedule
from soul.reference import Reference, build_reference
from soul.registry import Named
from soul.types import LossOut, Term

Batch = dict[str, torch.Tensor]
Retain = Literal["nll", "kl", "hidden", "none"]
RETAIN_TERMS = ("nll", "kl", "hidden", "none")


def count_tokens(batch: Batch, view: str) -> int:
    """Count the answer tokens of a view, without a model."""
    return int(batch["answer_mask"][batch["view"] == VIEWS.index(view)].sum())


def count_rows(batch: Batch, view: str) -> int:
    """Count the rows of a view."""
    return int((batch["view"] == VIEWS.index(view)).sum())


@dataclasses.dataclass(frozen=True)
class Objective(Named, abc.ABC):
    """Hyper-parameters of a loss, with one verb: ``objective(model, batch, reference) -> LossOut``.

    A subclass says which roles it looks at, what it needs to know of the reference, how its forget term is counted
    (tokens or sequences), and computes that term; the fused forward pass and the retain term come from here. It holds
    no state: where its weights move, :meth:`at` gives the objective of a moment, and :meth:`learn` what a step taught.

    Attributes:
        retain: Retain term: ``nll``, ``kl`` (``KL(p_ref || p_theta)`` on answer tokens), ``hidden`` (squared distance
            ``||h - h_ref||^2`` of the states of ``layer`` at answer positions, mean over the tokens of a sequence, then
            over sequences: RMU's, arXiv 2403.03218) or ``none``.
        retain_weight: Factor of the retain term.
        forget_weight: Factor of the forget term.
        retain_schedule: How ``retain_weight`` moves.
        layer: Decoder block whose output ``hidden`` compares, from 0; by default the one at 7/32 of the depth, which is
            the paper's on Zephyr-7B.
        compat: Name of the public code whose terms are computed in place of the formula's where the two differ
            (``docs/objectives.md`` says how); empty for the formula.
    """

    retain: Retain = "nll"
    retain_weight: float = 1.0
    forget_weight: float = 1.0
    retain_schedule: RetainSchedule = dataclasses.field(default_factory=RetainSchedule)
    layer: int | None = None
    compat: str = ""

    forget_views: ClassVar[tuple[str, ...]] = ("forget",)
    counted_in: ClassVar[Literal["tokens", "rows"]] = "tokens"
    logps_views: ClassVar[tuple[str, ...]] = ()
    distribution_views: ClassVar[tuple[str, ...]] = ()
    codes: ClassVar[tuple[str, ...]] = ()
    """Public code whose forget term differs; ``compat`` takes those of the retain term (``kl``) besides."""
    needs_whole: ClassVar[bool] = False
    hint: ClassVar[str] = ": leave it out"
    """What to do instead, where a retain weight without a retain term is given."""

    def __post_init__(self) -> None:
        check_choices(self, "objective")
        for name in ("retain_weight", "forget_weight"):
            if not getattr(self, name) >= 0:  # refuses nan too
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        known = tuple(dict.fromkeys((*self.codes, *CODES)))
        if self.compat and self.compat not in known:
            raise ValueError(f"compat must be empty or one of {', '.join(known)}, not {self.compat!r}")
        if self.retain == "none" and self.retain_weight != type(self).retain_weight:
            raise ValueError(f"retain_weight {self.retain_weight:g} weighs nothing, since retain is none{self.hint}")
        if self.layer is not None and not self.looks_inside:
            raise ValueError(f"layer {self.layer} is looked at by nobody with retain {self.retain}: leave it out")
        if self.retain_schedule.kind != "constant" and self.retain == "none":
            raise ValueError(f"retain_schedule {self.retain_schedule.kind} needs a retain term, and retain is none")
        if self.retain_schedule.compares and self.retain != "nll":
            raise ValueError(
                f"retain_schedule dual with retain {self.retain} needs retain_schedule.epsilon: the reference's own "
                f"{self.retain} is 0, so that no tolerance can be a share of it"
            )

    @property
    def views(self) -> tuple[str, ...]:
        """Roles a batch must hold."""
        return self.forget_views + (("retain",) if self.retain != "none" else ())

    @property
    def needs_logps(self) -> tuple[str, ...]:
        """Views whose reference log-probabilities are needed."""
        return self.logps_views + (("retain",) if self.retain_schedule.compares else ())

    @property
    def needs_distributions(self) -> tuple[str, ...]:
        """Views whose full reference distributions are needed."""
        return self.distribution_views + (("retain",) if self.retain == "kl" and not self.compat else ())

    @property
    def needs_states(self) -> tuple[str, ...]:
        """Views whose reference states at ``layer`` are needed."""
        return ("retain",) if self.retain == "hidden" else ()

    @property
    def needs_model(self) -> bool:
        """Whether the reference must answer as a model: public code asks it where nothing can be cached."""
        return bool(self.compat) and self.retain == "kl"

    @property
    def looks_inside(self) -> bool:
        """Whether the output of a decoder block is looked at."""
        return self.retain == "hidden"

    def block(self, model: nn.Module) -> int | None:
        """Return the decoder block that is looked at, None where none is.

        Raises:
            ValueError: The model has no such block.
        """
        if not self.looks_inside:
            return None
        depth = len(decoder_blocks(model))
        if self.layer is not None and not 0 <= self.layer < depth:
            raise ValueError(f"layer must be from 0 to {depth - 1} in this model, not {self.layer}")
        return round(depth * 7 / 32) if self.layer is None else self.layer

    def prepare(self, model: nn.Module) -> None:
        """Freeze what this objective leaves alone; called once, before the optimizer is built."""

    def at(self, progress: float, state: Mapping[str, float]) -> Objective:
        """Return this objective as it is at ``progress`` (0 to 1) of training, given what :meth:`learn` returned."""
        weight = self.retain_schedule.weight(self.retain_weight, progress, state)
        return self if weight == self.retain_weight else dataclasses.replace(self, retain_weight=weight)

    def learn(self, state: Mapping[str, float], terms: Mapping[str, float], progress: float) -> dict[str, float]:
        """Return what is to be known after a step, by name, from the means of its terms; kept in checkpoints."""
        return self.retain_schedule.learn(state, self.retain_weight, terms, progress)

    def ask_reference(self, model: nn.Module, rows: Callable[[str], Sequence[Encoded]], **how: Any) -> Reference:
        """Ask the model, as it is now, what this objective will need to know of it.

        Args:
            model: The model before unlearning.
            rows: Gives every row that a view will show.
            how: As for :func:`soul.reference.build_reference`.
        """
        logps, full, states = (
            [row for view in views for row in rows(view)]
            for views in (self.needs_logps, self.needs_distributions, self.needs_states)
        )
        if not (logps or full or states or self.needs_model):
            return Reference()
        return build_reference(
            model,
            logps=logps,
            distributions=full,
            states=states,
            layer=self.block(model),
            as_model=self.needs_model,
            **how,
        )

    @abc.abstractmethod
    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the forget loss summed over its items (a scalar)."""

    def public_terms(self, model: nn.Module, batch: Batch, reference: Reference) -> dict[str, Term]:
        """Return the terms that ``compat`` computes in place of the formula's."""
        if self.compat and self.retain == "kl":
            return {"retain": public_kl(self.compat, model, batch, reference)}
        return {}

    @property
    def public_counts(self) -> dict[str, int]:
        """Items of :meth:`public_terms`."""
        return {"retain": 1} if self.compat and self.retain == "kl" else {}

    def further_terms(self, answers: Answers, logps_N: torch.Tensor, model: nn.Module) -> dict[str, Term]:
        """Return terms besides forget and retain."""
        del answers, logps_N, model
        return {}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the items of each term in a batch, without running the model."""
        counts: dict[str, int] = {}
        if self.retain != "none":
            counts["retain"] = (count_rows if self.retain == "hidden" else count_tokens)(batch, "retain")
        if self.forget_views:
            count = count_rows if self.counted_in == "rows" else count_tokens
            counts["forget"] = count(batch, self.forget_views[0])
        if self.retain_schedule.compares:
            counts["reference"] = count_tokens(batch, "retain")
        return counts | self.public_counts

    def __call__(self, model: nn.Module, batch: Batch, reference: Reference) -> LossOut:
        """Run the model once over all views and return the terms of the loss."""
        answers = forward_answers(model, batch, self.block(model))
        if self.needs_distributions or self.needs_states:
            full = {v: reference.logits(model, batch, answers, v) for v in self.needs_distributions}
            states = {v: reference.block_states(model, batch, answers, v) for v in self.needs_states}
            answers = dataclasses.replace(answers, reference_NV=full, reference_ND=states)
        logps = answers.token_logps()
        counts, public = self.counts(batch), self.public_terms(model, batch, reference)
        terms: dict[str, Term] = {}
        if self.forget_views:
            total = public["forget"].total if "forget" in public else self.forget_term(answers, logps, reference)
            terms["forget"] = Term(total, counts["forget"], self.forget_weight)
        if self.retain != "none":
            total = public["retain"].total if "retain" in public else self.retain_term(answers, logps)
            terms["retain"] = Term(total, counts["retain"], self.retain_weight)
        if self.retain_schedule.compares:  # constant, and of no weight: it is there to be learned from
            rows = answers.view_B == VIEWS.index("retain")
            terms["reference"] = Term(-reference.sequence_logps(answers)[rows].sum(), counts["reference"], 0.0)
        return LossOut(terms | self.further_terms(answers, logps, model))

    def retain_term(self, answers: Answers, logps_N: torch.Tensor) -> torch.Tensor:
        """Return the retain loss summed over its items (a scalar)."""
        if self.retain == "kl":
            return kl_to_reference(answers, answers.reference_NV["retain"])
        if self.retain == "hidden":
            return state_distance(answers, answers.reference_ND["retain"], "retain")
        return -logps_N[answers.select("retain")].sum()


def kl_to_reference(answers: Answers, reference_NV: torch.Tensor, view: str = "retain") -> torch.Tensor:
    """Return ``sum_t KL(p_ref(.|t) || p_theta(.|t))`` over the answer tokens of a view, entropy term included."""
    ours = torch.log_softmax(answers.wide_logits(view), dim=-1)
    theirs = torch.log_softmax(reference_NV.to(ours.device, ours.dtype), dim=-1)
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")


def state_distance(answers: Answers, target: torch.Tensor, view: str) -> torch.Tensor:
    """Return ``sum_i (1/T_i) sum_t ||h_it - target_it||^2`` over the rows of a view.

    Args:
        answers: With the states of a block.
        target: (n, D), or (D,) for all alike.
        view: The rows that count.
    """
    states = answers.states(view)
    squares = (states - wide(target).to(states.device, states.dtype)).square().sum(dim=-1)
    rows = answers.row_N[answers.select(view)]
    lengths = torch.bincount(answers.row_N, minlength=len(answers.view_B)).to(squares.dtype)
    return (squares / lengths[rows]).sum()
