"""Warm starts on disk: what the passes before the first step found, by model content, data and estimator."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from soul.machine import cache_dir
from soul.stored import StorageError, part_of, publish, remove_parts

log = logging.getLogger(__name__)

FORMAT = 2
_DAY = 24 * 3600
KEEP_BYTES = 16 * 2**30
"""The cache's least recently used files go where all take more than this."""


def fingerprint(model: nn.Module) -> str:
    """Return a name of a model's content: its config, the bytes of its weights and buffers, and the scales of adapters.

    A LoRA's ``alpha / r`` is a number that its layers keep beside their weights, and in no model's config.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    with concurrent.futures.ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing frees the lock
        digests = list(pool.map(_digest, (tensor for _, tensor in named)))
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if config is not None else {}
    described.pop("_name_or_path", None)  # where it came from, not what it is
    whole = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16)
    for (name, tensor), digest in zip(named, digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.requires_grad} {digest}\n".encode())
    for name, module in model.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping):  # by adapter; attention has a number of that name, which its config gives
            whole.update(f"{name} {sorted((str(k), float(v)) for k, v in scaling.items())}\n".encode())
    return whole.hexdigest()


def path(model: nn.Module, description: Mapping[str, Any]) -> Path:
    """Return the file for ``model`` and whatever else an estimate depends on, versions and threads included."""
    device = next(model.parameters()).device
    key = {
        "format": FORMAT,
        "model": fingerprint(model),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", ""),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        **description,
    }
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_dir() / "curvature" / f"{name}.safetensors"


def beside(file: Path, what: str) -> Path:
    """Return the file for what is derived from ``file``'s content under the settings that ``what`` names."""
    return file.with_name(f"{file.stem}-{hashlib.blake2b(what.encode(), digest_size=8).hexdigest()}.safetensors")


def read(file: Path, device: torch.device) -> dict[str, torch.Tensor] | None:
    """Return what ``file`` holds, or None where there is no such file or it cannot be read."""
    if not file.is_file():
        return None
    try:
        found = load_file(file, device=str(device))
        os.utime(file)  # used last now
    except (OSError, SafetensorError) as error:
        log.warning("cannot read the cached curvature %s (%s): it is estimated again", file.name, error)
        return None
    return found


def write(file: Path, state: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write ``state``, whole or not at all; a full disk costs the cache and not the run."""
    part = part_of(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
        # one entry: safetensors writes several in any order
        save_file(tensors, part, metadata={"soul": json.dumps(description, sort_keys=True)})
        publish(part, file)
        _prune(file)
    except (OSError, StorageError, SafetensorError) as error:
        log.warning("cannot keep the curvature for the next run: %s", error)
        with contextlib.suppress(OSError):
            part.unlink()


def _prune(newest: Path) -> None:
    """Remove the least recently used files while all take too much room; not what the newest is derived from.

    Of a model of 1B factors and inverses take more than :data:`KEEP_BYTES`: each would put the other out.
    """
    needed = {newest, newest.with_name(f"{newest.stem.partition('-')[0]}.safetensors")}
    files = sorted(newest.parent.glob("*.safetensors"), key=lambda f: (f not in needed, -f.stat().st_mtime))
    taken = 0
    for file in files:
        taken += file.stat().st_size
        if taken > KEEP_BYTES and file not in needed:
            file.unlink(missing_ok=True)
    remove_parts(newest.parent, older=_DAY)  # of processes that were killed


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=16).hexdigest()
