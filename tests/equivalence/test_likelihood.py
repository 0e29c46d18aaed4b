"""Likelihoods with shared prompts against the model's own logits, one unpadded row at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from soul import likelihood
from soul.data.templates import ChatTemplate, Encoded

V = 50
ROTARY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "initializer_range": 0.4,
}
EAGER: dict[str, Any] = {**ROTARY, "attn_implementation": "eager"}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROTARY)),
    "llama, eager attention": lambda: LlamaForCausalLM(LlamaConfig(**EAGER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROTARY, head_dim=4)),
    "falcon, positions by slope": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True, initializer_range=0.4
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    ),
    "mistral, window shorter than the prompt": lambda: MistralForCausalLM(MistralConfig(**ROTARY, sliding_window=4)),
    "gemma2, every other layer a window, soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**ROTARY, head_dim=4, sliding_window=4)
    ),
    "bloom, positions by slope": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.4)
    ),
    "mamba, no attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
}
BRANCHING = {"llama", "qwen3"}
SHARING = set(MODELS) - BRANCHING - {"mamba, no attention"}
IMPRECISE = {name for name in MODELS if name.startswith(("bloom", "falcon", "mamba", "gemma2", "llama, eager"))}


def build(name: str) -> Any:
    torch.manual_seed(0)
    # Gemma 2 takes its softmax in fp32, where float64's mask value is -inf and rows that see nothing are nan
    return MODELS[name]().to(torch.float32 if name.startswith("gemma2") else torch.float64).eval()


def make_rows() -> list[Encoded]:
    """Questions of unequal length with one to seven answers of unequal length, in mixed order; one has no prompt."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, V, (n,), generator=generator).tolist())

    rows = []
    for prompt, answers in ((9, (3, 1, 7, 4, 2, 11, 5)), (2, (6, 2)), (13, (4,)), (5, (1, 1, 9)), (1, (8, 3))):
        head = draw(prompt)
        rows += [Encoded(head + draw(n), prompt) for n in answers]
        begun = head + draw(3)  # answers that begin alike, one of them twice, one the beginning of the others
        rows += [Encoded(begun + tail, prompt) for tail in ((), draw(2), draw(4), (7, 7, 8), (7, 7, 9), (7, 7, 9))]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def direct(model: Any, row: Encoded) -> float:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    targets = row.input_ids[row.answer_start :]
    return -sum(float(logps[row.answer_start - 1 + t, v]) for t, v in enumerate(targets)) / len(targets)


@pytest.mark.parametrize("max_tokens", [4096, 40])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_logits(name: str, max_tokens: int) -> None:
    model, rows = build(name), make_rows()
    found = likelihood.sequence_nll(model, rows, pad_id=0, max_tokens=max_tokens)
    # slopes, Mamba's scan and the softmax of eager attention are fp32 whatever the weights are
    rel = 1e-9 if name not in IMPRECISE else 1e-5
    assert found == pytest.approx([direct(model, row) for row in rows], rel=rel)


def positions_read(model: Any, rows: list[Encoded]) -> int:
    """Count the tokens that go into the model."""
    seen = list[int]()
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    likelihood.sequence_nll(model, rows, pad_id=0)
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_common_is_read_once_where_the_model_can(name: str) -> None:
    rows = [Encoded((*range(3, 23), 30 + i, 40), 20) for i in range(6)]
    apart = positions_read(build(name), rows)
    # the end of the prompt goes with each answer where keys and values are kept, and with none in a tree
    assert apart == (20 + 6 if name in BRANCHING else 19 + 6 * 2 if name in SHARING else 6 * 22)
    rows = [Encoded((*range(3, 23), 41, 42, 43, 30 + i, 40), 20) for i in range(6)]
    alike = positions_read(build(name), rows)
    assert alike == (20 + 3 + 6 if name in BRANCHING else apart + 6 * 3)


def draw_rows(prompt: int, answers: Sequence[int], seed: int = 2) -> list[Encoded]:
    """Answers of these lengths to one prompt, with as little in common as chance has it."""
    generator = torch.Generator().manual_seed(seed)
    head, *tails = (tuple(torch.randint(3, V, (n,), generator=generator).tolist()) for n in (prompt, *answers))
    return [Encoded(head + tail, prompt) for tail in tails]


