"""Whether a model's files are whole, before a library that trusts them reads them.

Looked at are the forms: JSON that is JSON, safetensors and GGUF files as long as their headers say, weights that are no
pickles, and sizes in a configuration that such weights can have. A changed weight is no fault of form: it is not found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from soul.strict import json_value, read_text

JSON_BYTES = 256 << 20
"""Longest JSON file of a model that is read; vocabularies take tens of megabytes."""
LAYERS, WIDTH = 10_000, 1 << 24
"""Most layers, and largest size of any kind, of a model that is planned for without its weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_DEPTHS = re.compile(r"(num_hidden_layers|n_layers?|num_layers|num_(local_)?experts|n_routed_experts)")
_WIDTHS = re.compile(
    r"((hidden|vocab|intermediate|moe_intermediate|ffn|inner|embedding|word_embed_proj)_(size|dim)|n_embd|n_inner|d_model"
    r"|num_attention_heads|num_key_value_heads|n_head|head_dim|n_positions)"
)


class BrokenModelError(ValueError):
    """A model's file is cut short, altered, missing, a pickle or not what was asked for; says which, and what to do."""


def json_object(file: Path) -> dict[str, Any]:
    """Return the object in one of a model's JSON files.

    Raises:
        ValueError: It is missing, too long, or holds no JSON object.
    """
    if not file.exists():
        raise BrokenModelError(f"there is no {file.name} in {file.parent}: is it a model's folder, and whole?")
    try:
        value = json_value(read_text(file, JSON_BYTES), str(file), lenient=True)
    except ValueError as error:
        raise BrokenModelError(f"{error}; copy it again") from error
    if not isinstance(value, dict):
        raise BrokenModelError(f"{file} must hold an object {{...}}, not {type(value).__name__}")
    return value


def check_model(folder: Path) -> None:
    """Make sure that a folder holds a whole model, as far as its files' forms tell.

    Raises:
        ValueError: One of them is cut short, altered, missing or a pickle.
    """
    config = json_object(folder / "config.json")
    elements = tensors = 0
    for file in _weights(folder):
        for shape in shapes(file).values():
            tensors += 1
            elements += _product(shape)
    check_sizes(config, f"{folder / 'config.json'}", tensors, elements)
    check_tokenizer(folder)


def check_adapter_files(folder: Path) -> tuple[str, str]:
    """Make sure that a folder holds a whole adapter, and return the base that it names, and the base's revision.

    Raises:
        ValueError: As :func:`check_model`, or no base is named.
    """
    file = folder / "adapter_config.json"
    described = json_object(file)
    base, revision = (described.get(name) for name in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        raise BrokenModelError(f"{file} names no base_model_name_or_path: write there what the adapter belongs to")
    if not (folder / "adapter_model.safetensors").is_file():
        _refuse_pickles(folder)
        raise BrokenModelError(f"{folder} holds adapter_config.json and no adapter_model.safetensors; copy all of it")
    shapes(folder / "adapter_model.safetensors")
    return base, revision if isinstance(revision, str) else ""  # which peft leaves at null


def check_tokenizer(folder: Path) -> None:
    """Make sure that the JSON files beside a model are JSON objects; which of them there are is the library's care."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (folder / name).is_file():
            json_object(folder / name)


def check_sizes(config: Mapping[str, Any], where: str, tensors: int = LAYERS, elements: int = WIDTH) -> None:
    """Make sure that a configuration's sizes can be those of so many weights: building what it says could take days.

    Args:
        config: The configuration; one of its text part is looked at too.
        where: The file, for messages.
        tensors: Most layers or experts: each has a tensor at least.
        elements: Largest size of any other kind.

    Raises:
        ValueError: A size is below zero, or larger than there are weights for.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            check_sizes(value, where, tensors, elements)
        deep, wide = _DEPTHS.fullmatch(str(key)), _WIDTHS.fullmatch(str(key))
        most = tensors if deep else elements
        if (deep or wide) and isinstance(value, int) and not 0 <= value <= most:  # other types are the library's affair
            raise BrokenModelError(
                f"{where}: {key} is {value!r:.40}; with such weights it is from 0 to {most:,}: copy it again"
            )


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors, from its header.

    Raises:
        ValueError: It is no safetensors file, or not as long as its header says.
    """
    try:
        with safe_open(file, "numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "not there"
        reason = " ".join(str(error).split())
        raise BrokenModelError(
            f"{file} ({size}) is cut short, altered or no safetensors file ({reason:.200}); copy it again"
        ) from error


def _weights(folder: Path) -> list[Path]:
    """Return the files that transformers would load."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json_object(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise BrokenModelError(f"{index} has no weight_map from weights to files; copy it again")
        files = sorted(set(names.values()))
        for name in files:
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                raise BrokenModelError(f"{index} names {name!r:.80}: a file of weights must be in the same folder")
            if not (folder / name).is_file():
                raise BrokenModelError(f"{index} names {name!r:.80}, which is not there; copy the whole folder")
        return [folder / name for name in files]
    _refuse_pickles(folder)
    raise BrokenModelError(f"{folder} holds config.json and no model.safetensors; copy the whole folder")


def _refuse_pickles(folder: Path) -> None:
    found = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if found:
        raise BrokenModelError(
            f"{folder} holds its weights as pickles ({', '.join(found)[:100]}), which can run anything when they are "
            "read and are never loaded: where you trust them, save them as safetensors (model.save_pretrained(folder))"
        )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
