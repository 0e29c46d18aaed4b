"""When a model is lost: what a step's numbers say, and which setting did it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from soul.finite import all_finite
from soul.types import LostModelError

if TYPE_CHECKING:
    from soul.trainer import UnlearnTrainer


def check_step(trainer: UnlearnTrainer, records: Sequence[Mapping[str, float]], step: int) -> None:
    """Stop a run whose model is lost; the checkpoint before is the last good one.

    It is lost where a term of the loss is nan or infinite, and where the retain term has grown beyond
    :func:`retain_limit`. transformers by itself would leave such losses out of its averages and go on.

    Args:
        trainer: Who trains.
        records: One a step, the last one this step's.
        step: Its number.

    Raises:
        LostModelError: The model is lost.
    """
    now = records[-1]
    for name in ("loss", *trainer.last_terms):
        if not math.isfinite(now[name]):
            what = "loss" if name == "loss" else f"{name} term"
            raise LostModelError(f"the {what} is {now[name]} at step {step}: the model is lost; {_advice(trainer)}")
    limit = retain_limit(trainer, records[0])
    retain = now.get("retain", 0.0)
    if retain > limit:
        grown = f"was {records[0].get('retain', math.nan):.4g} at step {records[0]['step']:g}, is {retain:.4g} at step"
        perplexity = f" (perplexity {_power(retain)})" if trainer.objective.retain == "nll" else ""
        raise LostModelError(
            f"the retain loss {grown} {step}{perplexity} and may be at most {limit:.4g} nats a token: the model is "
            f"losing what it is to keep; {_advice(trainer)}, or raise training.max_retain_loss if this is meant to be"
        )


def finite_gradients(trainer: UnlearnTrainer) -> bool:
    """Say whether all gradients that the coming step takes are numbers, in all processes.

    Averages of gradients keep what is not for ever, and rules that divide by the length of a step or take signs hide
    it: losses and weights stay finite, and nothing is learned any more. ZeRO keeps its gradients to itself.
    """
    rule = trainer.update_rule
    gradients = [p.grad for group in rule.param_groups for p in group["params"] if p.grad is not None]
    gradients += (getattr(rule, "retain_gradients", None) or {}).values()
    return not trainer.over_processes({"bad": float(not all_finite(gradients))})["bad"]


def refuse_gradients(trainer: UnlearnTrainer, step: int) -> None:
    """Stop a run before a step whose gradients are no numbers.

    Raises:
        LostModelError: Always.
    """
    raise LostModelError(
        f"a gradient of step {step} is no finite number, and the step is not taken: {_advice(trainer)}, or set "
        "training.precision=float32 where it is lower"
    )


def retain_limit(trainer: UnlearnTrainer, first: Mapping[str, float]) -> float:
    """Return the largest retain loss of a step that is no reason to stop, in the term's own unit.

    ``training.max_retain_loss`` where it is set. Otherwise ``first + ln V`` where the term is in nats a token (NLL and
    KL as their formulas have them): what was lost is as much as knowing nothing at all, ``ln V`` nats a token.
    """
    if trainer.training_spec.max_retain_loss:
        return trainer.training_spec.max_retain_loss
    objective = trainer.objective
    if "retain" not in first or objective.retain not in ("nll", "kl") or objective.compat:
        return math.inf
    model: Any = trainer.model
    words = getattr(model.get_output_embeddings(), "weight", None)
    return first["retain"] + math.log(words.shape[0]) if words is not None else math.inf


def _power(nats: float) -> str:
    return f"{math.exp(nats):.3g}" if nats < 700 else "above 1e304"


def _advice(trainer: UnlearnTrainer) -> str:
    """Say which settings move a model as far as this."""
    said = f"lower optimizer.lr (now {trainer.rule.lr:g}"
    factors = trainer.update_rule.param_groups[0]["lr"]
    said += f"; {factors:.3g} at this step)" if factors != trainer.rule.lr else ")"
    if trainer.objective.retain != "none":
        return f"{said} or raise objective.retain_weight (now {trainer.objective.retain_weight:g})"
    return f"{said}, or keep something: objective.retain is none"
