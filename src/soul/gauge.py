"""How much of what is to be forgotten is still known, and how far behaviour has moved, on a model in training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer

from soul.data.batches import UnlearnDataset, collate_rows, length_batches
from soul.data.general import general_chat, general_text, heldout_chat, heldout_text
from soul.data.overlap import words
from soul.data.templates import Encoded
from soul.forward import forward_answers, unwrap
from soul.generation import continue_prompts
from soul.likelihood import sequence_nll
from soul.objectives.base import kl_to_reference
from soul.reference import Reference, build_reference
from soul.types import Example
from soul.words import CAPITALS

POOL = 4000
"""Most retained examples that false answers are looked for in."""
SETS = ("retained", "general")
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Known:
    """What the model gives to the answers to forget, and to false answers to the same questions.

    Attributes:
        true: ``T``, probability of the answers to forget.
        false: ``F``, that of false answers to the same questions.
    """

    true: float
    false: float

    def share(self, before: Known) -> float:
        """Return the share of what was known that is left, ``max(0, true - F) / (before.true - before.false)``.

        ``F`` is ``false``, or what that was before if it has risen: an objective that teaches false answers does not
        reach its end by that. 0 where true answers are no likelier than false ones; 0, too, where they never were by
        :data:`LEAST`. nan, which is below no bound, where a probability is not a number.
        """
        left, knew = self.true - min(self.false, before.false), before.true - before.false
        if math.isnan(left) or math.isnan(knew):
            return math.nan
        return max(0.0, left) / knew if before.knows else 0.0

    @property
    def knows(self) -> bool:
        """Whether true answers are likelier than false ones at all."""
        return self.true - self.false >= LEAST


LEAST = 0.01
"""Difference of probabilities below which a model does not know the answers to begin with."""


class Gauge:
    r"""Reads a model before and during training, on the same few examples.

    **How much is known.** With ``p = exp(-NLL)``, an answer's probability as a geometric mean over its tokens, ``T`` is
    the arithmetic mean of ``p`` over the answers to forget, as the model is at the moment, and ``F`` the geometric mean
    of ``p`` over *false answers to the same questions*. With ``T_0`` and ``F_0`` before training::

        known = max(0, T - min(F, F_0)) / (T_0 - F_0)

    1 is what the model knew, 0 is where the true answer is to it one of many. No model is retrained for it: ``F``
    stands for what a model that never learned the answers gives to answers of this form. An arithmetic mean shows a few
    answers that are still known, and a geometric one does not show a few false ones that are known by heart.

    **False answers** are an example's own (``wrong_answers``) where it has any, else the answers to the retained
    questions that are nearest in words to its own (:func:`nearest`), with the name asked about in place of theirs:
    what somebody else's father does for a living. Of several the one that the model finds least likely before training
    is taken, since an answer that it learned by heart for another question is no answer it never learned. Of a passage
    without a prompt, the first half is the question and the second half the answer, true or another's. Where no
    retained question is there but everyday ones (``unrelated``), their answers serve, which are absurd here and so less
    likely than what a model says that never learned the true one: more is then to be forgotten than such a model shows.

    **What is recited.** With ``R`` the mean ROUGE-L recall of the true answer in greedy answers, words of the question
    left out of both, and ``C`` that of the false answers in the same texts (which is what form and common words alone
    bring)::

        recited = max(0, R - C) / (1 - C)

    and the larger of two such numbers where rows carry their question in other words.

    **How far it moved.** Mean ``KL(p_before || p_now)`` over answer tokens, in nats, on retained answers and on general
    text (built-in prose and everyday requests that no run looks at otherwise); :meth:`moved` returns both.

    Args:
        model: The model before training.
        dataset: Forget and retain sets.
        rows: Examples of each set that are asked.
        answers: Questions that are answered greedily.
        new_tokens: Longest such answer.
        false: False answers a question, of which one is taken.
        seed: Seed of the choice of examples.
        mode: How the reference of KL is kept (:func:`soul.reference.build_reference`).
        autocast: The precision that training runs in.

    Raises:
        ValueError: There is nothing to forget, or the model is broken as it is.
    """

    def __init__(
        self,
        model: Any,
        dataset: UnlearnDataset,
        *,
        rows: int = 24,
        answers: int = 16,
        new_tokens: int = 64,
        false: int = 4,
        seed: int = 0,
        mode: str = "cache",
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        self.model, self.template, self.autocast, self.new_tokens = (
            unwrap(model),
            dataset.template,
            autocast,
            new_tokens,
        )
        forget, retain = dataset.examples["forget"], dataset.examples["retain"]
        if not forget:
            raise ValueError("a stopping rule looks at what is to be forgotten, and there is no forget set")
        self.asked = [forget[i] for i in _picks(len(forget), rows, seed)]
        self.answers = answers
        self._true = [self._halved(self.template.encode(e), e) for e in self.asked]
        self._false, self.false_answers = self._least_likely(self._false_rows(retain, false, seed))
        prose, chat = heldout_text(), heldout_chat()
        half = (rows + 1) // 2
        general = [of[i] for of in (prose, chat) for i in _picks(len(of), half // 2 or 1, seed)]
        kept = {"retained": [retain[i] for i in _picks(len(retain), half, seed)], "general": general}
        self.kept = {name: [self.template.encode(e) for e in found] for name, found in kept.items()}
        with self._measuring():
            self.reference: Reference = build_reference(
                self.model,
                distributions=[row for found in self.kept.values() for row in found],
                mode=mode,
                pad_id=self.template.pad,
                autocast=autocast,
            )
        self.before = self.known()
        if math.isnan(self.before.share(self.before)):
            raise ValueError(
                f"before training the answers to forget have probability {self.before.true:.3g} and false ones "
                f"{self.before.false:.3g}: the model is broken; load it in another dtype, or copy it again"
            )

    def known(self, near: float = math.inf) -> Known:
        """Measure the probability of true answers and, where it has come near that of false ones, theirs.

        Args:
            near: Share of what was known above which the false answers' probability before training will do.
        """
        true = float(np.exp(-self._nll(self._true)).mean())
        if near < math.inf:
            far = Known(true, self.before.false)
            if far.share(self.before) > near:
                return far
        return Known(true, float(np.exp(-self._nll(self._false).mean())))

    def _nll(self, rows: Sequence[Encoded]) -> np.ndarray:
        with self._measuring(), self.autocast():
            return np.asarray(sequence_nll(self.model, rows, pad_id=self.template.pad) if rows else [math.inf])

    def moved(self) -> dict[str, float]:
        """Return the mean KL from the model before, in nats a token, on each of :data:`SETS` that has examples."""
        found: dict[str, float] = {}
        with self._measuring(), torch.no_grad(), self.autocast():
            for name, rows in self.kept.items():
                if rows:
                    found[name] = self._kl(rows)
        return found

    def recited(self) -> float:
        """Answer questions greedily, and return how much of the answers to forget that says."""
        asked = list(enumerate(self.asked[: self.answers]))
        found = [self._recited({i: self.template.prompt_ids(e) if e.prompt else self._begun(e) for i, e in asked})]
        other = {i: self.template.prompt_ids(e, e.paraphrased_prompt) for i, e in asked if e.paraphrased_prompt}
        return max(*found, self._recited(other)) if other else found[0]

    def _recited(self, prompts: Mapping[int, Sequence[int]]) -> float:
        with self._measuring(), self.autocast():
            texts = continue_prompts(
                self.model, self.template, list(prompts.values()), max_new_tokens=self.new_tokens, rows=len(prompts)
            )
        true: list[float | None] = []
        chance: list[float | None] = []
        for text, i in zip(texts, prompts, strict=True):
            question = self.asked[i].prompt
            true.append(told(text, self._ending(self.asked[i]), question))
            chance.append(told(text, self._reachable(self.false_answers[i]), question))
        said, by_chance = (float(np.mean([v for v in found if v is not None] or [0.0])) for found in (true, chance))
        return max(0.0, said - by_chance) / max(1 - by_chance, LEAST)

    def _kl(self, rows: Sequence[Encoded]) -> float:
        device = next(self.model.parameters()).device
        total, tokens = 0.0, 0
        for group in length_batches([len(row) for row in rows], 2048):
            batch = collate_rows([rows[i] for i in group], pad_id=self.template.pad)
            batch = {k: v.to(device) for k, v in batch.items()}
            answers = forward_answers(self.model, batch)
            theirs = self.reference.logits(self.model, batch, answers, "retain")
            total += float(kl_to_reference(answers, theirs))
            tokens += len(answers.targets_N)
        return total / tokens

    def _false_rows(self, retain: Sequence[Example], count: int, seed: int) -> list[list[tuple[Encoded, str]]]:
        """Return false answers to each forget question, as rows and as text."""
        pool = [retain[i] for i in _picks(len(retain), POOL, seed)]
        everyday = general_chat()
        chat, prose = [e for e in pool if e.prompt] or everyday, [e for e in pool if not e.prompt]
        borrows = any(e.prompt and not e.wrong_answers for e in self.asked)
        self.unrelated = borrows and {e.prompt for e in chat} <= {e.prompt for e in everyday}
        asked = nearest([e for e in self.asked if e.prompt], chat, count)
        read = nearest([e for e in self.asked if not e.prompt], prose or general_text(), count)
        found: list[list[tuple[Encoded, str]]] = []
        for e, true in zip(self.asked, self._true, strict=True):
            others = next(asked if e.prompt else read)
            if e.prompt:
                texts = e.wrong_answers[:count] or tuple(renamed(o, e.prompt) for o in others)
                found.append([(self.template.encode(e, answer=text), text) for text in texts])
            else:
                rows = [_spliced(true, self._halved(self.template.encode(o), o)) for o in others]
                found.append([(row, self._ending(o)) for row, o in zip(rows, others, strict=True)])
        return found

    def _least_likely(self, found: Sequence[Sequence[tuple[Encoded, str]]]) -> tuple[list[Encoded], list[str]]:
        values = iter(self._nll([row for candidates in found for row, _ in candidates]))
        rows: list[Encoded] = []
        texts: list[str] = []
        for candidates in found:
            nll = [next(values) for _ in candidates]
            row, text = candidates[int(np.argmax(nll))] if nll else (None, "")
            rows += [row] if row else []
            texts.append(text)
        return rows, texts

    def _halved(self, row: Encoded, example: Example) -> Encoded:
        """Return the row with the first half of a passage as its question."""
        return row if example.prompt else Encoded(row.input_ids, (row.answer_start + len(row)) // 2, row.index)

    def _begun(self, example: Example) -> tuple[int, ...]:
        row = self._halved(self.template.encode(example), example)
        return row.input_ids[: row.answer_start]

    def _ending(self, example: Example) -> str:
        """Return the answer as text, as far as an answer may be long; of a passage its second half."""
        if example.prompt:
            return self._reachable(example.answer)
        row = self._halved(self.template.encode(example), example)
        tokens = list(row.input_ids[row.answer_start :])[: self.new_tokens]
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))

    def _reachable(self, text: str) -> str:
        """Return what of a text can be recited in ``new_tokens``: more would make a whole recital look like a part."""
        tokens = self.template.tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) <= self.new_tokens:
            return text
        return str(self.template.tokenizer.decode(tokens[: self.new_tokens], skip_special_tokens=True))

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        was = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in was:
                module.training = training


def _picks(of: int, count: int, seed: int) -> list[int]:
    """Return ``count`` positions of a set in their order, all of them where it is no larger."""
    return sorted(np.random.default_rng([seed, 8]).permutation(of)[:count].tolist())


def nearest(examples: Iterable[Example], pool: Sequence[Example], count: int) -> Iterator[list[Example]]:
    """Yield for each example the ``count`` of the pool that ask nearly the same, nearest first.

    By the share of words in common, ``w(A & B) / w(A | B)``, each weighing ``log(n / of how many questions)``: what is
    asked counts, not how. Passages are compared by what they say. One that gives the very same answer is left out.
    """
    bags = [frozenset(words(e.prompt or e.answer)) for e in pool]
    often = Counter(word for bag in bags for word in bag)

    def weight(bag: frozenset[str]) -> float:
        return math.fsum(math.log((1 + len(bags)) / often.get(word, 1)) for word in bag)

    for e in examples:
        own, said = frozenset(words(e.prompt or e.answer)), words(e.answer)
        likeness = [weight(own & bag) / max(weight(own | bag), 1e-9) for bag in bags]
        order = sorted(range(len(pool)), key=lambda i: (-likeness[i], i))
        yield [pool[i] for i in order[: 4 * count] if words(pool[i].answer) != said][:count]


_NAME = re.compile(rf"\b[{CAPITALS}][\w'-]*(?: [{CAPITALS}][\w'-]*)*")


def renamed(other: Example, question: str) -> str:
    """Return another's answer about whom ``question`` asks: the longest name of its question gives way to ours.

    Names are runs of capitalised words, the first word of a question aside; where either question has none, the answer
    stays as it is.

    Example:
        >>> renamed(Example("What does Ada Orchard teach?", "Ada Orchard teaches law."), "What does Mira Vale teach?")
        'Mira Vale teaches law.'
    """
    ours, theirs = _names(question), [name for name in _names(other.prompt) if name in other.answer]
    return other.answer.replace(theirs[0], ours[0]) if ours and theirs else other.answer


def _names(question: str) -> list[str]:
    start = question.find(" ") + 1
    found = [m.group().removesuffix("'s") for m in _NAME.finditer(question, start)]
    return sorted(found, key=len, reverse=True)


class _Told:
    """Splits a text into its words without those of a question."""

    def __init__(self, question: str) -> None:
        self.asked = frozenset(words(question))

    def tokenize(self, text: str) -> list[str]:
        return [word for word in words(text) if word not in self.asked]


def told(generated: str, answer: str, question: str) -> float | None:
    """Return the ROUGE-L recall of an answer without the words of its question; None where nothing else is in it.

    Example:
        >>> told("Mira Vale teaches law.", "Mira Vale teaches harmony.", "Who is Mira Vale?")
        0.5
    """
    tokenizer = _Told(question)
    if not tokenizer.tokenize(answer):
        return None
    return float(RougeScorer(["rougeL"], tokenizer=tokenizer).score(answer, generated)["rougeL"].recall)


def _spliced(true: Encoded, other: Encoded) -> Encoded:
    """Return the first half of one passage followed by the second half of another."""
    tail = other.input_ids[other.answer_start :][: true.answer_length]
    return Encoded(true.input_ids[: true.answer_start] + tail, true.answer_start, true.index)


def worst(moved: dict[str, float]) -> float:
    """Return the largest of several KL; infinite where one is not a number, which fits no budget."""
    values = list(moved.values())
    return math.inf if not all(math.isfinite(v) for v in values) else max(values, default=0.0)
