"""Answers in batches, greedy or sampled, each row stopping at its end-of-turn token."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from soul.data.batches import length_batches
from soul.data.templates import ChatTemplate
from soul.types import Ask

Count = Callable[[int, int], None]
Chooser = Callable[[Sequence[int]], LogitsProcessor]

POSITIONS = 1 << 14
"""Tokens of a batch, answers included, at most: a model keeps keys and values of each, 1 MiB in Llama-2-7B in fp32."""


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
        text: The text.
        cut: Tokens after which it was cut off; 0 where the model ended it.
    """

    text: str
    cut: int


def continue_prompts(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    rows: int,
    progress: Count | None = None,
) -> list[str]:
    """Return the text of :func:`write`, greedy."""
    found = write(model, template, prompts, max_new_tokens=max_new_tokens, rows=rows, progress=progress)
    return [answer.text for answer in found]


@torch.no_grad()
def write(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    rows: int,
    chooser: Chooser | None = None,
    progress: Count | None = None,
) -> list[Written]:
    """Return an answer to each prompt, in batches of similar length.

    A prompt near the end of the model's positions leaves room for a shorter answer, and shares a batch only with those
    that leave as much: the company a row is in takes nothing from it.

    Args:
        model: A causal language model.
        template: How its text becomes tokens.
        prompts: Tokens of each prompt.
        max_new_tokens: Longest answer, where the model has positions for it.
        rows: Prompts in a batch, at most; fewer where they are long (:data:`POSITIONS`).
        chooser: From the prompts of a batch (positions in ``prompts``) to what leaves one token to choose at each
            position; the most likely one by default.
        progress: Called with (done, of).

    Raises:
        ValueError: A prompt fills the model's positions.
    """
    answers = [Written("", 0)] * len(prompts)
    ends = _ends(model, template)
    device = next(model.parameters()).device
    done = 0
    for room, group in _batches(template, prompts, max_new_tokens, rows):
        width = max(len(prompts[i]) for i in group)
        pad = template.pad
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in group], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
        chosen: dict[str, Any] = {"logits_processor": LogitsProcessorList([chooser(group)])} if chooser else {}
        with _own_defaults(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=pad,
                **chosen,
            )
        for i, tokens in zip(group, out[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(tokens) if token in ends), None)
            ended, tokens = end is not None, tokens[:end]
            text = str(template.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            answers[i] = Written(text, 0 if ended else room)
        done += len(group)
        if progress:
            progress(done, len(prompts))
    return answers


def _batches(
    template: ChatTemplate, prompts: Sequence[Sequence[int]], max_new_tokens: int, rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield positions of prompts that leave equal room for an answer, and that room, the longest prompts first."""
    limit = template.tokenizer.model_max_length  # a model that learned its positions has no more
    rooms = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    if min(rooms, default=1) < 1:
        raise ValueError(
            f"a prompt of {max(map(len, prompts))} tokens leaves no room for an answer in the model's {limit} "
            "positions; shorten it"
        )
    for room in sorted(set(rooms)):
        alike = [i for i, found in enumerate(rooms) if found == room]
        for group in length_batches([len(prompts[i]) + room for i in alike], POSITIONS, rows):
            yield room, [alike[k] for k in group]


def _ends(model: Any, template: ChatTemplate) -> list[int]:
    """Return the tokens that end an answer: the turn's, and those by which the model ends a text.

    A chat model that goes on with plain text ends it with a token of its own (Llama 3's ``<|end_of_text|>``); what it
    writes after that is another text.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own: Any = getattr(inner.generation_config, "eos_token_id", None)
    found = [template.end_of_turn, template.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(token) for token in found if token is not None})


@contextlib.contextmanager
def _own_defaults(model: Any) -> Iterator[None]:
    """Take away what a model's publisher adds to decoding, e.g. a repetition penalty, under which it recites less."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = [(m, m.generation_config) for m in dict.fromkeys((model, inner))]
    for m, _ in kept:
        m.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for m, defaults in kept:
            m.generation_config = defaults


def sample_answers(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    ask: Ask,
    *,
    max_new_tokens: int,
    rows: int,
    progress: Count | None = None,
) -> list[list[Written]]:
    """Return ``ask.samples`` sampled answers to each prompt.

    Every draw inverts the cumulative distribution at a number that depends on (seed, name, sample, position) alone.
    The batch a prompt is in therefore changes nothing but the rounding of the logits, which moves a draw only where it
    falls on the border between two tokens.

    Args:
        model: A causal language model.
        template: How its text becomes tokens.
        prompts: Tokens of each prompt.
        names: Name of each prompt, from which its draws follow.
        ask: Samples, temperature, top-p and seed.
        max_new_tokens: Longest answer.
        rows: Answers in a batch.
        progress: Called with (done, of), in answers.
    """
    many = [prompt for prompt in prompts for _ in range(ask.samples)]
    draws = [_draws(ask.seed, name, k, max_new_tokens) for name in names for k in range(ask.samples)]

    def chooser(group: Sequence[int]) -> LogitsProcessor:
        return _Draw(np.stack([draws[i] for i in group]), ask.temperature, ask.top_p)

    found = write(model, template, many, max_new_tokens=max_new_tokens, rows=rows, chooser=chooser, progress=progress)
    return [found[i : i + ask.samples] for i in range(0, len(found), ask.samples)]


def _draws(seed: int, name: str, sample: int, length: int) -> np.ndarray:
    """Return numbers in [0, 1), the same in every process; a longer list begins with a shorter one."""
    digest = hashlib.blake2b(f"{seed}:{sample}:{name}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(length)


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one in whose share of the probability the row's next draw falls."""

    def __init__(self, draws_BT: np.ndarray, temperature: float, top_p: float) -> None:
        self.draws_BT, self.temperature, self.top_p, self.position = draws_BT, temperature, top_p, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return scores of 0 for the token drawn and -inf for all others."""
        assert len(scores) == len(input_ids) == len(self.draws_BT)
        # cumulative sums of a hundred thousand shares need float64, which mps lacks
        held = scores.cpu() if scores.device.type == "mps" else scores
        shares = (held.double() / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1:
            shares, order = shares.sort(dim=-1, descending=True, stable=True)
            # the token that crosses the line stays
            shares = shares.masked_fill(shares.cumsum(-1) - shares >= self.top_p, 0.0)
        ends = shares.cumsum(-1)
        at = torch.from_numpy(self.draws_BT[:, self.position, None]).to(ends.device) * ends[:, -1:]
        # below the end, to which rounding may lift it: then what is drawn has a share
        at = at.minimum(ends[:, -1:].nextafter(torch.zeros((), dtype=at.dtype, device=at.device)))
        # scores that are no numbers, of a model that has diverged, are above every share: the last token, then
        chosen = torch.searchsorted(ends, at, right=True).clamp_(max=scores.shape[-1] - 1)
        if order is not None:
            chosen = order.gather(-1, chosen)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen.to(scores.device), 0.0)
