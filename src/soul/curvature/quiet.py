"""Contexts in which a model in training runs without noise, or without autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from soul.forward import unwrap


@contextlib.contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Run a model in training mode with every dropout at zero, and leave no trace.

    Not ``eval()``, which would also switch gradient checkpointing off and so raise a pass's memory far above a
    training step's. Dropout modules get ``p = 0``; so does every float named after dropping or jitter that a module or
    its config holds, since many models read those (``attention_dropout``, ``layerdrop``, ``router_jitter_noise``) where
    they are in training mode. The global random state is put back, so a run does not depend on its passes' number.
    """
    inner = unwrap(model)
    modules = list(inner.modules())
    modes = [module.training for module in modules]
    holders = {id(h): h for m in modules for h in (m, getattr(m, "config", None)) if hasattr(h, "__dict__")}
    changed = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if (isinstance(value, float) and any(word in name for word in ("drop", "jitter")))
        or (isinstance(holder, _DropoutNd) and name == "p")
    ]
    devices = sorted({p.device.index for p in inner.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for holder, name, _ in changed:
                setattr(holder, name, 0.0)
            inner.train()
            yield
        finally:
            for holder, name, value in changed:
                setattr(holder, name, value)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Run a model without autocast, also where accelerate put one into its ``forward``."""
    inner = unwrap(model)
    original = vars(inner).get("_original_forward")
    wrapped = vars(inner).get("forward")
    device = next(inner.parameters()).device.type
    try:
        if original is not None:
            inner.forward = original
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if original is not None:
            del inner.forward
            if wrapped is not None:
                inner.forward = wrapped
