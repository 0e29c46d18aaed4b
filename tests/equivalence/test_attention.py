"""Gradients of attention over short sequences, against the fused pass in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as fused

import soul
from soul.attention import LONGEST, ShortAttention

MASKS = ("none", "causal", "bool", "float", "blind")


def tensors(length=17, heads=6, shared=6, kind=torch.bfloat16, keys=None) -> Any:
    torch.manual_seed(0)
    shapes = [(2, heads, length, 8), *[(2, shared, keys or length, 8)] * 2]
    return [torch.randn(shape).to(kind).requires_grad_() for shape in shapes]


def options(mask: str, length: int = 17, keys: int | None = None, **more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    seen = (torch.rand(2, 1, length, keys or length) > 0.3) | torch.eye(length, keys or length, dtype=torch.bool)
    if mask == "blind":  # a padded query that attends to nothing
        seen[:, :, 3] = False
    low = torch.finfo(torch.bfloat16).min
    found: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "float": {"attn_mask": torch.zeros(seen.shape).masked_fill(~seen, low).to(torch.bfloat16)},
    }
    return {**found.get(mask, {"attn_mask": seen}), **more}


def in_float64(inputs: Any, out_grad: torch.Tensor, more: dict[str, Any]) -> Any:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    mask = more.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        more = more | {"attn_mask": mask.double()}
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.grad(fused(*wide, **more), wide, out_grad.double())


def gap(found, true):
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize(("mask", "shared"), [*itertools.product(MASKS, (6, 2, 1))])
def test_gradients_are_as_close_to_the_truth_as_the_fused_ones(mask, shared):
    inputs, more = tensors(shared=shared), options(mask, enable_gqa=shared != 6)
    grad = torch.randn(2, 6, 17, 8).to(torch.bfloat16)
    true = in_float64(inputs, grad, more)
    theirs = torch.autograd.grad(fused(*inputs, **more), inputs, grad)
    with ShortAttention():
        out = fused(*inputs, **more)
        ours = torch.autograd.grad(out, inputs, grad)
    assert torch.equal(out, fused(*inputs, **more))  # the forward pass is the fused one
    assert [x.dtype for x in ours] == [torch.bfloat16] * 3
    assert gap(ours, true) < 3e-3  # what rounding the result leaves
    assert gap(ours, true) <= gap(theirs, true)


def test_other_numbers_of_keys_and_a_scale():
    inputs, more = tensors(keys=11), options("bool", keys=11, scale=0.3)
    grad = torch.randn(2, 6, 17, 8).to(torch.bfloat16)
    with ShortAttention():
        ours = torch.autograd.grad(fused(*inputs, **more), inputs, grad)
    assert gap(ours, in_float64(inputs, grad, more)) < 3e-3


def test_gradients_can_be_differentiated_again():
    inputs = tensors()
    grad, direction = (torch.randn(2, 6, 17, 8).to(torch.bfloat16) for _ in range(2))

    def twice(of: Any, out_grad: torch.Tensor, along: torch.Tensor) -> Any:
        first = torch.autograd.grad(fused(*of), of, out_grad, create_graph=True)
        return torch.autograd.grad((first[0] * along).sum(), of[:2])

    with ShortAttention():
        ours = twice(inputs, grad, direction)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        true = twice(wide, grad.double(), direction.double())
    assert gap(ours, true) < 1e-2


def test_nan_is_not_hidden():
    query, key, value = tensors()
    with torch.no_grad():
        query[0, 0, 2, 0] = torch.nan
    with ShortAttention():
        found = torch.autograd.grad(fused(query, key, value, **options("bool")).sum(), (query, key, value))
    assert all(bool(g.isnan().any()) for g in found)


def names(out):
    """Name the functions of a graph."""
    found, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        found.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent]
    return found


def test_it_is_taken_where_it_pays_and_nowhere_else():
    def taken(inputs: Any = None, **more: Any) -> bool:
        with ShortAttention():
            out = fused(*(inputs or tensors()), **more)
        return any("short_attention" in name for name in names(out))

    assert taken()
    assert taken(tensors(length=LONGEST))
    assert not taken(tensors(length=LONGEST + 1))
    assert not taken(tensors(kind=torch.float32))
    assert not taken(dropout_p=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(tensors(kind=torch.float32))
    with sdpa_kernel(SDPBackend.MATH):  # as passes do that differentiate twice
        assert not taken()
    outside = fused(*tensors())
    assert not any("short_attention" in name for name in names(outside))


def test_a_training_step_goes_through_it(tokenizer, make_model, forget_set, retain_set):
    sets = {"forget": forget_set, "retain": retain_set, "optimizer": "adamw"}
    training = {"max_steps": 1, "precision": "bfloat16"}

    def calls(model: Any, **more: Any) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            soul.unlearn(model, tokenizer, **sets, training=training | more)
        return sum(event.name == "soul::short_attention_gradients" for event in seen.events() or ())

    model = make_model()
    assert calls(model) == model.config.num_hidden_layers
    assert calls(make_model(), gradient_checkpointing=True) == 0
