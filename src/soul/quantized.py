"""A base model kept in 4 or 8 bits under an adapter, and how the two become plain weights again."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Quantized = Literal["none", "int8", "nf4"]


def quantization_config(kind: Quantized, dtype: torch.dtype) -> Any:
    """Return what ``from_pretrained`` takes for LLM.int8 (arXiv 2208.07339) or NF4 (arXiv 2305.14314).

    The scales of NF4 are not quantized a second time.

    Args:
        kind: ``int8`` or ``nf4``.
        dtype: What NF4 weights are multiplied in; LLM.int8 has its own precision.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    check_library(kind)
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_library(kind: Quantized) -> None:
    """Make sure that what quantizes is installed.

    Raises:
        ValueError: It is not.
    """
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantize={kind} needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or set model.quantize=none"
        )


def keep_gradients(model: nn.Module) -> None:
    """Keep NF4 layers from the CPU kernel that has no backward pass.

    On CPUs that multiply bf16, bitsandbytes (0.50) repacks the weights for that kernel at the first evaluation, and
    uses it in training from then on: what lies below gets no right gradient, and products are rounded to bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute of its layers


def is_quantized(model: Any) -> bool:
    """Say whether a model holds quantized weights."""
    return bool(getattr(model, "is_quantized", False))


@torch.no_grad()
def merge_dense(model: Any) -> Any:
    """Return the base with its weights as plain ones and the adapter added: ``W = dequantize(W_q) + alpha/r B A``.

    Merged into quantized weights, a small update would be rounded to their grid, and with it what was unlearned (arXiv
    2410.16454). ``config.dequantized_from`` says what the weights were, so that loading never quantizes them again.

    Args:
        model: A PEFT model with LoRA on a quantized base.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    inner = model.get_base_model()
    kind = "nf4" if getattr(inner, "is_loaded_in_4bit", False) else "int8"
    adapted: dict[str, Any] = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    for name, module in list(inner.named_modules()):
        inside = any(name.startswith(f"{outer}.") for outer in adapted)
        if inside or not (name in adapted or _holds_integers(module)):
            continue
        base: Any = module.base_layer if name in adapted else module
        weight = dequantize_module_weight(base) if _holds_integers(base) else base.weight
        weight = weight.detach().to(inner.dtype, copy=True)
        for adapter in adapted[name].active_adapters if name in adapted else ():
            weight += adapted[name].get_delta_weight(adapter).to(weight.dtype)
        inner.set_submodule(name, _plain(base, weight))
    flags = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
    for name in (*flags, "peft_config"):
        if hasattr(inner, name):
            delattr(inner, name)
    if hasattr(inner.config, "quantization_config"):
        del inner.config.quantization_config
    inner.config.dequantized_from = kind
    return inner


def _holds_integers(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not weight.is_floating_point()


def _plain(base: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Return an ordinary layer with ``weight`` and the bias of ``base``."""
    made: Any = Conv1D(weight.shape[1], weight.shape[0]) if isinstance(base, Conv1D) else nn.Linear(1, 1)
    bias = base._parameters.get("bias")
    made.weight = nn.Parameter(weight)
    made.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype))
    if isinstance(made, nn.Linear):
        made.out_features, made.in_features = weight.shape
    return made
