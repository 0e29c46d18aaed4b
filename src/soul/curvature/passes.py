"""Curvature passes: how the model is run for them, how squares add up, and what becomes of a warm start."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from soul import processes
from soul.curvature import cache, sharded
from soul.curvature.estimators import ESTIMATORS, Estimator
from soul.curvature.observer import Observer, ends_of, is_reentrant
from soul.curvature.picks import Pick, Plan, choose
from soul.curvature.quiet import full_precision, without_noise
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import collate_rows
from soul.data.templates import Encoded
from soul.finite import all_finite
from soul.forward import Answers, forward_answers, unwrap
from soul.types import LostModelError

Estimate = dict[torch.Tensor, torch.Tensor]


class CurvaturePasses:
    """Makes the passes that a :class:`~soul.curvature.spec.CurvatureSpec` asks for and hands a rule what they found.

    A refresh of ``M`` micro-batches backpropagates ``sqrt(w_i)`` times each token's cotangent, ``w_i`` being one over
    the answer tokens of the whole refresh, and adds up the squares of the micro-batches' gradients
    (:mod:`soul.curvature.estimators`). The sum needs a buffer of the size of the trainable weights, which a single
    micro-batch does without: the rule squares ``p.grad`` itself.

    The model is run as it trains, with dropout at zero (:func:`without_noise`); gradients are neither clipped nor
    scaled; a pass begins with empty gradients and leaves them empty. The estimate is exact, in expectation, for the
    mean loss over the tokens of the examples picked.

    *Several processes*: each runs ``M`` micro-batches of its own with the gradients' averaging off, and the sums of
    squares are added over processes. Averaging gradients before the square would be unbiased up to a factor, but as
    noisy as a single micro-batch. ``R`` processes of ``M`` micro-batches give the estimate of one process with
    ``R * M``. Where weights are sharded (FSDP2) squares are added on the way to the shards
    (:mod:`soul.curvature.sharded`). Rules that watch passes add up what they saw themselves.

    Args:
        spec: What passes are made.
        rows: The examples, tokenised.
        text: Plain passages, tokenised, of which ``spec.general_text`` join every micro-batch.
        seed: Seed of picks and noise.
        pad_id: Padding token.
        autocast: The precision training runs in.
        numerics: Names that precision and whatever else changes the last bits of an estimate, for the cache.

    Raises:
        ValueError: There is nothing to pick from, or a warm start is asked of an estimator without passes.
    """

    def __init__(
        self,
        spec: CurvatureSpec,
        rows: Sequence[Encoded],
        text: Sequence[Encoded] = (),
        *,
        seed: int = 0,
        pad_id: int = 0,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        numerics: str = "",
    ) -> None:
        self.estimator = ESTIMATORS[spec.estimator]
        if not rows:
            raise ValueError(f"curvature.source is {spec.source!r}, and there are no such examples")
        if spec.warm_start and not self.estimator.needs_pass:
            raise ValueError(f"curvature.estimator {spec.estimator} makes no passes: set curvature.warm_start to 0")
        self.spec, self.rows, self.text = spec, list(rows), list(text)
        self.seed, self.pad_id, self.autocast, self.numerics = seed, pad_id, autocast, numerics

    def plan(self, step: int) -> Plan:
        """Return the picks of the refresh before ``step``, those of all processes.

        Examples are ranked by a hash of (seed, step, content), so removing one that was not picked changes nothing:
        the retain set of the next request mostly leads to the same picks. Where nothing is picked twice, rows and text
        of like length share a micro-batch, so that little is padded: the sum of squares is unbiased however they are
        grouped.
        """
        size = min(self.spec.batch, len(self.rows))
        extra = min(self.spec.general_text, len(self.text))
        count = self.spec.passes(step) * processes.count()
        picks = choose(self.rows, count * size, self.seed, step, "rows")
        text = choose(self.text, count * extra, self.seed, step, "text")
        if len(picks) <= len(self.rows) and len(text) <= len(self.text):
            both = sorted(picks + text, key=lambda pick: -len(pick.row))
            return [both[i : i + size + extra] for i in range(0, len(both), size + extra)]
        return [picks[i * size : (i + 1) * size] + text[i * extra : (i + 1) * extra] for i in range(count)]

    def refresh(self, model: nn.Module, rule: Observer, step: int, *, identity: str = "") -> None:
        """Bring ``rule`` the curvature that it should have before update number ``step``.

        A warm start is read from the cache if the same passes on the same model were made before.

        Args:
            model: The model, in its wrapper if it has one.
            rule: The update rule.
            step: The update that follows, counted from 0.
            identity: Names the rule and those of its settings that its ``curvature_state`` depends on.

        Raises:
            ValueError: The wrapper or the rule cannot do what is asked.
        """
        watches = rule.curvature_state() is not None
        self._check(model, watches)
        plan = self.plan(step)
        warm = step == 0 and self.spec.warm_start > 0
        file, found = None, None
        # of what is to be forgotten nothing is kept beside the run, and what shards hold no process knows
        if warm and self.spec.cache and self.spec.source == "retain" and not sharded.is_sharded(model):
            file = cache.path(unwrap(model), {**self._describe(plan), "rule": identity if watches else None})
            found = cache.read(file, next(model.parameters()).device)
        if file is not None and all(processes.gather(found is not None)):
            assert found is not None
            self._take_over(model, rule, found, watches)
            self._derive(rule, file, next(model.parameters()).device)
            return
        with _gradients_left_empty(model):
            estimate = self.estimate(model, rule, plan, explicit=warm)
            if not watches:  # Kronecker factors look at themselves
                _check_finite(model, estimate)
            keep = file if processes.is_main() else None
            if keep and not watches:  # before the rule gets it, which may compute in place
                cache.write(keep, _named(model, estimate or {}), self._describe(plan))
            given = self._given(model, estimate)
            self._tell(rule, given, step, watches)
            if keep and watches:
                cache.write(keep, rule.curvature_state() or {}, self._describe(plan))
            if self.spec.shuffled:
                rule.scramble(self.seed)
        if file is not None:
            self._derive(rule, file, next(model.parameters()).device)
        elif warm and rule.derivation():
            rule.derived()  # kept by the rule; now, so that they count among what curvature takes

    def _derive(self, rule: Observer, file: Path, device: torch.device) -> None:
        """Let the rule begin with what it derived from the same curvature in an earlier run, or keep it for the next.

        On a processor the inverses of Kronecker factors take as long as several steps.

        Args:
            rule: The rule, which has its curvature.
            file: Where the cache holds that, or would.
            device: Where the rule is.
        """
        name = rule.derivation()
        if not name or self.spec.shuffled:
            return
        own = cache.beside(file, name)
        found = cache.read(own, device)
        if found is not None:
            rule.load_derived(found)
        elif processes.is_main():
            cache.write(own, rule.derived(), {"of": file.stem, "derived": name})

    def _given(self, model: nn.Module, estimate: Estimate | None) -> Estimate | None:
        """Return the estimate as the rule gets it: permuted within each tensor in the control that asks for it."""
        if not self.spec.shuffled or estimate is None:
            return estimate
        found: Estimate = {}
        for i, p in enumerate(_trainable(model).values()):
            value = estimate[p]
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + i)  # the same in every refresh
            order = torch.randperm(value.numel(), generator=generator).to(value.device)
            found[p] = value.flatten()[order].view_as(value)
        return found

    def _tell(self, rule: Observer, estimate: Estimate | None, step: int, watches: bool) -> None:
        """Give a rule an estimate, as many times as it is worth: an average stays what it is and weighs what it should.

        A rule that watches passes takes in what it saw once, and knows what the first refresh is worth from its spec.
        """
        for _ in range(1 if watches else self.spec.worth(step)):
            rule.update_curvature(estimate)

    def _check(self, model: nn.Module, watches: bool) -> None:
        if watches and self.spec.shuffled and self.spec.interval:
            raise ValueError("curvature.shuffled turns factors once: set curvature.interval to 0 for this optimizer")
        if watches and not self.estimator.shows_layers:
            fit = ", ".join(name for name, kind in ESTIMATORS.items() if kind.shows_layers)
            raise ValueError(f"this optimizer watches the model's layers: curvature.estimator must be one of {fit}")
        if sharded.is_sharded(model):
            sharded.check(self.spec, watches=watches)
        elif processes.count() > 1 and not (isinstance(model, DistributedDataParallel) or sharded.is_engine(model)):
            raise ValueError(
                f"curvature passes in several processes know DistributedDataParallel, FSDP2 and ZeRO, not "
                f"{type(model).__name__}: use one of these (examples/accelerate), or one process"
            )

    def _describe(self, plan: Plan) -> dict[str, Any]:
        """Say what an estimate depends on besides the model and the rule."""
        picks = [[(pick.row.key, pick.seed) for pick in picks] for picks in plan]
        return {
            "estimator": self.spec.estimator,
            "picks": hashlib.blake2b(repr(picks).encode(), digest_size=16).hexdigest(),
            "processes": processes.count(),
            "numerics": self.numerics,
        }

    def _take_over(self, model: nn.Module, rule: Observer, found: dict[str, torch.Tensor], watches: bool) -> None:
        """Give the rule what the cache holds, as if it had just been found."""
        if watches:
            rule.load_curvature_state(found)
            if self.spec.shuffled:
                rule.scramble(self.seed)
            return
        estimate = self._given(model, {p: found[name] for name, p in _trainable(model).items()})
        self._tell(rule, estimate, 0, watches)

    def estimate(self, model: nn.Module, rule: Observer, plan: Plan, *, explicit: bool = True) -> Estimate | None:
        """Return the estimate for each trainable parameter, in fp32 at least; None where it is the gradients' square.

        A rule that watches only what goes into layers is given forward passes, one that watches what comes back to
        their outputs backward passes without gradients of weights, and there is no estimate.

        Args:
            model: The model, in its wrapper if it has one.
            rule: Watches the passes; its ``update_curvature`` is not called.
            plan: The micro-batches of all processes.
            explicit: Return the estimate even where the gradients could be left to be squared.
        """
        if not rule.needs_backward:
            self._look(model, rule, plan)
            return None
        if not rule.needs_gradients and not sharded.is_sharded(model) and not is_reentrant(model):
            self._watch(unwrap(model), rule, plan)
            return None
        params = list(_trainable(model).values())
        rank, world = processes.place()
        tokens = sum(pick.row.answer_length for picks in plan for pick in picks)
        explicit = explicit or self.spec.shuffled or len(plan) > 1 or self.estimator.diagonal is not None
        if sharded.is_sharded(model):
            with without_noise(model), sharded.squares(model):
                for picks in plan[rank::world]:
                    self._micro_batch(model, rule, picks, 1 / tokens, params)
            return {p: sharded.taken(p) for p in params}
        sums: list[torch.Tensor] | None = None
        apart = sharded.is_engine(model)
        explicit = explicit or apart
        inner = unwrap(model) if apart else model
        no_sync = getattr(inner, "no_sync", contextlib.nullcontext)
        with without_noise(inner), no_sync():
            for picks in plan[rank::world]:
                terms = self._micro_batch(inner, rule, picks, 1 / tokens, params, apart=apart)
                if not explicit:
                    return None
                sums = _add_up(sums, terms, params)
        assert sums is not None
        if world > 1:
            for value in sums:
                dist.all_reduce(value)
        return dict(zip(params, sums, strict=True))

    @torch.no_grad()
    def _look(self, model: nn.Module, rule: Observer, plan: Plan) -> None:
        """Run the model forward only."""
        rank, world = processes.place()
        with without_noise(model):
            for picks in plan[rank::world]:
                batch = self._collate(model, picks)
                with rule.observing(batch["attention_mask"].bool()), self.autocast():
                    forward_answers(model, batch)

    def _watch(self, model: nn.Module, rule: Observer, plan: Plan) -> None:
        """Run the model forward and back, but for the gradients of layers' weights, which nobody asks for."""
        rank, world = processes.place()
        with without_noise(model):
            for picks in plan[rank::world]:
                batch = self._collate(model, picks)
                with rule.observing(batch["attention_mask"].bool()):
                    with self.autocast(), ends_of(model) as ends:
                        answers = forward_answers(model, batch)
                    weight = 1 / sum(pick.row.answer_length for picks in plan for pick in picks)
                    cotangent = _cotangent(self.estimator, answers, picks, weight)
                    torch.autograd.grad(answers.logits_NV, ends, cotangent, allow_unused=True)

    def _collate(self, model: nn.Module, picks: list[Pick]) -> dict[str, torch.Tensor]:
        device = next(model.parameters()).device
        return {k: v.to(device) for k, v in collate_rows([p.row for p in picks], pad_id=self.pad_id).items()}

    def _micro_batch(
        self,
        model: nn.Module,
        rule: Observer,
        picks: list[Pick],
        weight: float,
        params: list[torch.Tensor],
        *,
        apart: bool = False,
    ) -> list[torch.Tensor] | None:
        """Run the model on ``picks``; return their part of the diagonal, or None where gradients are to be squared.

        Gradients that are to be kept ``apart`` from the parameters are squared here.
        """
        device = params[0].device
        batch = self._collate(model, picks)
        with rule.observing(batch["attention_mask"].bool()):
            if self.estimator.diagonal is not None:
                seed = int.from_bytes(hashlib.blake2b(repr([p.seed for p in picks]).encode(), digest_size=7).digest())
                generator = torch.Generator(device).manual_seed(seed)
                # Attention from other packages may return wrong second derivatives without an error.
                attention = getattr(getattr(unwrap(model), "config", None), "_attn_implementation", "eager")
                by_differences = attention not in ("eager", "sdpa")
                with full_precision(model):
                    loss = functools.partial(_loss, model, batch, weight)
                    return self.estimator.diagonal(loss, params, generator, differences=by_differences)
            with self.autocast():
                answers = forward_answers(model, batch)
            cotangent = _cotangent(self.estimator, answers, picks, weight)
            if not apart:
                answers.logits_NV.backward(gradient=cotangent)
                return None
            found = torch.autograd.grad(answers.logits_NV, params, cotangent, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g.to(_wide(p)).square() for p, g in zip(params, found, strict=True)
        ]


