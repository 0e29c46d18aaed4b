"""When a model with its adapters off is the model before, and that asking it leaves training as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.reference import build_reference

LINEAR = ["q_proj", "v_proj"]
OTHERS: dict[str, Any] = {
    "IA3": lambda: IA3Config(target_modules=LINEAR, feedforward_modules=[]),
    "VeRA": lambda: VeraConfig(target_modules=["q_proj"], r=2),
    "LoHa": lambda: LoHaConfig(target_modules=LINEAR, r=2),
    "DoRA": lambda: LoraConfig(target_modules=LINEAR, r=2, use_dora=True),
    "biases": lambda: LoraConfig(target_modules=LINEAR, r=2, bias="lora_only"),
    "head": lambda: LoraConfig(target_modules=LINEAR, r=2, modules_to_save=["lm_head"]),
}


@pytest.fixture
def batch(tokenizer, forget_set):
    template = ChatTemplate(tokenizer)
    return collate_rows([template.encode(e) for e in forget_set[:3]], pad_id=template.pad)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_off_are_not_taken_for_the_model_before(make_model, batch, kind):
    """They were trained before, which their weights do not show: a copy answers."""
    model: Any = get_peft_model(make_model(), OTHERS[kind]()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".lora_" not in name:
                p.add_(0.3)
    with pytest.raises(ValueError, match=r"another one or has been trained already: set training\.reference to cache"):
        build_reference(model, as_model=True, mode="adapter_off")
    with build_reference(model, as_model=True).asking(model) as before, torch.no_grad():
        assert before is not model
        assert torch.equal(forward_answers(before, batch).logits_NV, forward_answers(model, batch).logits_NV)


def test_weights_that_are_trained_beside_the_adapter_are_not_off(make_model):
    model: Any = get_peft_model(make_model(), LoraConfig(target_modules=LINEAR, r=2))
    assert build_reference(model, as_model=True).live == model.disable_adapter
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    assert build_reference(model, as_model=True).live != model.disable_adapter


def test_what_is_frozen_stays_frozen_when_adapters_were_off(make_model, batch):
    """RMU trains the adapters of some blocks alone; peft trains all of them after it has put them on again."""
    model: Any = get_peft_model(make_model(), LoraConfig(target_modules=LINEAR, r=2))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "layers.1" in name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    nn.init.ones_(model.get_parameter("base_model.model.lm_head.weight"))
    reference = build_reference(model, as_model=True, mode="adapter_off")
    with pytest.raises(KeyboardInterrupt), reference.asking(model):
        raise KeyboardInterrupt
    answers = forward_answers(model, batch)
    reference.logits(model, batch, answers, "retain")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    answers.token_logps().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
