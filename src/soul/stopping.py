"""When to stop: at the end that was asked for, or when the budget is spent, whichever comes first."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from soul import processes
from soul.choices import check_choices
from soul.gauge import Gauge, Known, worst

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer

log = logging.getLogger(__name__)

Why = Literal["forgotten", "lost", "budget", "steps", "merged"]
T = TypeVar("T")
TRIES = 6
"""Times that a step which leaves the budget is shortened, before it is taken back whole."""
UNRELATED = (
    "no retained question is there but everyday requests, and the stopping rule takes their answers for false ones to "
    "the questions to forget: these are less likely than what a model says that never learned the true ones, so that "
    "more is forgotten than need be. Give data.retain questions of the same kind about others, or the forget set false "
    "answers (column perturbed_answer)"
)
"""What is said where false answers are absurd."""


@dataclasses.dataclass(frozen=True)
class StopSpec:
    """When a run ends before its steps do.

    Attributes:
        when: ``forgotten`` stops when what is to be forgotten is, or when the budget is spent; ``never`` takes all
            steps.
        kl_budget: How far behaviour may move: mean KL from the model before, in nats a token, the larger of that on
            retained answers and that on general text. A run never ends beyond it.
        known: Forgotten is at most this share of what was known (:class:`soul.gauge.Gauge`), and
        recited: at most this share of the answers in what the model writes greedily.
        every: Steps from one look to the next.
        steps: Steps that the run may take in any case, where ``training.epochs`` makes fewer; ``training.max_steps``
            still bounds it.
        rows: Examples of each set that a look asks.
        answers: Questions that are answered greedily at what may be the end.
    """

    when: Literal["forgotten", "never"] = "never"
    kl_budget: float = 0.05
    known: float = 0.1
    recited: float = 0.2
    every: int = 2
    steps: int = 100
    rows: int = 24
    answers: int = 16

    def __post_init__(self) -> None:
        check_choices(self, "stop")
        if not 0 < self.kl_budget < math.inf:
            raise ValueError(f"stop.kl_budget is a KL above 0 in nats a token, not {self.kl_budget}")
        for name in ("known", "recited"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"stop.{name} is a share in [0, 1), not {getattr(self, name)}")
        for name, least in (("every", 1), ("steps", 0), ("rows", 1), ("answers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"stop.{name} must be {least} or more, not {getattr(self, name)}")
        unused = [f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) not in (f.default, 0)]
        if self.when == "never" and unused:
            raise ValueError(
                f"stop.{unused[0]} says when a run ends, and with stop.when never none ends before its steps do: set "
                f"stop.when to forgotten, or leave stop.{unused[0]} out"
            )

    def epochs(self, per_epoch: int, epochs: float) -> float:
        """Return the epochs that make as many steps as the run may take.

        Args:
            per_epoch: Steps of an epoch.
            epochs: What was asked for.

        Example:
            >>> StopSpec(when="forgotten", steps=100).epochs(10, 5), StopSpec().epochs(10, 5)
            (10, 5)
        """
        return max(epochs, math.ceil(self.steps / per_epoch)) if self.when != "never" else epochs


@dataclasses.dataclass(frozen=True)
class Stopped:
    """How a run ended.

    Attributes:
        why: ``forgotten``, ``lost`` (no number any more), ``budget`` (spent before that), ``steps`` (taken before
            either) or ``merged`` (forgotten, until an adapter was rounded into the weights).
        step: Number of the last step.
        known: Share of what was known that is left.
        true: Probability of the answers to forget.
        false: Probability of false answers to the same questions.
        before: Probability of the answers to forget before training.
        knew: Whether the model knew them at all then.
        recited: Share of the answers in what the model writes greedily; None where that was not asked.
        moved: KL from the model before, nats a token, by set.
        budget: The budget of KL.
        lost: What was no finite number at the last step, before weights were given back; empty where all was.
    """

    why: Why
    step: int
    known: float
    true: float
    false: float
    before: float
    knew: bool
    recited: float | None
    moved: dict[str, float]
    budget: float
    lost: str = ""

    def sentence(self) -> str:
        """Say it."""
        heads = {
            "forgotten": f"Stopped after {self.step} steps: forgotten, within the budget.",
            "lost": f"Stopped after {self.step} steps, where {self.lost} was no finite number any more: not all is "
            "forgotten, and the last weights within the budget are kept.",
            "budget": f"Stopped after {self.step} steps: the budget is spent, and not all is forgotten.",
            "steps": f"All {self.step} steps are taken: not all is forgotten, and the budget is not spent.",
            "merged": f"Stopped after {self.step} steps: forgotten, within the budget, until the adapter was merged "
            "into the weights, whose rounding undid that.",
        }
        doubt = "" if self.knew else " The model did not know these answers to begin with."
        said = "" if self.recited is None else f", and greedy answers hold {self.recited:.0%} of them"
        moved = " and ".join(f"{value:.3f} on {_SETS[name]}" for name, value in self.moved.items())
        ways = {
            "forgotten": "",
            "lost": " To go further, lower optimizer.lr, or set training.precision=float32 where it is lower.",
            "budget": " To go further, raise stop.kl_budget, in another --out.",
            "steps": " To go further, raise stop.steps or training.epochs, in another --out.",
            "merged": " To keep it, set model.dtype=float32, or forget further: lower stop.known and stop.recited.",
        }
        return (
            f"{heads[self.why]}{doubt} The answers to forget have probability {self.true:.3f} (before: "
            f"{self.before:.3f}; false answers to the same questions: {self.false:.3f}){said}. Behaviour moved by KL "
            f"{moved} (nats a token; budget {self.budget:g}).{ways[self.why]}"
        )

    def record(self) -> dict[str, Any]:
        """Return plain values, the sentence among them."""
        return {**dataclasses.asdict(self), "sentence": self.sentence()}


_SETS = {"retained": "retained answers", "general": "general text"}


class Stopping(TrainerCallback):
    """Looks at the model every few steps, and ends training where :class:`StopSpec` says so.

    At a look the KL from the model before is measured first. Within the budget the weights are kept (a copy of what is
    trained, on the CPU), and how much is known is measured; where that is little enough, questions are answered
    greedily, and where these answers recite little enough the run ends: *forgotten*. Beyond the budget the way from the
    kept weights to the present ones is shortened until it fits, by the quadratic ``KL ~ s^2`` as a trust region does
    it, at worst to nothing, and the run ends there: *budget* spent, or *forgotten* if it is. Where the loss, the KL or
    a probability is no finite number the model is *lost*: what is within the budget and can be measured is kept, and
    the run ends there, unless that has *forgotten*.

    A checkpoint that is due between two looks waits for the next, so that what is kept at a checkpoint is its weights:
    a run that goes on from one looks at the same weights at the same steps and ends where it would have ended, and how
    often checkpoints are written changes nothing.

    Args:
        trainer: The trainer that is ended.
        spec: When.
    """

    def __init__(self, trainer: UnlearnTrainer, spec: StopSpec) -> None:
        self.trainer, self.spec = trainer, spec
        self.last: dict[str, float] = {}
        self.stopped: Stopped | None = None
        self._gauge: Gauge | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kept_kl = 0.0
        self._due = False

    @property
    def gauge(self) -> Gauge:
        """What is read; there after :meth:`prepare`."""
        assert self._gauge is not None, "the model before training is measured first"
        return self._gauge

    def prepare(self) -> None:
        """Measure the model as it is before training, and before any checkpoint is loaded."""
        trainer, spec = self.trainer, self.spec
        mode = trainer.training_spec.reference
        self._gauge = Gauge(
            trainer.model,
            trainer.unlearn_data,
            rows=spec.rows,
            answers=spec.answers,
            seed=trainer.training_spec.seed,
            mode="cache" if mode == "copy" else mode,  # a few rows are worth no further copy of the model
            autocast=trainer.as_in_training,
        )
        if self._gauge.unrelated and processes.is_main():
            log.warning("%s", UNRELATED)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        """Keep the weights that training begins with or goes on from."""
        self._keep(worst(self._moved()) if state.global_step else 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Look, and stop where it is time to."""
        self.last = {}
        lost = self.trainer.broken
        if not all(map(math.isfinite, self.trainer.last_terms.values())):
            lost = "the loss"
        ends = state.global_step >= state.max_steps
        self._due = self._due or control.should_save
        if not (lost or ends or state.global_step % self.spec.every == 0):
            control.should_save = False
            return
        control.should_save, self._due = self._due, False
        moved = self._moved()
        over = not worst(moved) <= self.spec.kl_budget
        if over:
            lost = lost or ("" if math.isfinite(worst(moved)) else "the KL from the model before")
            moved = self._back(moved)
        known, left = self._known()
        if math.isnan(left):
            lost = lost or "the probability of the answers"
            moved = self._give_back()
            known, left = self._known()
        elif not over:
            self._keep(worst(moved))
        recited = self._agreed(self.gauge.recited()) if left <= self.spec.known else None
        forgotten = recited is not None and recited <= self.spec.recited
        self.last = {"known": left, "forget_probability": known.true, "false_probability": known.false}
        self.last |= {f"kl_{name}": value for name, value in moved.items()}
        self.last |= {} if recited is None else {"recited": recited}
        if forgotten or lost or over or ends:
            why: Why = "forgotten" if forgotten else "lost" if lost else "budget" if over else "steps"
            self._stop(why, state.global_step, known, left, recited, moved, lost)
            control.should_training_stop = True
            control.should_save = False  # what goes on from an earlier checkpoint ends here again

    def _stop(
        self, why: Why, step: int, known: Known, left: float, recited: float | None, moved: dict[str, float], lost: str
    ) -> None:
        was, budget = self.gauge.before, self.spec.kl_budget
        self.stopped = Stopped(
            why, step, left, known.true, known.false, was.true, was.knows, recited, moved, budget, lost
        )
        self._kept = []

    def measure_again(self, model: torch.nn.Module) -> None:
        """Say of ``model`` how the run ended: the trained one, with an adapter merged into weights that round.

        KL is not measured again where its reference was the model without its adapter, which is there no more.
        """
        if self.stopped is None:
            return
        self.gauge.model = model
        moved = self._moved() if self.gauge.reference.live is None else self.stopped.moved
        known, left = self._known()
        recited = self._agreed(self.gauge.recited()) if left <= self.spec.known else None
        kept = recited is not None and recited <= self.spec.recited and worst(moved) <= self.spec.kl_budget
        why: Why = "merged" if self.stopped.why == "forgotten" and not kept else self.stopped.why
        self.stopped = dataclasses.replace(
            self.stopped, why=why, known=left, true=known.true, false=known.false, recited=recited, moved=moved
        )

    def _moved(self) -> dict[str, float]:
        return self._agreed(self.gauge.moved())

    def _known(self) -> tuple[Known, float]:
        """Return what is known, and which share of what was."""
        known = self._agreed(self.gauge.known(near=2 * self.spec.known))
        return known, known.share(self.gauge.before)

    def _keep(self, kl: float) -> None:
        """Copy what is trained to the CPU, into the copy that is there already."""
        self._kept_kl = kl
        if self._kept:
            for p, kept in self._kept:
                kept.copy_(p)
        else:
            params = (p for group in self.trainer.update_rule.param_groups for p in group["params"] if p.requires_grad)
            self._kept = [(p.detach(), p.detach().to("cpu", copy=True)) for p in params]

    @torch.no_grad()
    def _give_back(self) -> dict[str, float]:
        """Return to the kept weights, and return the KL there."""
        for p, kept in self._kept:
            p.copy_(kept)
        return self._moved()

    @torch.no_grad()
    def _back(self, moved: dict[str, float]) -> dict[str, float]:
        """Go from the kept weights towards the present ones as far as the budget goes, and return the KL there."""
        moves = [p.cpu() - kept for p, kept in self._kept]
        room, scale = self.spec.kl_budget - self._kept_kl, 1.0
        for tries in range(TRIES + 1):
            if worst(moved) <= self.spec.kl_budget:
                break
            over = worst(moved) - self._kept_kl
            ratio = math.sqrt(max(0.0, room) / over) if math.isfinite(over) and over > 0 else 0.0
            scale = 0.0 if tries == TRIES else scale * min(max(0.95 * ratio, 0.1), 0.9)
            for (p, kept), move in zip(self._kept, moves, strict=True):
                p.copy_(kept + scale * move if scale else kept)  # a move may not even be finite
            moved = self._moved()
        return moved

    def _agreed(self, value: T) -> T:
        """Return what the first process has measured, so that all end at the same step."""
        if self.trainer.args.world_size > 1:
            return broadcast_object_list([value])[0]
        return value
