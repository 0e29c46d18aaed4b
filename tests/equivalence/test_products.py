"""Gauss-Newton-vector products and their gradients against explicit matrices in float64."""

from __future__ import annotations

from typing import Any, get_args

import exact
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from soul.curvature.products import (
    GaussNewton,
    Jvp,
    add_to,
    backward,
    curvature_pass,
    loss_gradient,
    mean_nll,
    micro_batches,
    single_rows,
    trainable,
)
from soul.curvature.vectors import axpy_, copy, dot, norm
from soul.forward import forward_answers

BATCHES = exact.batches(1, 6)  # three micro-batches of unequal numbers of answer tokens


@pytest.fixture(scope="module")
def model():
    return exact.opt()


@pytest.fixture(scope="module")
def matrix(model):
    assert len({int(b["answer_mask"].sum()) for b in BATCHES}) > 1
    return exact.gauss_newton(model, BATCHES)


@pytest.mark.parametrize(
    ("jvp", "tolerance"), [("auto", 1e-11), ("forward", 1e-11), ("double_backward", 1e-11), ("difference", 5e-4)]
)
def test_products_are_those_of_the_explicit_matrix(model: Any, matrix: torch.Tensor, jvp: Jvp, tolerance: float):
    product = GaussNewton(model, BATCHES, jvp)
    for seed in range(3):
        v = exact.random_vector(model, seed)
        expected = matrix @ exact.flat(model, v)
        found = exact.flat(model, product(v))
        assert float((found - expected).norm() / expected.norm()) < tolerance
        assert product.quadratic(v) == pytest.approx(float(exact.flat(model, v) @ expected), rel=tolerance)


def test_a_vector_over_some_parameters_is_zero_elsewhere(model, matrix):
    v = {n: x for n, x in exact.random_vector(model, 4).items() if "fc1" in n}
    expected = matrix @ exact.flat(model, v)
    torch.testing.assert_close(exact.flat(model, GaussNewton(model, BATCHES, "forward")(v)), expected)
    torch.testing.assert_close(exact.flat(model, GaussNewton(model, BATCHES, "double_backward")(v)), expected)


def test_micro_batches_do_not_matter(model, matrix):
    many = exact.rows(1, 6)
    v = exact.random_vector(model, 5)
    for tokens in (1, 20, 10_000):
        found = exact.flat(model, GaussNewton(model, micro_batches(many, 0, tokens))(v))
        torch.testing.assert_close(found, matrix @ exact.flat(model, v), rtol=1e-10, atol=1e-13)


def test_single_rows_are_the_rows_without_padding():
    rows = exact.rows(1, 6)
    found = single_rows(BATCHES)
    assert sorted(tuple(b["input_ids"][0].tolist()) for b in found) == sorted(r.input_ids for r in rows)
    assert sorted(int(b["answer_mask"].sum()) for b in found) == sorted(r.answer_length for r in rows)
    assert all(b["attention_mask"].all() and len(b["view"]) == len(b["key"]) == 1 for b in found)


