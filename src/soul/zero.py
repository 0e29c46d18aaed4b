"""DeepSpeed's ZeRO: an update rule on the flat parts that its engine makes of gradients and states.

With ZeRO 1 and 2 every process has all weights, and of each parameter group one part of a flat fp32 copy: what the rule
steps, group by group, inside ``engine.backward``. So the rule must treat each coordinate alike whatever tensor it is
of. Curvature passes run on the model inside the engine, whose hooks would take their gradients for those of the loss;
the estimate is added up over processes and cut into the same parts. With ZeRO 3 weights are parts too, gathered where
they are used; no curvature passes are made there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from soul.curvature.estimators import ESTIMATORS
from soul.optim._shards import mark_part
from soul.optim.base import OptimizerSpec


def asked() -> bool:
    """Say whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")


def plugin_on_cpus(precision: str) -> Any:
    """Return the plugin that accelerate makes of the launcher's environment, which it leaves out on CPUs."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(precision)
    plugin.select(_from_accelerator_state=True)
    return plugin


def shards_weights(trainer: Any) -> bool:
    """Say whether a process has parts of the weights too (ZeRO-3)."""
    return trainer.is_deepspeed_enabled and int(trainer.accelerator.state.deepspeed_plugin.zero_stage) == 3


def whole(p: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter put together from its parts; every process calls this for the same ones in order."""
    deepspeed: Any = importlib.import_module("deepspeed")  # optional, and there where this is called
    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def keep_weights_wide(plugin: Any) -> None:
    """Leave weights in their own precision, as everywhere else here: bf16 is what autocast multiplies in."""
    section = plugin.deepspeed_config.get("bf16")
    if section:
        section["enabled"] = False


def check(trainer: Any, rule: OptimizerSpec) -> None:
    """Make sure that a run can do what it is to do under DeepSpeed's configuration.

    Args:
        trainer: The trainer, set up by accelerate.
        rule: The update rule's hyper-parameters.

    Raises:
        ValueError: It cannot.
    """
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    config: Mapping[str, Any] = plugin.deepspeed_config
    stage = int(plugin.zero_stage)
    if stage == 3 and trainer.curvature is not None:
        raise ValueError(
            f"{rule.name} needs curvature passes, which have no seam in ZeRO-3: set zero_stage to 2, or shard weights "
            "with FSDP2 (examples/accelerate/fsdp2.yaml)"
        )
    if stage not in (1, 2, 3):
        raise ValueError(
            f"zero_stage must be 1, 2 or 3, not {stage}: without it use DDP (examples/accelerate/ddp.yaml)"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"DeepSpeed's configuration has a section {section!r}, and the recipe says what that is: leave it out"
            )
    offload = (config["zero_optimization"].get("offload_optimizer") or {}).get("device") or "none"
    if offload != "none":
        raise ValueError(f"offload_optimizer_device {offload} has not been tried: set it to none")
    if trainer.accelerator.mixed_precision == "fp16":
        raise ValueError("DeepSpeed's fp16 scales the loss, which nothing here expects: use training.precision")
    if rule.needs_whole or getattr(rule, "clip", "element") != "element":
        raise ValueError(
            f"{rule.name} looks at whole tensors here, which ZeRO lays end to end and cuts into parts: choose an "
            "optimizer that goes coordinate by coordinate (sophia with clip: element, adamw), or use DDP"
        )
    if trainer.curvature is not None and ESTIMATORS[trainer.curvature.estimator].cotangent is None:
        fit = ", ".join(name for name, kind in ESTIMATORS.items() if kind.cotangent)
        raise ValueError(
            f"curvature.estimator {trainer.curvature.estimator} works with the parameters' gradients, which are "
            f"DeepSpeed's: choose one of {fit}, or use DDP"
        )
    for name, bound in (("training.trust_kl", trainer.trust), ("stop.when", trainer.stopping)):
        if bound is not None:
            raise ValueError(f"{name} scales weights after a step, of which DeepSpeed's engine has copies: use DDP")
    if trainer.training_spec.combine != "sum" or trainer.training_spec.compile:
        raise ValueError("under DeepSpeed training.combine is sum and training.compile is false, or use DDP")
    if trainer.training_spec.save_steps:
        raise ValueError("under DeepSpeed no checkpoints are written: set training.save_steps to 0, or use DDP")


class PartitionedRule:
    """An update rule on flat parts, spoken to in terms of the model's parameters.

    What it is not asked differently is the rule's own. It reports no numbers about steps: the engine makes one for each
    parameter group, and a rule knows its last.

    Args:
        rule: The rule inside DeepSpeed's optimizer.
    """

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    @torch.no_grad()
    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Hand the rule this process's parts of an estimate for each of the model's parameters."""
        assert estimate is not None, "gradients are the engine's: passes bring an estimate of their own"
        flats: list[torch.Tensor] = [group["params"][0] for group in self.rule.param_groups]
        parts = [torch.zeros_like(flat) for flat in flats]
        for p, value in estimate.items():
            found: Any = getattr(p, "_hp_mapping", None)
            if found is None:  # all of it is another process's
                continue
            here, there = found.lp_fragment_address, found.hp_fragment_address
            piece = value.reshape(-1).narrow(0, here.start, here.numel)
            parts[found.param_group_index].narrow(0, there.start, there.numel).copy_(piece)
        self.rule.update_curvature(dict(zip(flats, parts, strict=True)))


def partitioned(outer: Any) -> PartitionedRule | None:
    """Return the rule inside DeepSpeed's optimizer, its parts marked as such; None if ``outer`` is something else.

    Args:
        outer: What accelerate's wrapper holds.
    """
    if not type(outer).__module__.startswith("deepspeed."):
        return None
    rule, groups = outer.optimizer, getattr(outer, "bit16_groups", None)
    if groups is None:  # ZeRO-3, which hands the rule its parts at each step
        return PartitionedRule(rule)
    for i, (group, members) in enumerate(zip(rule.param_groups, groups, strict=True)):
        (flat,) = group["params"]
        mark_part(flat, outer.real_dp_process_group[i], sum(p.numel() for p in members))
    return PartitionedRule(rule)
