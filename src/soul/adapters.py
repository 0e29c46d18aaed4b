"""LoRA adapters: what recipes set of them, and putting one on a model."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from soul.data import hub
from soul.models import ModelSpec, injected, locate
from soul.quantized import is_quantized, merge_dense


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

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"adapter.r and adapter.alpha must be 1 or more, not {self.r} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout must be in [0, 1), not {self.dropout}")


def check_adapter(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Make sure that the model has modules of the names the adapter asks for.

    Raises:
        ValueError: It has none.
    """
    names = [spec.target_modules] if isinstance(spec.target_modules, str) else spec.target_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    if names == ["all-linear"] or any(re.fullmatch(rf"(.*\.)?({name})", module) for name in names for module in linear):
        return
    raise ValueError(
        f"adapter.target_modules: the model has no {' or '.join(names)}; give all-linear, or some of "
        f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
    )


def check_kept(spec: ModelSpec, adapter: AdapterSpec) -> None:
    """Make sure that an adapter which is saved alone can be loaded again: below it must be whole weights.

    Raises:
        ValueError: Below it is another adapter.
    """
    if adapter.merge:
        return
    with hub.no_retries():
        where = locate(spec.path, spec.revision)
    if where.adapter is not None:
        raise ValueError(
            f"adapter.merge=false keeps an adapter alone, and {spec.path} is an adapter itself (on {where.base}), "
            "which nothing can be loaded on top of: set adapter.merge=true, or make whole weights of it first "
            "(of a run: `soul export RUN --out FOLDER`) and give that folder as the model"
        )


def add_adapter(model: PreTrainedModel, spec: AdapterSpec, seed: int = 0) -> Any:
    """Wrap the model in a LoRA adapter, whose start depends on ``seed`` alone.

    Raises:
        ValueError: transformers put another adapter on it, which peft would begin anew under its name.
    """
    from peft import LoraConfig, get_peft_model

    if injected(model):
        raise ValueError(
            "the model has an adapter that transformers put on it: load it with soul.load_model, which merges "
            "adapters, or merge it first"
        )
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's are transposed
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]  # peft's protocol is narrower
    if is_quantized(model):
        adapted.merge_and_unload = functools.partial(merge_dense, adapted)
    return adapted
