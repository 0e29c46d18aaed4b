"""How a model is spread over processes at the trainer's seam, and whole again: DDP, FSDP2 and ZeRO, by accelerate."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from soul import zero
from soul.curvature import sharded
from soul.forward import unwrap, wide
from soul.optim.base import OptimizerSpec, UpdateRule
from soul.quantized import is_quantized


class ParallelTrainer(Trainer):
    """A ``transformers.Trainer`` whose checkpoints are the same files however many processes it runs in.

    Weights and optimizer states that are shards are put together in the memory of the main process when they are
    written, one tensor after another, and every process takes its shards out of whole files when they are read. So what
    one kind of run wrote any other can continue.
    """

    _skeleton: nn.Module | None = None

    @property
    def shards(self) -> bool:
        """Whether weights, gradients and states are spread over the processes (FSDP2)."""
        return bool(self.is_fsdp_enabled)

    @property
    def update_rule(self) -> UpdateRule:
        """The update rule inside the wrappers of accelerate and DeepSpeed."""
        inside: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        parts: Any = zero.partitioned(inside)
        return parts or inside

    def create_accelerator_and_postprocess(self) -> None:
        """Set accelerate up; where it is told to shard (FSDP2, ZeRO), it does so on CPUs too."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        on_cpus = state.distributed_type == DistributedType.MULTI_CPU
        if on_cpus and _asked_to_shard():
            state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment says
            _become(state, DistributedType.FSDP)
            self.is_fsdp_enabled = True
        if on_cpus and zero.asked():
            state.deepspeed_plugins = zero.plugin_on_cpus(str(self.accelerator.mixed_precision))
            _become(state, DistributedType.DEEPSPEED)
            self.is_deepspeed_enabled = True
            propagate_args_to_deepspeed(self.accelerator, self.args)
        if self.is_deepspeed_enabled:
            zero.keep_weights_wide(state.deepspeed_plugin)
        if self.is_fsdp_enabled:
            state.fsdp_plugin.mixed_precision_policy = _policy(self.accelerator.mixed_precision)
            # gradients put off to a window's last micro-batch would be whole until then, in every process
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Return autocast where the model is sharded, which accelerate then does not put into ``model.forward``."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast() if self.shards else super().autocast_smart_context_manager(cache_enabled)

    @property
    def numerics(self) -> str:
        """Name the precision that is multiplied in: ``no`` for that of the weights."""
        return "bf16" if self.is_deepspeed_enabled and self.args.bf16 else str(self.accelerator.mixed_precision)

    def own_batches(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return a loader that accelerate moves to the device, and does not divide: its batches are this process's."""
        device = self.accelerator.device if self.accelerator.device_placement else None
        loader = prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=device is not None,
            non_blocking=self.accelerator.non_blocking,
        )  # fmt: skip
        self.accelerator._dataloaders.append(loader)
        return loader

    def whole_model(self) -> Any:
        """Return the trained model without wrappers and whole, in every process: the one given, or one of its kind."""
        if self._skeleton is None:
            return unwrap(self.model)  # type: ignore[arg-type]  # Trainer types it as possibly None
        assert self.model is not None
        if self.shards:
            return _filled(self._skeleton, self.model, lambda shard: _whole(shard, keep=True, device=None))
        return _filled(self._skeleton, self.model, zero.whole)

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.shards:
            assert self.model is not None
            if resume_from_checkpoint is not None:
                with self._before_sharding():
                    super()._load_from_checkpoint(resume_from_checkpoint)
            self._skeleton = _skeleton(self.model)
            _keep_wide(self.model)
        if zero.shards_weights(self):
            assert self.model is not None
            self._skeleton = _skeleton(self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @contextlib.contextmanager
    def _before_sharding(self) -> Iterator[None]:
        self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.shards:  # else they were read before the model was sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shards:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [Path(checkpoint) / name for name in ("optimizer.pt", "scheduler.pt")] if checkpoint else []
        if files and all(file.is_file() for file in files):
            optimizer, schedule = (torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files)
            rule: Any = self.optimizer
            rule.load_state_dict(_divided(optimizer, rule.param_groups))
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(schedule)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        rule: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        found = rule.state_dict()
        keep = self.args.should_save
        found["state"] = {
            key: {name: _whole(value, keep) for name, value in entry.items()} for key, entry in found["state"].items()
        }
        if keep:
            torch.save(found, Path(output_dir) / "optimizer.pt")
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model from the main process, as one process would."""
        if not self.shards:
            super().save_model(output_dir, _internal_call)
            return
        assert self.model is not None
        adapted = hasattr(self.model, "peft_config")
        found = {n: v for n, v in _state(self.model).items() if not adapted or n in _free(self.model)}
        kept: dict[int, Any] = {}
        for value in found.values():  # a tied weight has two names
            if id(value) not in kept:
                kept[id(value)] = _whole(value, self.args.should_save)
        if self.args.should_save:  # the others have taken part in gathering, and hold nothing
            self._save(output_dir, state_dict={name: kept[id(value)] for name, value in found.items()})


def check_parallel(trainer: ParallelTrainer, rule: OptimizerSpec) -> None:
    """Make sure that an update rule can do what it does on what this process has of the model.

    Raises:
        ValueError: It cannot, or the model cannot be sharded.
    """
    if trainer.is_deepspeed_enabled:
        zero.check(trainer, rule)
    objective: Any = getattr(trainer, "objective", None)
    if objective is not None and objective.needs_whole and (trainer.shards or zero.shards_weights(trainer)):
        raise ValueError(
            f"{objective.name} sums over whole weights, of which sharded processes (FSDP2, ZeRO-3) have parts: choose "
            "another objective, or leave weights whole (DDP: examples/accelerate/ddp.yaml)"
        )
    trust: Any = getattr(trainer, "trust", None)
    if trust is not None:
        trust.check()
    if not trainer.shards:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("weights are sharded by FSDP2 alone: set fsdp_version to 2 in accelerate's configuration")
    if rule.needs_whole:
        raise ValueError(
            f"{rule.name} needs whole weight matrices, which sharded processes (FSDP2) do not have: choose an "
            "optimizer that goes coordinate by coordinate (sophia, adamw), or leave weights whole (DDP: "
            "examples/accelerate/ddp.yaml)"
        )
    curvature: Any = getattr(trainer, "curvature", None)
    if curvature is not None:
        sharded.check(curvature, watches=rule.needs_modules)
    if getattr(trainer, "stopping", None) is not None:
        raise ValueError("stop.when looks at whole weights, which are sharded (FSDP2): set it to never, or use DDP")
    if is_quantized(trainer.model):
        raise ValueError("a quantized base is not sharded: set model.quantize to none, or leave it whole (DDP)")


def _policy(precision: str) -> MixedPrecisionPolicy | None:
    """Return the precision that weights are gathered in.

    In bf16, where that is what autocast multiplies: it would make copies of gathered fp32 weights, and keep them for
    the backward pass. What runs between the layers and the sums of gradients stay in fp32, as in one process.
    """
    if precision != "bf16":
        return None
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _keep_wide(model: Any) -> None:
    """Begin what runs between the layers in fp32 at least, whatever precision embeddings are gathered in."""

    def widen(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return wide(output)

    model.get_input_embeddings().register_forward_hook(widen)


def _become(state: Any, kind: DistributedType) -> None:
    for holder in (state, PartialState()):  # the second one's word counts whenever the first is asked for
        holder.distributed_type = kind


def _asked_to_shard() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose parameters have no numbers; ties, buffers and adapters are as they were."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _filled(skeleton: nn.Module, model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Put the numbers of a sharded model into its skeleton, one parameter after another."""
    full: dict[int, nn.Parameter] = {}
    shards = dict(model.named_parameters())
    for name, empty in skeleton.named_parameters():
        value = whole(shards[name]).to(empty.dtype)  # accelerate may have widened it
        full[id(empty)] = nn.Parameter(value, requires_grad=empty.requires_grad)
    for module in skeleton.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in full:
                module._parameters[name] = full[id(p)]
    return skeleton


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def _free(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _whole(value: Any, keep: bool, device: str | None = "cpu") -> Any:
    """Return a tensor put together from its shards, where it is to be kept; anything else as it is.

    Every process calls this for the same values in the same order.
    """
    put_together: Callable[[], torch.Tensor] | None = getattr(value, "full_tensor", None)
    if put_together is None:
        return value
    with torch.no_grad():
        full = put_together()
    if not keep:
        return None
    return full.detach() if device is None else full.detach().to(device)


def _divided(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's state with this process's shards of whatever is shaped like its parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    keys = [key for group in state["param_groups"] for key in group["params"]]
    params = dict(zip(keys, (p for group in groups for p in group["params"]), strict=True))

    def part(key: Any, value: Any) -> Any:
        p = params[key]
        if not isinstance(p, DTensor) or not isinstance(value, torch.Tensor) or value.shape != p.shape:
            return value
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    entries = {key: {name: part(key, v) for name, v in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": entries}