LENGTHS = [3 + 7 * i % 19 for i in range(60)]
LARGE = {
    "an instruction of all": draw_rows(12, LENGTHS),
    "an instruction and a beginning of all": [
        Encoded((*row.input_ids[:12], *range(3, 9), *row.input_ids[12:]), 12) for row in draw_rows(12, LENGTHS)
    ],
    "hardly a prompt": draw_rows(2, [22 + n for n in LENGTHS]),
    "a prompt that fills most of a batch": draw_rows(80, LENGTHS),
    "a prompt longer than a batch": draw_rows(130, LENGTHS),
    "a row longer than a batch": draw_rows(12, [4, 150, 5, 6, 150, 3]),
    "two prompts and one alone": draw_rows(12, LENGTHS) + draw_rows(9, LENGTHS, seed=3) + draw_rows(7, [5], seed=4),
    "one answer many times": draw_rows(12, [9, 5]) * 40,
}


@pytest.mark.parametrize("rows", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float64),
        ("llama", torch.float32),
        ("mistral, window shorter than the prompt", torch.float64),
    ],
)
def test_many_rows_of_a_prompt_take_the_memory_of_a_batch(name: str, rows: list[Encoded], dtype: torch.dtype) -> None:
    model, limit, masks = build(name).to(dtype), 100, list[torch.Size]()

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"].shape)

    with torch.no_grad():
        expected = [likelihood._whole(model, [row], 0)[0] for row in rows]
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = likelihood.sequence_nll(model, rows, pad_id=0, max_tokens=limit)
    handle.remove()
    assert found == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-5)
    trees = [mask for mask in masks if len(mask) == 4]  # (trees, 1, nodes, nodes)
    assert all(mask[0] * mask[-1] <= limit for mask in trees)
    # what is padded, and keys and values kept of a prompt, count as tokens of a batch
    assert all(mask.numel() <= limit or mask[0] == 1 for mask in masks if len(mask) == 2)


def test_rows_are_read_as_a_tree_after_their_prompt_or_whole_by_what_they_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: set[str] = set()
    for way in ("_in_trees", "_after_prompts", "_whole"):
        inner = getattr(likelihood, way)
        monkeypatch.setattr(likelihood, way, lambda *args, way=way, inner=inner: used.add(way) or inner(*args))
    for name, ways in {
        "hardly a prompt": {"_whole"},
        "an instruction and a beginning of all": {"_in_trees"},
        "a prompt longer than a batch": {"_after_prompts"},
    }.items():
        used.clear()
        likelihood.sequence_nll(build("llama"), LARGE[name], pad_id=0, max_tokens=100)
        assert used == ways, name


def test_a_tree_of_more_rows_takes_less_work_than_reading_them_whole() -> None:
    """The nodes counted are those that grow, and the trees and rows of a group are all of it."""
    width = 400
    for rows in LARGE.values():
        for limit in (40, 100, 1000):
            parts, whole, work = likelihood._split(rows, range(len(rows)), limit, width)
            assert sorted([i for part in parts for i in part] + whole) == list(range(len(rows)))
            nodes = [len(likelihood._grow([rows[i] for i in part]).tokens) for part in parts]
            alone = [len(rows[i]) - 1 for i in whole]
            assert max(nodes, default=0) <= limit
            assert work == sum(n * (width + n) for n in nodes + alone)
            assert work <= sum((len(row) - 1) * (width + len(row) - 1) for row in rows)


def test_progress_counts_every_row_once() -> None:
    seen: list[tuple[int, int]] = []
    rows = make_rows()
    likelihood.sequence_nll(build("llama"), rows, pad_id=0, max_tokens=30, progress=lambda d, n: seen.append((d, n)))
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert seen[-1] == (len(rows), len(rows))


def test_extraction_strength_is_what_greedy_decoding_needs(make_model, tokenizer, forget_set):
    model, template = make_model(seed=3), ChatTemplate(tokenizer)
    torch.manual_seed(0)
    rows = [template.encode(e) for e in forget_set]
    with torch.no_grad():  # let the ends of some answers be what the model says anyway
        for i in (0, 3, 5):
            ids, start = list(rows[i].input_ids), rows[i].answer_start
            for t in range(start + (len(ids) - start) // 2, len(ids)):
                ids[t] = int(model(torch.tensor([ids[:t]])).logits[0, -1].argmax())
            rows[i] = Encoded(tuple(ids), start)
    nll, strength = likelihood.extraction_strength(model, rows, pad_id=template.pad, max_tokens=60)
    assert nll == pytest.approx(likelihood.sequence_nll(model, rows, pad_id=template.pad), rel=1e-5)
    for row, found in zip(rows, strength, strict=True):
        answer = list(row.input_ids[row.answer_start :])
        for k in range(len(answer) + 1):  # the least k from which greedy decoding gives the rest
            ids = list(row.input_ids[: row.answer_start + k])
            while len(ids) < len(row.input_ids):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids == list(row.input_ids):
                assert found == pytest.approx(1 - k / len(answer))
                break
    assert len({round(x, 3) for x in strength}) > 1
