"""What a run will take, before anything is loaded: memory, time, and the settings under which it fits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from soul.combine import make_combination
from soul.curvature import sharded
from soul.machine import memory_of
from soul.optim.cost import RuleCost, multiplies_bf16
from soul.optim.kronecker_spec import KroneckerSpec
from soul.plan.activations import Saved, saved
from soul.plan.memory import HEAP, Memory, memory_of_run
from soul.plan.skeleton import Skeleton, measure
from soul.plan.speed import Machine, Time, measure_bandwidth, measure_flops, time_of_run
from soul.plan.work import Batch, Work, curvature_of, find_work
from soul.recipe import Recipe

__all__ = [
    "Machine",
    "Memory",
    "Plan",
    "RuleCost",
    "Skeleton",
    "Time",
    "Work",
    "find_machine",
    "find_work",
    "make_plan",
]

GIGA = 1e9
CONTEXT = int(0.6e9)
"""Bytes that CUDA and its libraries take of a card."""
USABLE = 0.94
"""Share of a device's memory that a run can fill: the rest is lost between allocations."""
OPERATIONS_A_BYTE = 300
"""Operations a byte of a GPU whose bandwidth was not given (an H100 has 989 TFLOP/s in bf16 and 3.35 TB/s)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe will take on a machine.

    Attributes:
        recipe: What is planned.
        machine: Where.
        skeleton: Sizes of its model.
        cost: Of its update rule.
        work: Its batches.
        memory: Bytes of a process.
        time: Seconds; None where the machine's speed is not known.
        kept: Activations of the largest micro-batch.
        passes: Those of a curvature pass; None where there are no passes.
    """

    recipe: Recipe
    machine: Machine
    skeleton: Skeleton
    cost: RuleCost
    work: Work
    memory: Memory
    time: Time | None
    kept: Saved
    passes: Saved | None

    @property
    def refused(self) -> str:
        """Why the run cannot be started so; empty where it can."""
        return _refused(self.recipe, self.machine.gpus) if self.machine.gpus > 1 else ""

    @property
    def fits(self) -> bool:
        """Whether the run can be started and fits into a device."""
        return not self.refused and self.memory.peak <= USABLE * self.machine.memory


def find_machine(
    recipe: Recipe, *, gpus: int = 0, memory: float = 0.0, flops: float = 0.0, bandwidth: float = 0.0, link: float = 0.0
) -> Machine:
    """Return the machine that a recipe is planned for, measuring what is not given where it is at hand.

    A GPU that is not there is planned for where ``gpus``, ``memory`` or ``flops`` is given, unless the recipe asks for
    the CPU.

    Args:
        recipe: What is planned.
        gpus: Devices that share the run; 0 for the one that is there.
        memory: GB of one device.
        flops: TFLOP/s of its matrix products.
        bandwidth: GB/s of its memory.
        link: GB/s between devices.

    Raises:
        ValueError: A number below 0, or several GPUs of a recipe for the CPU.
    """
    for name, value in {"gpus": gpus, "memory": memory, "flops": flops, "bandwidth": bandwidth, "link": link}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name} must be 0 (not given) or more, not {value}")
    there = torch.cuda.is_available()
    asked = recipe.model.device
    device = asked if asked != "auto" else "cuda" if there or gpus or memory or flops else "cpu"
    if device == "cpu" and gpus > 1:
        raise ValueError("--gpus is for GPUs, and model.device is cpu: leave one of them out")
    here = device == "cpu" or there
    dtype = torch.bfloat16 if multiplies(recipe, device) else torch.float32
    speed, exact = flops * 1e12, flops * 1e12 / 8  # fp32 products without tensor cores
    if not flops and here:
        speed, exact = measure_flops(dtype, device), measure_flops(torch.float32, device)
    rate = bandwidth * GIGA or (measure_bandwidth(device) if here else speed / OPERATIONS_A_BYTE)
    known = memory_of(torch.device(device)) if here else math.inf
    return Machine(
        device=device,
        memory=memory * GIGA or known,
        flops=speed,
        exact_flops=exact,
        bandwidth=rate,
        base=_resident() if device == "cpu" else CONTEXT,
        gpus=max(1, gpus),
        link=link * GIGA,
        measured=not flops and here,
    )


def multiplies(recipe: Recipe, device: str) -> bool:
    """Say whether a recipe's training multiplies in bf16 on ``device``."""
    precision = recipe.training.precision
    return precision == "bfloat16" or (precision == "auto" and multiplies_bf16(device))


