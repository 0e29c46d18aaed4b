"""What a forward pass keeps for the backward pass, found by running the model's own code on tensors without numbers."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from soul.forward import head_of
from soul.plan.skeleton import build
from soul.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps: ``constant + rows * per_row``.

    Attributes:
        constant: Whatever the batch: copies of the weights in the precision that is multiplied in.
        per_row: For each row of the batch, the log-probabilities at its answer positions included.
        estimated: The model's code could not be run without numbers, and a formula stands in.
    """

    constant: int
    per_row: int
    estimated: bool = False

    def of(self, rows: float) -> int:
        """Return the bytes of a batch beside the constant ones."""
        return int(self.per_row * rows)


def saved(recipe: Recipe, depth: int, width: int, answers: int, *, bf16: bool) -> Saved:
    """Return what a forward pass over rows of ``width`` tokens keeps.

    Blocks are alike and rows are, so models of one and of two blocks on batches of one and of two rows tell of all.
    With gradient checkpointing, of a block what enters it, and one block whole.

    Args:
        recipe: What is planned.
        depth: Decoder blocks of the model.
        width: Tokens in a row.
        answers: Those of them that the head is applied to.
        bf16: Matrices are multiplied in bf16 (autocast).
    """
    try:
        found = {}
        for blocks in (1, 2):
            model = build(recipe, blocks)
            for rows in (1, 2):
                found[blocks, rows] = _kept(model, rows, width, answers, bf16=bf16)
    except Exception:  # noqa: BLE001 - code that looks at numbers (experts, say) stops wherever it likes
        return _estimated(recipe, depth, width, answers, bf16=bf16)
    per_row = {n: found[n, 2] - found[n, 1] for n in (1, 2)}
    constant = {n: found[n, 1] - per_row[n] for n in (1, 2)}
    if recipe.model.quantize != "none":  # quantized weights are unpacked again in the backward pass
        constant = {1: constant[1], 2: constant[1]}
    if recipe.training.gradient_checkpointing:  # one block at a time, and what enters each
        hidden = build(recipe, 1).config.get_text_config().hidden_size
        size = 4 if recipe.model.dtype == "float32" else 2
        return Saved(max(0, constant[1]), per_row[1] + depth * width * hidden * size)
    more = depth - 1
    return Saved(
        max(0, constant[1] + more * (constant[2] - constant[1])), per_row[1] + more * (per_row[2] - per_row[1])
    )


def _kept(model: Any, rows: int, width: int, answers: int, *, bf16: bool) -> int:
    """Return the bytes that autograd keeps of one forward pass and its log-probabilities, parameters left out."""
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        seen[storage._cdata] = storage  # alive, so that no other takes its name
        return x

    with FakeTensorMode():
        fake = _on_cpu(model)
        own = {t.untyped_storage()._cdata for t in (*fake.parameters(), *fake.buffers())}
        hook = head_of(fake).register_forward_pre_hook(
            lambda _module, args: (args[0].reshape(-1, args[0].shape[-1])[: rows * answers],)
        )
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
                logits = fake(input_ids=torch.zeros(rows, width, dtype=torch.long), use_cache=False).logits
                targets = torch.zeros(len(logits), dtype=torch.long)
                nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        finally:
            hook.remove()
        return sum(storage.nbytes() for name, storage in seen.items() if name not in own)


def _on_cpu(model: Any) -> Any:
    """Return the model with stand-ins on the CPU for its tensors, in place; to be called within a fake mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
                    made[id(made[id(tensor)])] = made[id(tensor)]  # tied: met again under another name
                kind[name] = made[id(tensor)]
    return model


def _estimated(recipe: Recipe, depth: int, width: int, answers: int, *, bf16: bool) -> Saved:
    """Return what the linear layers' inputs, two norms and the attention of a block take, as a formula."""
    model = build(recipe, 1)
    size = 2 if bf16 or recipe.model.dtype == "bfloat16" else 4
    copies = bf16 and recipe.model.dtype == "float32" and recipe.model.quantize == "none"
    head: Any = head_of(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    config = model.config.get_text_config()
    per_token = sum(sum(m.weight.shape) for m in linear) * size + 4 * config.hidden_size * 4
    blocks, entering = (1, depth * config.hidden_size * 4) if recipe.training.gradient_checkpointing else (depth, 0)
    constant = 2 * (blocks * sum(m.weight.numel() for m in linear) + head.weight.numel()) if copies else 0
    tokens = width * (blocks * per_token + entering)
    return Saved(constant, tokens + answers * config.vocab_size * 4, estimated=True)
