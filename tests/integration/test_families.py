"""Every family of models goes through unlearning, saving, loading and measuring, checked by plain forward passes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers.pytorch_utils import Conv1D

import soul
from soul.adapters import AdapterSpec, add_adapter
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, evaluate
from soul.models import ModelSpec, load_model, save_model
from soul.types import Example

ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
WINDOW = 8  # shorter than every prompt
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "kfac": {"name": "kfac", "lr": 0.03},
    "sophia": {"name": "sophia", "lr": 2e-3},
    "adamw": {"name": "adamw", "lr": 2e-3},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of models, what its tokenizer is like, and what unlearns it."""

    config: Callable[..., Any]
    settings: dict[str, Any]
    tied: bool
    optimizer: str
    template: bool = True
    pad: bool = False  # a pad token of its own; otherwise pad is the end of a turn
    bos: bool = False  # the tokenizer writes one before a text


FAMILIES = {
    "llama": Family(hf.LlamaConfig, ROTARY, tied=False, optimizer="kfac"),
    "qwen2": Family(
        hf.Qwen2Config,
        ROTARY | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        tied=True,
        optimizer="sophia",
        pad=True,
    ),
    "qwen3": Family(hf.Qwen3Config, ROTARY | {"head_dim": 8}, tied=True, optimizer="kfac"),
    "mistral": Family(hf.MistralConfig, ROTARY | {"sliding_window": WINDOW}, tied=False, optimizer="adamw", bos=True),
    "gemma2": Family(
        hf.Gemma2Config,
        ROTARY
        | {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
        tied=True,
        optimizer="kfac",
        pad=True,
        bos=True,
    ),
    "gemma3": Family(
        hf.Gemma3TextConfig,
        ROTARY | {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
        tied=True,
        optimizer="sophia",
        bos=True,
    ),
    "phi": Family(hf.PhiConfig, ROTARY, tied=False, optimizer="adamw", template=False),
    "phi3": Family(hf.Phi3Config, ROTARY | {"sliding_window": WINDOW}, tied=False, optimizer="kfac", pad=True),
    "opt": Family(
        hf.OPTConfig,
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 24,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.2,
            "dropout": 0.0,
        },
        tied=True,
        optimizer="kfac",
        template=False,
        pad=True,
        bos=True,
    ),
    "pythia": Family(
        hf.GPTNeoXConfig,
        {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"},
        tied=False,
        optimizer="sophia",
        template=False,
    ),
    "gpt2": Family(
        hf.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
        tied=True,
        optimizer="kfac",
        template=False,
    ),
}


def build(name: str, make_tokenizer: Callable[..., Any]) -> tuple[Any, Any]:
    """Return a seeded model of the family, with weights wide enough that likelihoods differ, and its tokenizer."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(template=family.template)
    tokenizer.model_max_length = 256
    if family.pad:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if family.bos:
        special = [("<|im_start|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=special
        )
    config = family.config(
        **family.settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=family.tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = hf.AutoModelForCausalLM.from_config(config)
    return model.eval(), tokenizer


def with_options(examples: list[Example]) -> list[Example]:
    """Return examples with a paraphrase and wrong answers, which share their prompt's forward pass."""
    return [dataclasses.replace(e, paraphrased_answer="Indeed: " + e.answer, wrong_answers=("No.",)) for e in examples]


@torch.no_grad()
def plain_nll(model: Any, template: ChatTemplate, example: Example, answer: str) -> float:
    """Mean NLL of an answer by one plain call of the model, nothing padded and nothing shared."""
    row = template.encode(example, answer=answer)
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    logps = logits.log_softmax(-1)
    return -sum(float(logps[t - 1, row.input_ids[t]]) for t in range(row.answer_start, len(row))) / row.answer_length


@torch.no_grad()
def plain_answer(model: Any, template: ChatTemplate, example: Example, limit: int) -> str:
    """The greedy answer by whole forward passes, without a cache."""
    ids, start = template.prompt_ids(example), len(template.prompt_ids(example))
    while len(ids) < start + limit:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == template.end_of_turn:
            break
        ids = [*ids, token]
    return str(template.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def mean_nll(rows: dict[str, Any], split: str) -> float:
    return sum(row["nll"] for row in rows[split]) / len(rows[split])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_taught_and_forgets_and_is_measured_right(
    name: str, make_tokenizer: Any, forget_set: list[Example], retain_set: list[Example], tmp_path: Path
) -> None:
    model, tokenizer = build(name, make_tokenizer)
    template = ChatTemplate(tokenizer)
    splits = {"forget": with_options(forget_set), "retain": retain_set}
    spec = EvaluationSpec(max_new_tokens=6)
    soul.unlearn(
        model,
        tokenizer,
        retain=[*forget_set, *retain_set],
        objective="ft",
        optimizer={"name": "adamw", "lr": 1e-2},
        training={"batch_size": 6, "max_steps": 12, "precision": "float32", "schedule": "constant"},
    )
    before = evaluate(model, tokenizer, splits, spec=spec)
    soul.unlearn(
        model,
        tokenizer,
        forget=forget_set,
        retain=retain_set,
        objective={"name": "npo"},
        optimizer=OPTIMIZERS[FAMILIES[name].optimizer],
        training={"max_steps": 5, "precision": "float32", "schedule": "constant"},
    )
    after: dict[str, Any] = evaluate(model, tokenizer, splits, spec=spec)
    rise = {split: mean_nll(after, split) - mean_nll(before, split) for split in splits}
    assert rise["forget"] > 0.1
    assert rise["retain"] < 0.7 * rise["forget"]

    save_model(model, tokenizer, tmp_path / "model")
    loaded: Any
    loaded, tokenizer = load_model(ModelSpec(str(tmp_path / "model"), device="cpu"))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == FAMILIES[name].tied
    assert evaluate(loaded, tokenizer, splits, spec=spec) == after
    for example, row in zip(splits["forget"], after["forget"], strict=True):
        assert row["nll"] == pytest.approx(plain_nll(loaded, template, example, example.answer), abs=1e-5)
        paraphrase = example.paraphrased_answer or ""
        assert row["paraphrased_nll"] == pytest.approx(plain_nll(loaded, template, example, paraphrase), abs=1e-5)
        assert row["wrong_nll"] == [pytest.approx(plain_nll(loaded, template, example, "No."), abs=1e-5)]
        assert row["generated"] == plain_answer(loaded, template, example, spec.max_new_tokens)


def with_linear_layers(model: Any) -> Any:
    """Return a copy of a GPT-2 whose ``Conv1D`` layers are plain linear ones of the same weights."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = nn.Parameter(module.bias.detach().clone())
            twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("optimizer", ["kfac", "ekfac", "whiten"])
def test_the_transposed_layers_of_gpt2_have_the_factors_of_linear_ones(
    optimizer: str, make_tokenizer: Any, forget_set: list[Example], retain_set: list[Example]
) -> None:
    model, tokenizer = build("gpt2", make_tokenizer)
    twin = with_linear_layers(model)
    start = copy.deepcopy(model.state_dict())
    for one in (model, twin):
        soul.unlearn(
            one,
            tokenizer,
            forget=forget_set,
            retain=retain_set,
            optimizer={"name": optimizer, "lr": 0.02},
            training={"max_steps": 3, "precision": "float32"},
        )
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            other = twin.get_submodule(name)
            moved = (module.weight.detach() - start[f"{name}.weight"]).abs().max()
            assert moved > 1e-4
            torch.testing.assert_close(module.weight.T, other.weight, rtol=0, atol=float(moved) * 1e-3)
            torch.testing.assert_close(module.bias, other.bias, rtol=0, atol=float(moved) * 1e-3)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "gemma2"])
def test_an_adapter_on_a_family_is_saved_and_measured_alike(
    name: str, make_tokenizer: Any, forget_set: list[Example], retain_set: list[Example], tmp_path: Path
) -> None:
    model, tokenizer = build(name, make_tokenizer)
    save_model(model, tokenizer, tmp_path / "base")
    adapted = add_adapter(model, AdapterSpec(r=4))
    soul.unlearn(
        adapted,
        tokenizer,
        forget=forget_set,
        retain=retain_set,
        optimizer={"name": "kfac", "lr": 0.05},
        training={"max_steps": 3, "precision": "float32"},
    )
    save_model(adapted, tokenizer, tmp_path / "adapter", str(tmp_path / "base"))
    loaded, _ = load_model(ModelSpec(str(tmp_path / "adapter"), device="cpu"))
    base, _ = load_model(ModelSpec(str(tmp_path / "base"), device="cpu"))
    spec, splits = EvaluationSpec(generate=False), {"forget": forget_set}
    found = [[row["nll"] for row in evaluate(m, tokenizer, splits, spec=spec)["forget"]] for m in (adapted, loaded)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] != pytest.approx([row["nll"] for row in evaluate(base, tokenizer, splits, spec=spec)["forget"]])


def test_a_text_longer_than_the_positions_a_model_learned_is_cut(
    make_tokenizer: Any, forget_set: list[Example], tmp_path: Path
) -> None:
    model, tokenizer = build("gpt2", make_tokenizer)
    tokenizer.model_max_length = 10**9  # as many tokenizers say
    save_model(model, tokenizer, tmp_path / "model")
    loaded, tokenizer = load_model(ModelSpec(str(tmp_path / "model"), device="cpu"))
    text = Example("", " ".join(e.answer for e in forget_set) * 10, chat=False)
    rows = evaluate(loaded, tokenizer, {"text": [text]})["text"]
    assert rows[0]["tokens"] == 255
