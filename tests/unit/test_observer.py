"""A backward pass without gradients of weights shows a rule what a whole one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from soul.adapters import AdapterSpec, add_adapter
from soul.curvature import kronecker
from soul.curvature.observer import ends_of
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import Encoded
from soul.models import freeze_embeddings
from soul.optim.ekfac import EKFACSpec
from soul.optim.kfac import KFACSpec

ROWS = [Encoded((*range(2, 4 + i % 5), i, 1), 2 + i % 2) for i in range(20)]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SMALL |= {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "untied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "norms without weights": lambda: hf.OlmoConfig(**SMALL, tie_word_embeddings=True),
    "outputs changed in place": lambda: hf.OlmoConfig(**SMALL, clip_qkv=1.0),
    "biases": lambda: hf.Qwen2Config(**SMALL),
    "learned positions, Conv1D": lambda: hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=1
    ),
    "experts": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gemma": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=8),
}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "whole": lambda model: model,
    "frozen embeddings": lambda model: (freeze_embeddings(model), model)[1],
    "layers alone": lambda model: only_layers(model),
    "the last block": lambda model: only_layers(model, last=True),
    "LoRA": lambda model: add_adapter(model, AdapterSpec(r=2)),
    "checkpointing": lambda model: checkpointed(model),
    "layers alone, checkpointing": lambda model: checkpointed(only_layers(model)),
    "layers and the last norm, checkpointing": lambda model: checkpointed(only_layers(model, norm=True)),
    "LoRA, checkpointing": lambda model: checkpointed(add_adapter(model, AdapterSpec(r=2))),
    "reentrant checkpointing": lambda model: checkpointed(model, reentrant=True),
}


def only_layers(model: Any, *, last: bool = False, norm: bool = False) -> Any:
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, hf.pytorch_utils.Conv1D))]
    layers = [m for m in layers if m is not model.get_output_embeddings()]
    chosen = {id(p) for m in (layers[len(layers) // 2 :] if last else layers) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
    if norm:
        last_norm = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ("norm", "ln_f")][-1]
        for p in last_norm.parameters():
            p.requires_grad_(True)
    return model


def checkpointed(model: Any, *, reentrant: bool = False) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("config", CONFIGS)
def test_factors_are_those_of_a_whole_backward_pass(config: str, change: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = CHANGES[change](hf.AutoModelForCausalLM.from_config(CONFIGS[config]()))
    passes = CurvaturePasses(CurvatureSpec(batch=3, warm_start=3, cache=False), ROWS)
    spec = KFACSpec()
    lean, whole = (spec.build([p for p in model.parameters() if p.requires_grad], model) for _ in range(2))
    assert not lean.needs_gradients
    seen: list[str] = []
    handles = [
        p.register_hook(lambda _grad, name=name: seen.append(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    passes.refresh(model, lean, 0)
    linear = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, hf.pytorch_utils.Conv1D))}
    if "reentrant" not in change:
        assert not [n for n in seen if n.rpartition(".")[0] in linear or "embed" in n or "wte" in n]
    del seen[:]
    monkeypatch.setattr(type(whole), "needs_gradients", True)
    passes.refresh(model, whole, 0)
    assert any(n.rpartition(".")[0] in linear for n in seen)  # the hooks see what they are to see
    for handle in handles:
        handle.remove()
    found, expected = lean.curvature_state(), whole.curvature_state()
    assert found.keys() == expected.keys()
    assert any(name.endswith(".outputs") for name in found)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_who_wants_gradients_gets_them(make_model: Any) -> None:
    model = make_model()
    specs = KFACSpec(), KFACSpec(others="diagonal"), EKFACSpec()
    assert [spec.build(model.parameters(), model).needs_gradients for spec in specs] == [False, True, True]


def test_a_layer_that_no_pass_went_through_stays() -> None:
    """As the routers of experts, whose weights a model may use without calling them."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    rule = KFACSpec(lr=0.1).build(model.parameters(), model)
    with rule.observing():
        model[0](torch.eye(3)).backward(torch.eye(3))
    rule.update_curvature()
    assert rule.derived().keys() == {"0.left", "0.right"}
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.eye(3)).square().sum().backward()
    rule.step()
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [False, True]


def test_ekfac_knows_a_layer_that_a_later_pass_goes_through(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    rule = EKFACSpec(lr=0.1).build(model.parameters(), model)

    def refresh(module: nn.Module) -> None:
        with rule.observing():
            module(torch.eye(3)).backward(torch.eye(3))
        rule.update_curvature()
        rule.zero_grad()

    refresh(model[0])
    assert "showed nothing of 1 of 2 layers (the first is 1), which stay as they are" in caplog.text
    refresh(model)
    refresh(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.eye(3)).square().sum().backward()
    rule.step()
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [False, False]


@pytest.mark.parametrize("width", [kronecker.BANDED - 1, kronecker.BANDED, kronecker.BANDED + 5])
def test_sums_in_bands_are_whole(width: int) -> None:
    layer = nn.Sequential(nn.Linear(width, 2, bias=False))
    rows = torch.randn(40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = kronecker.KroneckerFactors(layer.double(), outputs=False)
    for share in (1.0, 0.5):
        with factors.observing():
            layer(rows[:25])
            layer(rows[25:])
        factors.absorb(share)
        torch.testing.assert_close(factors.inputs("0"), rows.T @ rows / 40, rtol=1e-12, atol=1e-14)


def test_ends_are_collected_in_the_forward_pass_alone(make_model: Any) -> None:
    model = checkpointed(make_model())
    before = [len(m._forward_hooks) for m in model.modules()]
    with ends_of(model) as ends:
        logits = model(torch.tensor([[2, 3, 4]])).logits
        count = len(ends)
        torch.autograd.grad(logits.sum(), ends)
    assert len(ends) == count
    assert [len(m._forward_hooks) for m in model.modules()] == before
