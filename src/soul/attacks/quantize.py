"""Quantization: a small change of the weights may round back to where they were."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from soul.attacks.base import Attack
from soul.data.batches import UnlearnDataset
from soul.registry import ATTACKS


@ATTACKS.register("quantize")
@dataclasses.dataclass(frozen=True)
class Quantize(Attack):
    """Round the weights of linear layers to so many bits, as deployment does (arXiv 2410.16454).

    Symmetric, to nearest, with a scale for each output row: ``W <- s round(W / s)``,
    ``s = max|W_row| / (2^(bits-1) - 1)``. The language-model head is left out, as usual, and so is a tied embedding.
    Arithmetic stays as it is: what is tested is what rounding does to the weights.

    Attributes:
        bits: Bits of a weight.

    Raises:
        ValueError: Fewer than 2 bits or more than 16.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"quantize.bits must be between 2 and 16, not {self.bits}")

    @torch.no_grad()
    def __call__(self, model: Any, data: UnlearnDataset) -> Any:
        """Return the model with its linear layers rounded in place."""
        del data
        head = model.get_output_embeddings()
        most = 2 ** (self.bits - 1) - 1
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # GPT-2's is transposed
                scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
                weight.copy_((weight / scale).round() * scale)
        return model