def _resident() -> int:
    """Return the bytes that this process takes: Python and the libraries, which a run loads just so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # Linux only
        return int(0.6e9)
    return pages * 4096


def make_plan(recipe: Recipe, machine: Machine, work: Work, like: Plan | None = None) -> Plan:
    """Return what ``recipe`` will take on ``machine``, from configuration and shapes alone.

    Args:
        recipe: What to plan.
        machine: From :func:`find_machine`.
        work: From :func:`soul.plan.work.find_work`.
        like: A plan of a similar run, for as much of it as is the same.

    Raises:
        ValueError: A method in place of training, no configuration, or an optimizer that declares no cost.

    Example:
        >>> plan = make_plan(recipe, find_machine(recipe), find_work(recipe))  # doctest: +SKIP
        >>> plan.memory.peak  # doctest: +SKIP
    """
    if recipe.method is not None:
        raise ValueError(f"soul plan knows training, and the recipe's method is {recipe.method.name}: set method=null")
    bf16, training = multiplies(recipe, machine.device), recipe.training
    same = like is not None and _shape(like.recipe) == _shape(recipe)
    skeleton = like.skeleton if like and same else measure(recipe)
    cost = recipe.optimizer.cost(skeleton.params, skeleton.model, machine.device)
    kept = like.kept if like and same else _saved(recipe, skeleton, work.largest, bf16)
    passes = None
    if work.curvature and curvature_of(recipe):
        known = like.passes if like and same and like.cost.backward == cost.backward else None
        nothing = Saved(0, 0)  # forward alone
        passes = known or (_saved(recipe, skeleton, work.curvature, bf16) if cost.backward else nothing)
    memory = memory_of_run(
        recipe,
        skeleton,
        cost,
        work,
        (kept, passes),
        base=machine.base,
        bf16=bf16,
        heap=HEAP if machine.device == "cpu" else 1.0,
        gpus=machine.gpus,
        device=machine.device,
    )
    moved = _saved(_uncheckpointed(recipe), skeleton, work.largest, bf16) if training.gradient_checkpointing else kept
    typical = dataclasses.replace(moved, per_row=int(moved.per_row * work.typical.width / max(1, work.largest.width)))
    seconds = time_of_run(recipe, skeleton, cost, work, (typical, passes), machine) if machine.flops else None
    return Plan(recipe, machine, skeleton, cost, work, memory, seconds, kept, passes)


def _refused(recipe: Recipe, gpus: int) -> str:
    """Say why processes that share weights cannot run a recipe, as they would; ``advice.shardable`` goes without."""
    if recipe.optimizer.needs_whole:
        return f"{recipe.optimizer.name} needs whole weight matrices, which FSDP2 does not leave; DDP does"
    if recipe.objective.needs_whole:
        return f"{recipe.objective.name} sums over whole weights, which FSDP2 does not leave; DDP does"
    if recipe.training.compile:
        return "training.compile has been made for one process: leave it at false"
    if recipe.stop.when != "never":
        return "stop.when looks at whole weights, which FSDP2 does not leave: set it to never; DDP leaves them"
    if recipe.model.quantize != "none":
        return "a quantized base is not sharded: set model.quantize to none, or leave it whole (DDP)"
    spec = curvature_of(recipe)
    try:
        make_combination(recipe.training.combine, recipe.objective.name, recipe.optimizer, processes=gpus)
        if spec is not None:
            sharded.check(spec, watches=False)  # what watches needs whole matrices
    except ValueError as error:
        return str(error)
    return ""


def _uncheckpointed(recipe: Recipe) -> Recipe:
    """Return the run that keeps what checkpointing makes again: as much goes through memory."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, gradient_checkpointing=False))


def _shape(recipe: Recipe) -> tuple[object, ...]:
    """Return what the skeleton and the activations of a row depend on."""
    training = recipe.training
    how = (training.frozen, training.precision, training.gradient_checkpointing)
    rule = recipe.optimizer  # what Kronecker rules leave alone has no gradient
    alone = (rule.name, rule.max_dim, rule.others) if isinstance(rule, KroneckerSpec) else ()
    return recipe.model, recipe.adapter, recipe.objective, *how, *alone


def _saved(recipe: Recipe, skeleton: Skeleton, batch: Batch, bf16: bool) -> Saved:
    answers = max(1, round(batch.answers / batch.rows))
    return saved(recipe, skeleton.depth, max(2, round(batch.width)), answers, bf16=bf16)
