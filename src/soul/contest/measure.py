"""What a contest measures on a model, thin along a run and in full where results are reported."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from soul.contest.matrix import Task
from soul.data.sources import check_disjoint, load_examples
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, generate
from soul.likelihood import extraction_strength, sequence_nll
from soul.metrics.text import rouge_l_recall
from soul.metrics.tofu import answer_probability, log_truth_ratio, normalised_probability
from soul.types import Example, Row

Values = dict[str, Any]
EACH = ("knowledge", "log_truth_ratios")
"""What a full measurement has of each forget example: ``K`` (:func:`soul.metrics.contest.knowledge`), truth ratio."""
FURTHER = ("paraphrased_rougeL", "seen_probability", *EACH)
"""What a full measurement has beside a thin one."""


@dataclasses.dataclass(frozen=True)
class Sets:
    """The examples of a request.

    Attributes:
        forget: What is measured of what is to be forgotten.
        whole: All that is to be forgotten, which attackers have a share of.
        places: Where in ``whole`` each of ``forget`` is.
    """

    forget: list[Example]
    whole: list[Example]
    places: list[int]
    seen: list[Example]
    unseen: list[Example]
    facts: dict[str, list[Example]]
    text: list[Example]


def load_sets(task: Task, request: str) -> Sets:
    """Load what a request is measured on.

    Raises:
        ValueError: A source cannot be read, a forget example has no paraphrased question, ``forgotten`` holds what is
            not to be forgotten, or ``unseen`` what the loss or the curvature sees.
    """
    whole = load_examples(task.source("forget", request))
    place = {(e.prompt, e.answer): i for i, e in enumerate(whole)}
    source = task.source("forgotten" if task.forgotten else "forget", request)
    forget = load_examples(source)
    strangers = [e for e in forget if (e.prompt, e.answer) not in place]
    if strangers:
        raise ValueError(
            f"{source}: {len(strangers)} of {len(forget)} items are not in {task.source('forget', request)}, and "
            f"what is measured as forgotten has to be forgotten; the first is {strangers[0].prompt!r:.80}"
        )
    bare = [e for e in forget if not e.paraphrased_prompt]
    if bare:
        raise ValueError(
            f"{source}: {len(bare)} of {len(forget)} items have no paraphrased_question, and forgetting is judged by it"
        )
    unseen = load_examples(task.source("unseen", request))
    for name in ("forget", "retain", "curvature"):
        source = task.source(name, request)
        if source:
            check_disjoint(unseen, load_examples(source), ("unseen", name))
    facts = {name: load_examples(source) for name, source in task.fact_sources(request).items()}
    text = load_examples(task.source("text", request))
    places = [place[e.prompt, e.answer] for e in forget]
    return Sets(forget, whole, places, load_examples(task.source("seen", request)), unseen, facts, text)


class Meter:
    """Measures models on a request's sets.

    Args:
        sets: The request's examples.
        tokenizer: The models' tokenizer.
        spec: Batch sizes and lengths.
        fast: The precision of measurements, unless they are asked for ``exact``: in the weights' own.
    """

    def __init__(
        self,
        sets: Sets,
        tokenizer: PreTrainedTokenizerBase,
        spec: EvaluationSpec,
        fast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.sets, self.spec, self.fast = sets, spec, fast
        self.template = ChatTemplate(tokenizer, spec.max_length, "evaluation.max_length")

    def __call__(self, model: Any, *, full: bool, exact: bool = False) -> Values:
        """Return the measurements: means over sets, and in full some of each forget example (:data:`EACH`)."""
        was_training = model.training
        model.eval()
        try:
            with own_precision(model) if exact else self.fast(), _castable(model):
                found, known = self._thin(model)
                return found | (self._further(model, known) if full else {})
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _thin(self, model: Any) -> tuple[Values, list[list[float]]]:
        """Return the means, and what is known of each forget example by each of two measures."""
        forget = [self.template.encode(e) for e in self.sets.forget]
        nll, strength = extraction_strength(model, forget, pad_id=self.template.pad, max_tokens=self.spec.max_tokens)
        paraphrased = self._probabilities(model, self.sets.forget, paraphrased=True)
        found: Values = {
            "forget_probability": _mean([math.exp(-value) for value in nll]),
            "extraction_strength": _mean(strength),
            "paraphrased_probability": _mean(paraphrased),
            "unseen_probability": _mean(self._probabilities(model, self.sets.unseen)),
            **{f"{name}_probability": self._choice(model, examples) for name, examples in self.sets.facts.items()},
            "text_nll": self._text(model),
        }
        return found, [paraphrased, list(strength)]

    @torch.no_grad()
    def _further(self, model: Any, known: list[list[float]]) -> Values:
        asked = [dataclasses.replace(e, prompt=e.paraphrased_prompt or e.prompt) for e in self.sets.forget]
        prompts = [self.template.prompt_ids(e) for e in asked]
        texts = generate(model, self.template, prompts, self.spec)
        recalled = [rouge_l_recall(t, e.answer) for t, e in zip(texts, asked, strict=True)]
        found: Values = {
            "paraphrased_rougeL": _mean(recalled),
            "seen_probability": _mean(self._probabilities(model, self.sets.seen)),
            "knowledge": [round(_mean(each), 5) for each in zip(*known, recalled, strict=True)],
        }
        if all(e.wrong_answers for e in self.sets.forget):
            ratios = [log_truth_ratio(row) for row in self._rows(model, self.sets.forget)]
            if all(math.isfinite(ratio) for ratio in ratios):
                found["log_truth_ratios"] = [round(ratio, 5) for ratio in ratios]
        return found

    def _probabilities(self, model: Any, examples: Sequence[Example], *, paraphrased: bool = False) -> list[float]:
        rows = [self.template.encode(e, prompt=e.paraphrased_prompt if paraphrased else None) for e in examples]
        nll = sequence_nll(model, rows, pad_id=self.template.pad, max_tokens=self.spec.max_tokens)
        return [math.exp(-value) for value in nll]

    def _choice(self, model: Any, examples: Sequence[Example]) -> float:
        """Return the answer's mean probability; among the answers offered, where there are wrong ones."""
        rows = self._rows(model, examples)
        return _mean([normalised_probability(r) if r.get("wrong_nll") else answer_probability(r) for r in rows])

    def _rows(self, model: Any, examples: Sequence[Example]) -> list[Row]:
        """Return likelihoods of the true answer (as paraphrased, where it is) and of the wrong ones."""
        flat, owner = [], []
        for i, e in enumerate(examples):
            answers = [e.paraphrased_answer or e.answer, *e.wrong_answers]
            flat += [self.template.encode(e, answer=answer) for answer in answers]
            owner += [i] * len(answers)
        nll = sequence_nll(model, flat, pad_id=self.template.pad, max_tokens=self.spec.max_tokens)
        rows: list[Row] = []
        for i, value in zip(owner, nll, strict=True):
            if i == len(rows):
                e = examples[i]
                rows.append({"id": e.id, "subject": "", "prompt": "", "answer": "", "nll": value, "tokens": 0})
            else:
                rows[i].setdefault("wrong_nll", []).append(value)
        return rows

    def _text(self, model: Any) -> float:
        rows = [self.template.encode(e) for e in self.sets.text]
        nll = sequence_nll(model, rows, pad_id=self.template.pad, max_tokens=self.spec.max_tokens)
        return float(np.average(nll, weights=[row.answer_length for row in rows]))


@contextlib.contextmanager
def _castable(model: Any) -> Iterator[None]:
    """Let autocast keep its copies of frozen weights, which it keeps of trainable ones alone.

    The head is the largest of them, and a greedy answer needs it for every token.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield  # nothing inside looks for gradients
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextlib.contextmanager
def own_precision(model: Any) -> Iterator[None]:
    """Take off the autocast that accelerate puts around ``model.forward``, and put it back."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield  # the class's own forward shows where the instance has none
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
