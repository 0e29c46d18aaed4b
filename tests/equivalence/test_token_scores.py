"""Token scores, gradient norms and sampled answers against slow plain transcriptions, one unpadded row at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul import likelihood
from soul.data.templates import ChatTemplate, Encoded
from soul.generation import _Draw, _draws, sample_answers
from soul.metrics.memorization import extraction_strength
from soul.token_scores import gradient_norms, standardise, token_scores
from soul.types import Ask, Example


def plain_z(logits: list[float], token: int) -> float:
    """Transcribe Min-K++'s ``(log p - mu) / sigma`` with Python's floats."""
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    shares = [math.exp(x - top) / total for x in logits]
    logps = [x - top - math.log(total) for x in logits]
    mu = sum(p * lp for p, lp in zip(shares, logps, strict=True))
    sigma = math.sqrt(sum(p * (lp - mu) ** 2 for p, lp in zip(shares, logps, strict=True)))
    return (logps[token] - mu) / sigma


def test_standardised_tokens_equal_the_formula_on_made_up_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 17, generator=generator) * torch.logspace(-3, 1.3, 40)[:, None]
    targets = torch.randint(17, (40,), generator=generator)
    found = standardise(logits, targets).tolist()
    expected = [plain_z(x, t) for x, t in zip(logits.double().tolist(), targets.tolist(), strict=True)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_standardised_tokens_of_degenerate_distributions() -> None:
    flat, sure = torch.zeros(1, 9), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert standardise(flat, torch.tensor([3])).tolist() == pytest.approx([0], abs=1e-4)
    assert standardise(sure, torch.tensor([0])).tolist() == [0]
    assert standardise(sure, torch.tensor([1])).tolist() == [-math.inf]
    peaked = torch.tensor([[0.0, -30.0, -30.0]])  # where the difference of two sums in fp32 is 0
    assert standardise(peaked, torch.tensor([1])).item() == pytest.approx(plain_z([0.0, -30.0, -30.0], 1), rel=1e-5)


def encoded(template: ChatTemplate, examples: list[Example]) -> list[Encoded]:
    return [template.encode(e) for e in examples]


def greedy_endings(model: Any, rows: list[Encoded]) -> list[Encoded]:
    """Let the ends of some answers be what the model says anyway."""
    found = list(rows)
    with torch.no_grad():
        for i in (0, 3, 5):
            ids, start = list(rows[i].input_ids), rows[i].answer_start
            for t in range(start + (len(ids) - start) // 2, len(ids)):
                ids[t] = int(model(torch.tensor([ids[:t]])).logits[0, -1].argmax())
            found[i] = Encoded(tuple(ids), start)
    return found


@pytest.mark.parametrize("max_tokens", [4096, 70])
def test_token_scores_equal_the_models_own_logits(
    max_tokens: int,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    forget_set: list[Example],
) -> None:
    model, template = make_model(seed=3), ChatTemplate(tokenizer)
    one = Encoded(template.encode(forget_set[0]).input_ids[:9], 8)  # an answer of one token
    rows = [*greedy_endings(model, encoded(template, forget_set)), one]
    seen: list[tuple[int, int]] = []
    found = token_scores(
        model, rows, pad_id=template.pad, max_tokens=max_tokens, progress=lambda d, n: seen.append((d, n))
    )
    exact = make_model(seed=3).double()
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([row.input_ids])).logits[0, row.answer_start - 1 : -1]
        targets = row.input_ids[row.answer_start :]
        logps = logits.log_softmax(-1)
        assert scores.logps == pytest.approx([float(logps[t, v]) for t, v in enumerate(targets)], abs=1e-5)
        assert scores.matches == [int(logits[t].argmax() == v) for t, v in enumerate(targets)]
        assert scores.z == pytest.approx([plain_z(logits[t].tolist(), v) for t, v in enumerate(targets)], abs=1e-4)
    assert any(1 in scores.matches for scores in found)
    assert seen[-1] == (len(rows), len(rows))
    _, strength = likelihood.extraction_strength(model, rows, pad_id=template.pad)
    assert [extraction_strength(scores.matches) for scores in found] == strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_norms_equal_a_backward_pass_and_leave_the_model_alone(
    dtype: torch.dtype,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    forget_set: list[Example],
) -> None:
    model, template = make_model(seed=3, dtype=dtype), ChatTemplate(tokenizer)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    rows = encoded(template, forget_set[:3])
    with torch.no_grad():  # as evaluation may be called
        found = gradient_norms(model, rows)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != "model.embed_tokens.weight")
        assert torch.equal(p, weights[name])
        assert p.grad is None or name == "lm_head.weight"
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    plain = make_model(seed=3).double()
    expected = []
    for row in rows:
        plain.zero_grad()
        logps = plain(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        answer = torch.tensor(row.input_ids[row.answer_start :])
        (-logps[row.answer_start - 1 : -1].gather(1, answer[:, None]).mean()).backward()
        expected.append(math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert found == pytest.approx(expected, rel=tolerance)


def drawn(logits: list[float], temperature: float, top_p: float, n: int = 20_000) -> Counter[int]:
    draws = np.random.default_rng(0).random((n, 1))
    scores = torch.tensor([logits]).expand(n, -1)
    left = _Draw(draws, temperature, top_p)(torch.zeros(n, 1, dtype=torch.long), scores)
    assert (left == 0).sum().item() == n
    return Counter(left.argmax(-1).tolist())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.6), (1.0, 0.05)])
def test_draws_follow_the_tempered_and_truncated_distribution(temperature: float, top_p: float) -> None:
    logits = [0.3, -1.0, 2.0, 1.2, 0.0]
    shares = [math.exp(x / temperature) for x in logits]
    shares = [x / sum(shares) for x in shares]
    kept: list[int] = []
    for i in sorted(range(5), key=lambda i: -shares[i]):  # the fewest that hold top_p
        if sum(shares[j] for j in kept) < top_p:
            kept.append(i)
    found = drawn(logits, temperature, top_p)
    assert set(found) == set(kept)
    for i in kept:
        assert found[i] / 20_000 == pytest.approx(shares[i] / sum(shares[j] for j in kept), abs=0.015)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53, 1.0])  # 1 is never drawn, but rounding may make it of less
def test_a_token_without_probability_is_never_drawn(draw: float, top_p: float) -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    left = _Draw(np.array([[draw]]), 1.0, top_p)(torch.zeros(1, 1, dtype=torch.long), scores)
    assert left.argmax(-1).item() in (1, 3)


def test_samples_depend_on_seed_and_name_and_not_on_the_batch(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    model, template = make_model(seed=3), ChatTemplate(tokenizer)
    prompts = [template.prompt_ids(e) for e in forget_set]
    names = [e.id for e in forget_set]

    def sample(which: list[int], seed: int = 0, rows: int = 64, samples: int = 3, length: int = 6) -> list[list[str]]:
        ask = Ask(samples=samples, seed=seed)
        found = sample_answers(
            model,
            template,
            [prompts[i] for i in which],
            [names[i] for i in which],
            ask,
            max_new_tokens=length,
            rows=rows,
        )
        return [[answer.text for answer in answers] for answers in found]

    whole = sample(list(range(8)))
    assert [len(answers) for answers in whole] == [3] * 8
    assert len({text for answers in whole for text in answers}) > 12
    assert sample([5, 2], rows=1) == [whole[5], whole[2]]  # another batch, other padding
    assert [answers[:2] for answers in whole] == sample(list(range(8)), samples=2)  # more samples begin alike
    assert sample(list(range(8)), seed=1) != whole
    short, long = _draws(0, "a", 0, 4), _draws(0, "a", 0, 9)
    assert short.tolist() == long[:4].tolist()
    assert _draws(0, "a", 1, 4).tolist() != short.tolist()
    assert _draws(0, "b", 0, 4).tolist() != short.tolist()
