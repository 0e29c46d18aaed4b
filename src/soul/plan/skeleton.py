"""The model of a recipe as shapes without numbers: what is trained, what is multiplied, how large its parts are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from soul.adapters import add_adapter, check_adapter, check_kept
from soul.forward import decoder_blocks, head_of
from soul.models import freeze_embeddings
from soul.optim.groups import embedding_ids
from soul.pretrained import empty_model, load_config
from soul.recipe import Recipe

QUANTIZED = {"none": 0.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantized weight; NF4 keeps an fp32 scale for 64 of them (arXiv 2305.14314)."""


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """Sizes of a model as a recipe trains it.

    Attributes:
        model: The model on the meta device, with its adapter, and frozen as the recipe says.
        depth: Decoder blocks.
        total: Parameters.
        trainable: Those that are trained.
        weights: Bytes of parameters and buffers.
        gradients: Bytes of a gradient for each trainable parameter.
        body: Weights of linear layers but the head that are not trained.
        trained_body: Those that are.
        head: Weights of the head.
        trained_head: Whether it is trained.
        attention: Width of all attention heads together, summed over blocks.
        embeddings: Trainable weights of embeddings and head, each matrix once.
        largest_block: Parameters of the largest decoder block.
        rows: Width of the vocabulary.
        width: Width of the hidden states.
    """

    model: Any
    depth: int
    total: int
    trainable: int
    weights: int
    gradients: int
    body: int
    trained_body: int
    head: int
    trained_head: bool
    attention: int
    embeddings: int
    largest_block: int
    rows: int
    width: int

    @property
    def params(self) -> list[torch.Tensor]:
        """The trainable parameters, on the meta device."""
        return [p for p in self.model.parameters() if p.requires_grad]


def build(recipe: Recipe, depth: int | None = None) -> Any:
    """Return the recipe's model on the meta device, ready to train.

    Args:
        recipe: What is planned.
        depth: Keep so many decoder blocks only, and leave out what an objective freezes by block.

    Raises:
        ValueError: There is no configuration, or the adapter names modules that the model lacks or could not be loaded.
    """
    spec = recipe.model
    config = _config(spec.path, spec.revision, spec.trust_remote_code)
    if depth is not None:
        config = shallow(config, depth)
    model = empty_model(config, getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code)
    if recipe.adapter is not None:
        check_adapter(model, recipe.adapter)
        check_kept(spec, recipe.adapter)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers
            model = add_adapter(model, recipe.adapter)
    if recipe.training.frozen == "embeddings":
        freeze_embeddings(model)
    if depth is None:
        recipe.objective.prepare(model)
    for p in recipe.optimizer.left_alone(model):
        p.requires_grad_(False)
    return model.train()


@functools.lru_cache(maxsize=4)
def _config(path: str, revision: str, trust_remote_code: bool) -> Any:
    return load_config(path, revision, trust_remote_code=trust_remote_code)


def shallow(config: Any, depth: int) -> Any:
    """Return a copy of a configuration with ``depth`` decoder blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


def measure(recipe: Recipe) -> Skeleton:
    """Count what the recipe's model consists of.

    Raises:
        ValueError: As :func:`build`.
    """
    model = build(recipe)
    head = head_of(model)
    head_ids = {id(p) for p in head.parameters()}
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    params = list(model.parameters())
    blocks = decoder_blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)
    config = model.config.get_text_config()
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    embeddings = embedding_ids(model)
    return Skeleton(
        model=model,
        depth=len(blocks),
        total=numel(params),
        trainable=numel(p for p in params if p.requires_grad),
        weights=_bytes_of_weights(model, recipe, linear) + sum(b.numel() * b.itemsize for b in model.buffers()),
        gradients=sum(p.numel() * p.itemsize for p in params if p.requires_grad),
        body=sum(m.weight.numel() for m in linear if not m.weight.requires_grad),
        trained_body=sum(m.weight.numel() for m in linear if m.weight.requires_grad),
        head=sum(p.numel() for p in head.parameters() if p.ndim == 2),
        trained_head=any(p.requires_grad for p in head.parameters()),
        attention=heads * len(blocks),
        embeddings=numel(p for p in params if p.requires_grad and (id(p) in embeddings or id(p) in head_ids)),
        largest_block=max(numel(block.parameters()) for block in blocks),
        rows=config.vocab_size,
        width=config.hidden_size,
    )


def numel(params: Iterable[torch.Tensor]) -> int:
    """Return the coordinates of all tensors."""
    return sum(p.numel() for p in params)


def _bytes_of_weights(model: nn.Module, recipe: Recipe, linear: list[Any]) -> int:
    size = QUANTIZED[recipe.model.quantize]
    small = {id(m.weight) for m in linear if size and not m.weight.requires_grad}
    return int(sum(p.numel() * (size if id(p) in small else p.itemsize) for p in model.parameters()))
