from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

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


def test_layers_of_gpt2_are_rounded_by_output_too(data):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    before = weight.detach().clone()  # (in, out)
    Quantize(3)(model, data)
    step = before.abs().amax(dim=0) / 3
    torch.testing.assert_close(weight.detach(), (before / step).round() * step)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(1), "between 2 and 16"),
        (lambda: Relearn(share=0), "relearn.share"),
        (lambda: Relearn(steps=0), "relearn.steps"),
        (lambda: Relearn(lr=0), "relearn.lr"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
