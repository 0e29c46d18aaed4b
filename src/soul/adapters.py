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
        target_modules: Modules that get one; all linear layers by default. A list of names (or text of one, or of
            several with commas), each of which must be there, or a regular expression of whole names, as peft does it.
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

    def targets(self) -> str | list[str]:
        """Return ``target_modules`` as peft takes it: a list of names, or text that is a regular expression.

        Example:
            >>> AdapterSpec(target_modules="q_proj, v_proj").targets(), AdapterSpec(target_modules=".*_proj").targets()
            (['q_proj', 'v_proj'], '.*_proj')
        """
        given = self.target_modules
        if isinstance(given, str) and re.fullmatch(r"[\w.,\s]+", given):
            return [name.strip() for name in given.split(",") if name.strip()]
        return "all-linear" if given == ["all-linear"] else given


def check_adapter(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Make sure that the model has modules of the names the adapter asks for.

    Raises:
        ValueError: One of the names is of none, or is no regular expression.
    """
    targets = spec.targets()
    if targets == "all-linear":
        return
    there = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    if isinstance(targets, str):
        try:
            absent = [targets] if targets and not any(re.fullmatch(targets, module) for module in there) else []
        except re.error as error:
            raise ValueError(
                f"adapter.target_modules: {targets!r} is no regular expression ({error}); give names of modules, or "
                "such as .*_proj"
            ) from error
    else:
        absent = [name for name in targets if not any(f".{module}".endswith(f".{name}") for module in there)]
    if absent or not targets:
        said = f"the model has no {' or '.join(absent)}" if absent else "no name is given"
        raise ValueError(
            f"adapter.target_modules: {said}; give all-linear, or some of "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in there}))}"
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
        target_modules=spec.targets(),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's are transposed
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]  # peft's protocol is narrower
    if is_quantized(model):
        adapted.merge_and_unload = functools.partial(merge_dense, adapted)
    return adapted
