"""Compiled decoder blocks train as the uncompiled ones do, and are out of the way of whatever looks into them."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch._inductor.config as inductor

from soul import config
from soul.adapters import AdapterSpec, add_adapter
from soul.compiled import CompiledBlocks
from soul.forward import decoder_blocks
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import UnlearnTrainer, make_dataset
from soul.training import TrainingSpec

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name),
    reason="code for CPUs needs a C++ compiler",
)


@pytest.fixture
def trained(make_model, tokenizer, forget_set, retain_set, tmp_path):
    """Train a few steps and return the weights before and after."""

    def train(compile: bool, objective: str = "grad_diff", lora: bool = False, optimizer=None, **settings):
        model = make_model()
        if lora:
            model = add_adapter(model, AdapterSpec(r=2, alpha=4), 0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        settings = {"max_steps": 3, "precision": "float32"} | settings
        training = TrainingSpec(batch_size=3, save_steps=0, warmup=0.0, compile=compile, **settings)
        loss = OBJECTIVES.get(objective)()
        rule = optimizer or OPTIMIZERS.get("sgd")(lr=0.05)
        trainer = UnlearnTrainer(
            model,
            training.arguments(tmp_path),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, ["No idea."]),
            objective=loss,
            optimizer=rule,
            training=training,
        )
        trainer.train()
        return before, {n: p.detach() for n, p in model.named_parameters()}

    return train


def gap(one, other, before) -> float:
    """How far two runs end from each other, as a share of how far they went."""
    apart = sum(float((one[n] - other[n]).square().sum()) for n in one)
    went = sum(float((one[n] - before[n]).square().sum()) for n in one)
    assert went > 0
    return (apart / went) ** 0.5


@needs_compiler
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_compiled_run_ends_where_the_other_does(trained, lora):
    before, plain = trained(False, lora=lora)
    _, compiled = trained(True, lora=lora)
    assert gap(plain, compiled, before) < 1e-4
    assert any(not torch.equal(plain[n], compiled[n]) for n in plain)  # other code did it


@needs_compiler
def test_in_bf16_short_attention_is_called_from_compiled_code(trained):
    before, plain = trained(False, precision="bfloat16", max_steps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _, compiled = trained(True, precision="bfloat16", max_steps=1)
    assert sum(event.name == "soul::short_attention_gradients" for event in seen.events() or ()) >= 2  # of both blocks
    assert gap(plain, compiled, before) < 0.05


@needs_compiler
def test_curvature_sees_into_blocks_that_are_compiled_for_steps(trained):
    rule = {"name": "kfac", "lr": 0.05, "curvature": {"interval": 2, "cache": False}}
    kfac = config.component(OPTIMIZERS, rule, "kfac")
    before, plain = trained(False, optimizer=kfac)
    _, compiled = trained(True, optimizer=kfac)
    assert gap(plain, compiled, before) < 1e-3


@needs_compiler
def test_outside_of_a_step_blocks_are_as_they_were(make_model):
    model = make_model()
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    compiled = CompiledBlocks(model)
    with compiled:
        inside = model(ids).logits
    seen = []
    handle = decoder_blocks(model)[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(ids).logits, expected)
    handle.remove()
    assert seen == [1]
    assert torch.allclose(inside, expected, atol=1e-4)
    assert not any("_compiled_call_impl" in name for name in model.state_dict())


@needs_compiler
def test_a_compiler_that_fails_is_one_message(make_model, monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no headers here >&2\nexit 1\n")
    broken.chmod(0o755)
    torch._dynamo.reset()
    model = make_model()
    message = r"training\.compile: the decoder blocks could not be compiled"
    with (
        inductor.patch({"cpp.cxx": (str(broken),), "force_disable_caches": True}),
        pytest.raises(ValueError, match=message),
        CompiledBlocks(model),
    ):
        model(torch.arange(12).view(2, 6))
    assert model(torch.arange(12).view(2, 6)).logits.isfinite().all()
    torch._dynamo.reset()


def test_what_cannot_be_compiled_is_refused_at_the_start(trained, make_model, monkeypatch):
    with pytest.raises(ValueError, match="looks at what a decoder block gives"):
        trained(True, objective="rmu")
    message = r"training\.compile does not go with gradient_checkpointing"
    with pytest.raises(ValueError, match=message):
        TrainingSpec(compile=True, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=message):
        TrainingSpec(compile=True, combine="dual")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on CPUs"):
        CompiledBlocks(make_model())
