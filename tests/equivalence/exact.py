"""Transformers of a thousand parameters in float64, and their curvature as an explicit matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import OPTConfig, OPTForCausalLM

from soul.curvature.vectors import Vector
from soul.data.batches import Batch, collate_rows
from soul.data.templates import Encoded
from soul.forward import forward_answers

VOCABULARY = 11


def opt(seed: int = 0, *, bias: bool = True, layers: int = 2, spread: float = 0.4) -> Any:
    """Return a model whose every operation is in float64 (Llama's norms are not), with a head tied to its embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=12,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=32,
            init_std=spread,
            dropout=0.0,
            activation_function="gelu",
            enable_bias=bias,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=1,
        )
        return OPTForCausalLM(config).double().eval()


def rows(seed: int, count: int, longest: int = 8) -> list[Encoded]:
    """Return random token rows of unequal length, each with two answer tokens or more."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(5, longest + 1, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length - 1, (), generator=generator))
        found.append(Encoded(tuple(ids), start, i))
    return found


def batches(seed: int, count: int, size: int = 2) -> list[Batch]:
    """Return micro-batches of ``size`` random rows."""
    many = rows(seed, count)
    return [collate_rows(many[i : i + size]) for i in range(0, count, size)]


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(model: torch.nn.Module, v: Vector) -> torch.Tensor:
    """Return ``v`` as one vector in the order of the trainable parameters; what is missing is 0."""
    return torch.cat([v.get(n, torch.zeros_like(p)).detach().flatten() for n, p in trainable(model).items()])


def unflat(model: torch.nn.Module, x: torch.Tensor) -> Vector:
    """Undo :func:`flat`."""
    params = trainable(model)
    parts = x.split([p.numel() for p in params.values()])
    return {n: part.view_as(p).clone() for (n, p), part in zip(params.items(), parts, strict=True)}


def random_vector(model: torch.nn.Module, seed: int) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trainable(model).items()}


def gauss_newton(model: torch.nn.Module, many: list[Batch]) -> torch.Tensor:
    """Return ``sum_i 1/N J_i^T (diag p_i - p_i p_i^T) J_i`` from explicit Jacobians."""
    params = list(trainable(model).values())
    count = sum(int(b["answer_mask"].sum()) for b in many)
    total = torch.zeros(())
    for batch in many:
        with sdpa_kernel(SDPBackend.MATH):
            logits = forward_answers(model, batch).logits_NV
        grads = torch.autograd.grad(
            logits,
            params,
            torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape),
            is_grads_batched=True,
            materialize_grads=True,
        )
        jacobian = torch.cat([g.flatten(1) for g in grads], dim=1).view(*logits.shape, -1).double()
        for p, rows in zip(logits.detach().double().softmax(-1), jacobian, strict=True):
            total = total + rows.T @ (torch.diag(p) - torch.outer(p, p)) @ rows / count
    return total
