"""Quantization: a small change of the weights may round back to where they were."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from soul.attacks.base import Attack
from soul.data.batches import UnlearnDataset
from soul.registry import ATTACKS

_ROUTER = re.compile(r"(.*\.)?(router(\.\w+)?|gate|shared_expert_gate)")


@ATTACKS.register("quantize")
@dataclasses.dataclass(frozen=True)
class Quantize(Attack):
    """Round the weights of linear layers and of experts to so many bits, as deployment does (arXiv 2410.16454).

    Symmetric, to nearest: ``W <- s round(W / s)``, ``s = max|W_group| / (2^(bits-1) - 1)``, a group being ``group``
    weights in a row of one output, of each expert where there are several. The language-model head is left out, as
    usual, and so are a tied embedding and what routes to experts (as llama.cpp leaves it). Arithmetic stays as it is:
    what is tested is what rounding does to the weights.

    8 bits are the mild case. The paper's recovery, of 83 % of what was to be forgotten on average after 21 % in full
    precision, is at 4 bits, in bitsandbytes' blocks of 64 weights. (Its 4-bit numbers, FP4 and NF4, are spaced
    unevenly; these here are not.) With one scale for a whole row, 4 bits nearly double the perplexity of
    SmolLM2-135M, whatever was unlearned (74 to 140 on eight held-out passages, in groups of 64 to 102; by hand).

    Attributes:
        bits: Bits of a weight.
        group: Weights that share a scale, the last of a row being fewer where it does not divide; 0 for the whole row.
            By default 64 below 8 bits, as 4-bit formats have it, and the row from 8 bits on.

    Raises:
        ValueError: Fewer than 2 bits or more than 16, or a negative group; or, when called, experts that are stored in
            an unknown way.
    """

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"quantize.bits must be between 2 and 16, not {self.bits}")
        if self.group is not None and self.group < 0:
            raise ValueError(f"quantize.group must be 0 (a whole row) or more, not {self.group}")

    @torch.no_grad()
    def __call__(self, model: Any, data: UnlearnDataset) -> Any:
        """Return the model with its linear layers and experts rounded in place."""
        del data
        head = model.get_output_embeddings()
        most = 2 ** (self.bits - 1) - 1
        group = self.group if self.group is not None else (64 if self.bits < 8 else 0)
        for name, module in model.named_modules():
            if module is head or _ROUTER.fullmatch(name):
                continue
            for matrix in _matrices(module):
                for weight in matrix.split(group or matrix.shape[-1], dim=-1):
                    scale = weight.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
                    weight.copy_((weight / scale).round() * scale)
        return model


def _matrices(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights that a module multiplies by, as views of shape ``(..., out, in)``.

    In transformers the experts of a layer are stacked in modules named so, ``(expert, out, in)``, or
    ``(expert, in, out)`` where ``is_transposed`` says so (and in Llama 4, which does not say).
    """
    kind = type(module).__name__
    if isinstance(module, Conv1D):  # GPT-2's is transposed
        yield module.weight.T
    elif isinstance(module, nn.Linear):
        yield module.weight
    elif "Expert" in kind:
        transposed = getattr(module, "is_transposed", kind.startswith("Llama4"))
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and weight.is_floating_point():  # integers are rounded already
                yield weight.mT if transposed else weight
            elif weight.ndim == 2 and "bias" not in name:  # DBRX: experts one below the other, some transposed
                raise ValueError(f"quantize cannot tell the rows of {kind}.{name}: leave this attack out")