def _check_finite(model: nn.Module, estimate: Estimate | None) -> None:
    """Make sure that a diagonal, or the gradients that are its root, are numbers: one that is none stops all weights.

    Raises:
        LostModelError: They are not.
    """
    roots = [p.grad for p in _trainable(model).values() if p.grad is not None]
    found = roots if estimate is None else estimate.values()
    if not all(processes.gather(all_finite(found))):
        raise LostModelError(
            "the curvature's diagonal is not finite: the weights are lost (lower optimizer.lr), or what the model says "
            "to the curvature's examples overflows (compute in fp32)"
        )


def _loss(model: nn.Module, batch: Mapping[str, torch.Tensor], weight: float) -> torch.Tensor:
    return forward_answers(model, batch).token_logps().sum() * -weight


def _cotangent(estimator: Estimator, answers: Answers, picks: list[Pick], weight: float) -> torch.Tensor:
    """Return the cotangents of a batch, each row's from noise of its own where there is any."""
    logits_NV, make = answers.logits_NV, estimator.cotangent
    assert make is not None
    if not estimator.noisy:
        weights_N = torch.full((len(logits_NV),), weight, dtype=torch.float64)
        return make(logits_NV.detach(), weights_N, torch.Generator(), answers.targets_N)
    result_NV = torch.empty_like(logits_NV)
    start = 0
    for pick in picks:
        part = slice(start, start + pick.row.answer_length)
        generator = torch.Generator(logits_NV.device).manual_seed(pick.seed)
        weights = torch.full((pick.row.answer_length,), weight, dtype=torch.float64)
        result_NV[part] = make(logits_NV[part].detach(), weights, generator, answers.targets_N[part])
        start = part.stop
    assert start == len(logits_NV)
    return result_NV


def _add_up(
    sums: list[torch.Tensor] | None, terms: list[torch.Tensor] | None, params: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Add ``terms``, or the squares of the gradients, one parameter at a time; gradients and terms are used up."""
    total = []
    for i, p in enumerate(params):
        if terms is not None:
            term = terms.pop(0).to(_wide(p))
        else:
            term = torch.zeros_like(p, dtype=_wide(p)) if p.grad is None else p.grad.to(_wide(p)).square()
        p.grad = None
        total.append(term if sums is None else sums[i].add_(term))
    return total


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@contextlib.contextmanager
def _gradients_left_empty(model: nn.Module) -> Iterator[None]:
    params = _trainable(model).values()
    assert all(p.grad is None for p in params), "a curvature pass begins with empty gradients"
    try:
        yield
    finally:
        for p in params:
            p.grad = None


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def _named(model: nn.Module, estimate: Estimate) -> dict[str, torch.Tensor]:
    return {name: estimate[p] for name, p in _trainable(model).items()}