def test_nothing_is_left_behind(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    for jvp in get_args(Jvp):
        GaussNewton(model, BATCHES, jvp)(exact.random_vector(model, 6))
    assert model.training
    model.eval()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_only_trainable_parameters_count_with_an_adapter():
    """A LoRA adapter on a Llama, whose norms compute in fp32: the explicit matrix is as rough as that."""
    config = LlamaConfig(
        vocab_size=exact.VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted: Any = get_peft_model(LlamaForCausalLM(config).double(), lora).double().eval()
    assert {n.split(".")[-3] for n in trainable(adapted)} == {"lora_A", "lora_B"}
    v = exact.random_vector(adapted, 7)
    expected = exact.gauss_newton(adapted, BATCHES) @ exact.flat(adapted, v)
    for jvp, tolerance in zip(get_args(Jvp), (1e-5, 1e-5, 1e-5, 1e-3), strict=True):
        found = exact.flat(adapted, GaussNewton(adapted, BATCHES, jvp)(v))
        assert float((found - expected).norm() / expected.norm()) < tolerance


class _NoForward(torch.autograd.Function):
    """An operation as a fused kernel has it: with a backward pass, and no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def test_a_model_without_forward_mode_falls_back_to_differences(matrix):
    model = exact.opt()
    model.model.decoder.layers[0].fc2.register_forward_hook(lambda _m, _a, out: _NoForward.apply(out))
    v = exact.random_vector(model, 8)
    with pytest.warns(UserWarning, match="differences are used"):
        found = exact.flat(model, GaussNewton(model, BATCHES)(v))
    expected = matrix @ exact.flat(model, v)
    assert float((found - expected).norm() / expected.norm()) < 5e-4
    with pytest.raises(ValueError, match="double_backward or difference"):
        GaussNewton(model, BATCHES, "forward")(v)


def test_differences_are_good_enough_in_single_precision(matrix, model):
    """The step is chosen by how far logits move, so neither a huge nor a tiny vector is lost."""
    single = exact.opt().float()
    for size in (1e-6, 1.0, 1e6):
        v = {n: x.float() * size for n, x in exact.random_vector(single, 9).items()}
        found = exact.flat(single, GaussNewton(single, BATCHES, "difference")(v)).double()
        expected = matrix @ exact.flat(single, v).double()
        assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_the_loss_gradient_is_that_of_the_mean_over_all_tokens(model):
    loss = torch.cat([-forward_answers(model, b).token_logps() for b in BATCHES]).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    nll, gradient = loss_gradient(model, BATCHES)
    assert nll == pytest.approx(loss.item(), rel=1e-12)
    assert mean_nll(model, BATCHES) == pytest.approx(loss.item(), rel=1e-12)
    for (name, _), grad in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[name], grad, rtol=1e-11, atol=1e-14)


def test_a_curvature_pass_has_the_matrix_as_its_second_moment(model, matrix):
    """Averages of ``(g . v)^2`` along fixed directions, in standard errors."""
    count = sum(int(b["answer_mask"].sum()) for b in BATCHES)
    directions = [exact.random_vector(model, s) for s in (20, 21, 22)]
    draws = []
    for i in range(400):
        g = {}
        for j, batch in enumerate(BATCHES):
            curvature_pass(model, batch, 1 / count, add_to(g), seed=[0, i, j])
        draws.append([dot(g, v) ** 2 for v in directions])
    sample = torch.tensor(draws)
    expected = torch.tensor([float((x := exact.flat(model, v)) @ matrix @ x) for v in directions])
    errors = (sample.mean(0) - expected) / (sample.std(0) / len(sample) ** 0.5)
    assert errors.abs().max() < 4
    assert (sample.mean(0) / expected - 1).abs().max() < 0.25  # else the test could not fail


def test_backward_hands_over_gradients_and_keeps_none():
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.ones(2, 3)  # of somebody else, and not to be added to
    found = {}
    backward(layer(torch.ones(3)), torch.tensor([1.0, 2.0]), {"weight": layer.weight}, found.__setitem__)
    assert torch.equal(found["weight"], torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert layer.weight.grad is None
    assert layer.bias.grad is None  # not asked for


def test_half_precision_gradients_add_up_in_single():
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    found = {}
    backward(layer(torch.ones(4).bfloat16()).sum(), None, {"w": layer.weight}, found.__setitem__)
    assert found["w"].dtype == torch.float32


def test_wrong_input_is_refused(model):
    with pytest.raises(ValueError, match="jvp must be one of auto"):
        GaussNewton(model, BATCHES, "backward")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs answer tokens"):
        GaussNewton(model, [])


def test_vectors():
    a, b = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0])}, {"x": torch.tensor([4.0, 5.0])}
    assert dot(a, b) == 14
    assert norm(a) == pytest.approx(14**0.5)
    c = axpy_(copy(b), -2.0, a)
    assert torch.equal(c["x"], torch.tensor([2.0, 1.0]))
    assert torch.equal(c["y"], torch.tensor([-6.0]))  # what was missing was zero
    assert torch.equal(b["x"], torch.tensor([4.0, 5.0]))
