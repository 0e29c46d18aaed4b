from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from soul.attacks.quantize import Quantize
from soul.attacks.relearn import Relearn
from soul.data.batches import UnlearnDataset, collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers


@pytest.fixture
def data(tokenizer, forget_set):
    return UnlearnDataset(ChatTemplate(tokenizer), forget_set, (), ("forget",))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_weights_lie_on_their_rows_grid(make_model, data, bits):
    model, original = make_model(), make_model()
    head = model.lm_head.weight.clone()
    assert Quantize(bits)(model, data) is model
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    weight, before = model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight
    step = before.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert float((weight - before).detach().abs().max()) <= float(step.detach().max()) / 2 * 1.0001
    torch.testing.assert_close(weight / step, (weight / step).round(), atol=1e-4, rtol=0)
    assert len((weight[0] / step[0]).round().unique()) <= 2**bits - 1
    again = weight.clone()
    Quantize(bits)(model, data)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, again)  # rounding twice is rounding once


@pytest.mark.parametrize(("attack", "group"), [(Quantize(4), 64), (Quantize(4, group=30), 30), (Quantize(8), 100)])
def test_a_group_of_weights_has_its_own_scale(data, attack, group):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=100, n_layer=1, n_head=2))
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    before = weight.detach().clone()  # (in, out)
    attack(model, data)
    for start in range(0, 100, group):
        part = before[start : start + group]
        step = part.abs().amax(dim=0) / (2 ** (attack.bits - 1) - 1)
        torch.testing.assert_close(weight.detach()[start : start + group], (part / step).round() * step)


def test_layers_of_gpt2_are_rounded_by_output_too(data):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    before = weight.detach().clone()  # (in, out)
    Quantize(3)(model, data)
    step = before.abs().amax(dim=0) / 3
    torch.testing.assert_close(weight.detach(), (before / step).round() * step)


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=12)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES, num_local_experts=3, interleave_moe_layer_step=1)),
}
"""Experts are held as (expert, out, in) in the first two and as (expert, in, out) in the others."""


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_rounded_by_expert_and_output(data, kind):
    torch.manual_seed(0)
    model = MIXTURES[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()  # no two rows with one largest weight, and no empty experts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Quantize(4)(model, data)
    stacked = 0
    for name, p in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stacked += 1
            for e in range(3):
                old, new = before[name][e], p.detach()[e]
                if kind in ("gpt-oss", "llama4"):
                    old, new = old.T, new.T
                assert len(old) == (16 if "down" in name else 24)  # what is looped over is outputs
                for row, rounded in zip(old, new, strict=True):
                    step = row.abs().max() / 7
                    torch.testing.assert_close(rounded, (row / step).round() * step)
                    assert not torch.equal(rounded, row)
        elif "proj" not in name or name.endswith("bias"):  # routers, norms, embeddings, the head
            assert torch.equal(p, before[name]), name
    assert stacked == 4


class FlatExperts(nn.Module):
    """Experts one below the other, as DBRX has them."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(6, 4))


def test_experts_of_unknown_form_are_no_pass(make_model, data):
    model = make_model()
    model.experts = FlatExperts()
    with pytest.raises(ValueError, match=r"cannot tell the rows of FlatExperts\.w1"):
        Quantize(4)(model, data)


def nll(model, data, picked):
    rows = [data.encoded["forget"][i] for i in picked]
    with torch.no_grad():
        return float(-forward_answers(model, collate_rows(rows, pad_id=data.template.pad)).token_logps().mean())


def test_relearning_learns_its_share_and_nothing_is_left_behind(make_model, data):
    attack = Relearn(share=0.25, steps=8, lr=1e-3)
    chosen = attack.known(8)
    assert len(chosen) == 2
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    before = nll(model, data, chosen)
    attack(model, data)
    assert nll(model, data, chosen) < before - 0.5
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    twin = make_model()
    attack(twin, data)
    assert torch.equal(copy.deepcopy(twin).lm_head.weight, model.lm_head.weight)  # the same attack, to the bit


def test_weights_of_16_bits_relearn_as_far_as_others(make_model, data):
    attack = Relearn(share=0.5, steps=10, lr=1e-4)  # a step is below half of what bf16 tells apart near 1
    chosen = attack.known(8)
    gained = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model().to(dtype)
        before = nll(model, data, chosen)
        gained[dtype] = before - nll(attack(model, data), data, chosen)
        assert all(p.dtype == dtype for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
    assert gained[torch.bfloat16] > 0.8 * gained[torch.float32] > 0


def test_relearning_rests_when_the_attackers_own_are_learned(make_model, data):
    attack = Relearn(share=0.25, steps=200, lr=1e-3, until=2.0)
    model, long = make_model(), make_model()
    attack(model, data)
    Relearn(share=0.25, steps=200, lr=1e-3)(long, data)
    chosen = attack.known(8)
    assert nll(long, data, chosen) < 1.0 < nll(model, data, chosen) <= 2.0


def test_relearning_with_dropout_is_a_function_of_its_seed(tokenizer, data):
    def relearned(noise, seed=0):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=8, n_layer=1, n_head=2))
        torch.manual_seed(noise)  # what went on before must not matter, nor what comes after
        Relearn(share=1.0, steps=2, lr=1e-2, seed=seed)(model.eval(), data)
        return model.state_dict()["transformer.wpe.weight"], torch.rand(3)

    (one, after), (two, _) = relearned(1), relearned(2)
    torch.manual_seed(1)
    assert torch.equal(one, two)
    assert torch.equal(after, torch.rand(3))
    assert not torch.equal(one, relearned(1, seed=1)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(1), "between 2 and 16"),
        (lambda: Quantize(4, group=-1), r"quantize\.group"),
        (lambda: Relearn(until=float("nan")), r"relearn\.until"),
        (lambda: Relearn(share=0), "relearn.share"),
        (lambda: Relearn(steps=0), "relearn.steps"),
        (lambda: Relearn(lr=0), "relearn.lr"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
