"""Parameter groups of a language model: what decays, and what is an embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def embedding_ids(model: nn.Module | None) -> set[int]:
    """Return the ``id`` of every parameter that has a row for each token: embeddings and the language-model head.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
        >>> [name for name, p in model.named_parameters() if id(p) in embedding_ids(model)]
        ['0.weight']
    """
    if model is None:
        return set()
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [head] if isinstance(head, nn.Module) else []
    return {id(p) for module in modules for p in module.parameters(recurse=False)}


def parameter_groups(model: nn.Module, weight_decay: float, decayed: Iterable[str]) -> list[dict[str, Any]]:
    """Return torch's parameter groups over the trainable parameters of ``model``, none of them empty.

    Embeddings and head are in groups of their own, marked ``embedding``: most of their rows belong to tokens that no
    batch holds, so the mean curvature that damps them is another, and their win rate says little about the rest.

    Args:
        model: The model.
        weight_decay: Decoupled weight decay of the ``decayed``; the others have none.
        decayed: Names of the parameters to decay.

    Raises:
        ValueError: Nothing is trainable.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
        >>> groups = parameter_groups(model, 0.1, ["0.weight", "1.weight"])
        >>> [(len(g["params"]), g["weight_decay"], g["embedding"]) for g in groups]
        [(1, 0.1, False), (1, 0.1, True), (1, 0.0, False)]
    """
    names, marked = set(decayed), embedding_ids(model)
    members: dict[tuple[bool, bool], list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members.setdefault((name in names, id(p) in marked), []).append(p)
    if not members:
        raise ValueError("the model has no trainable parameters")
    order = [(True, False), (True, True), (False, False), (False, True)]
    return [
        {"params": members[key], "weight_decay": weight_decay if key[0] else 0.0, "embedding": key[1]}
        for key in order
        if key in members
    ]
