"""Time of a step: floating-point operations over a measured peak, and bytes over a measured bandwidth."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import nn

from soul.optim.cost import RuleCost
from soul.plan.activations import Saved
from soul.plan.skeleton import Skeleton
from soul.plan.work import Batch, Work, curvature_of
from soul.recipe import Recipe

SHAPES = ((1024, 1024, 1024), (512, 1536, 576))
"""(m, n, k) of the products that a peak is measured with: a large square, and a layer of a small model."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What separates a pass from its arithmetic, in passes over memory at the measured bandwidth.

    ``docs/scaling.md`` says what they were measured on.

    Attributes:
        products: Share of the matrix-multiply peak that the products of a model reach.
        forward: Passes over what is kept for the backward pass, in the forward pass.
        backward: The same in the backward pass.
        gradients: Passes over the gradients of the weights, from the products to where they add up.
    """

    products: float
    forward: float
    backward: float
    gradients: float


ON_CPU = Efficiency(products=1.0, forward=21.0, backward=38.0, gradients=12.0)
"""Fresh memory is handed out page by page there, which costs more than reading and writing it."""
ON_GPU = Efficiency(products=0.65, forward=6.0, backward=10.0, gradients=3.0)
"""Not measured: a guess at eager kernels, to be replaced where a GPU is at hand."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """How fast a machine is.

    Attributes:
        device: ``cpu`` or ``cuda``.
        memory: Bytes of one device.
        flops: Operations a second of matrix products in the precision of training.
        exact_flops: The same in fp32.
        bandwidth: Bytes a second, read and written.
        base: Bytes that a process takes before it holds anything of the run.
        gpus: Devices that share the run.
        link: Bytes a second between devices; 0 where it is not known.
        measured: The speeds were measured here, and not given.
    """

    device: str
    memory: float
    flops: float
    exact_flops: float
    bandwidth: float
    base: int
    gpus: int = 1
    link: float = 0.0
    measured: bool = False


def measure_flops(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.15) -> float:
    """Return the best operations a second of ``x W^T`` in ``dtype``, over shapes and repeats."""
    best = 0.0
    for m, n, k in SHAPES if device == "cpu" else ((8192, 8192, 8192),):
        x, w = torch.rand(m, k, device=device).to(dtype), torch.rand(n, k, device=device).to(dtype)
        best = max(best, 2 * m * n * k / _fastest(lambda x=x, w=w: nn.functional.linear(x, w), device, seconds))
    return best


def measure_bandwidth(device: str = "cpu", seconds: float = 0.15) -> float:
    """Return the best bytes a second, read and written, of an update in place that no cache holds."""
    a, b = (torch.ones(1 << 25, device=device) for _ in range(2))
    return 12 * a.numel() / _fastest(lambda: a.add_(b), device, seconds)


def _fastest(function: object, device: str, seconds: float) -> float:
    assert callable(function)
    best, end = float("inf"), time.perf_counter() + seconds
    for repeat in range(10_000):
        started = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        if repeat:  # the first chooses a kernel, or touches memory for the first time
            best = min(best, time.perf_counter() - started)
        if repeat and time.perf_counter() > end:
            break
    return best


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds.

    Attributes:
        parts: Of a step, by what they are spent on; curvature passes count as their share of one.
        before: Before the first step: the reference, and a warm start.
        steps: Steps of the run; 0 where the data do not tell.
        operations: Floating-point operations of a step's forward and backward passes.
    """

    parts: dict[str, float]
    before: float
    steps: int
    operations: float

    @property
    def step(self) -> float:
        """Seconds of a step on average."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """Seconds of the run, measuring apart."""
        return self.before + self.steps * self.step


def operations(skeleton: Skeleton, batch: Batch, *, backward: bool = True, weights: bool = True) -> float:
    """Return the operations of a forward pass over ``batch``, and of a backward pass after it.

    ``2 (body + head)`` a position forward, as much again backward for the gradient of inputs and, of trained weights
    only (and not without ``weights``), once more for theirs; ``4 width`` for the scores of attention, and twice that
    backward. The head counts where it is applied.
    """
    body, trained = skeleton.body, skeleton.trained_body
    scores = 4 * batch.width * skeleton.attention
    head = 2 * skeleton.head * batch.answers
    forward = (2 * (body + trained) + scores) * batch.positions + head
    if not backward:
        return forward
    theirs = 2 * trained * batch.positions + (head if skeleton.trained_head else 0)
    return 2 * forward + scores * batch.positions + (theirs if weights else 0)


def time_of_run(
    recipe: Recipe, skeleton: Skeleton, cost: RuleCost, work: Work, saved: tuple[Saved, Saved | None], machine: Machine
) -> Time:
    """Return how long the run takes on ``machine``.

    A pass takes ``operations / (share of the peak) + bytes kept * passes over them / bandwidth``; a step of the rule
    its traffic over the bandwidth and its products over the peak.
    """
    training, how = recipe.training, ON_CPU if machine.device == "cpu" else ON_GPU
    micro = _pass_seconds(skeleton, work.typical, saved[0], machine, how)
    again = 2 if training.combine != "sum" else 1
    back = micro[1] + (micro[0] if training.gradient_checkpointing else 0.0)  # the blocks run once more
    parts = {"forward": micro[0] * training.accumulation, "backward": back * training.accumulation * again}
    clip = 4 * skeleton.gradients / machine.gpus / machine.bandwidth if training.max_grad_norm else 0.0
    rules = 2 if training.combine == "dual" else 1
    traffic, products = cost.traffic / machine.gpus / machine.bandwidth, cost.products / machine.flops / how.products
    parts["clipping and step"] = clip + rules * (traffic + products)
    items = work.items or 0
    per_epoch = -(-items // (training.batch_size * training.accumulation * machine.gpus))
    steps = training.max_steps or (per_epoch and int(per_epoch * recipe.stop.epochs(per_epoch, training.epochs)))
    before = _reference_seconds(skeleton, work, machine, how)
    spec = curvature_of(recipe)
    if spec is not None and work.curvature is not None and saved[1] is not None:
        ahead, back = _pass_seconds(skeleton, work.curvature, saved[1], machine, how)
        watched = rules * cost.per_position * work.curvature.positions / machine.exact_flops
        if not cost.gradients and machine.gpus == 1:
            back = _pass_seconds(skeleton, work.curvature, saved[1], machine, how, weights=False)[1]
        once = ahead + (back if cost.backward else 0.0) + watched
        derived = rules * cost.derivation / (0.3 * machine.exact_flops)
        before += spec.passes(0) * once + derived
        if spec.interval:
            parts["curvature"] = (spec.micro_batches * once + derived) / spec.interval
    if machine.gpus > 1 and machine.link:
        parts["communication"] = communicated(skeleton, machine.gpus) * training.accumulation / machine.link
    return Time(parts, before, steps, training.accumulation * operations(skeleton, work.typical))


def _pass_seconds(
    skeleton: Skeleton, batch: Batch, saved: Saved, machine: Machine, how: Efficiency, *, weights: bool = True
) -> tuple[float, float]:
    """Return the seconds forward and back; back with or without gradients of weights."""
    ahead = operations(skeleton, batch, backward=False)
    both = operations(skeleton, batch, weights=weights)
    peak = machine.flops * how.products
    kept = saved.of(batch.rows) + 6 * batch.answers * skeleton.rows
    fresh = skeleton.gradients * 1.5 if weights else 0.0  # in the products' precision, then in the weights'
    return (
        ahead / peak + (how.forward * kept + 3 * saved.constant) / machine.bandwidth,
        (both - ahead) / peak + (how.backward * kept + how.gradients * fresh) / machine.bandwidth,
    )


def _reference_seconds(skeleton: Skeleton, work: Work, machine: Machine, how: Efficiency) -> float:
    if work.reference is None:
        return 0.0
    return 1.5 * operations(skeleton, work.reference, backward=False) / (machine.flops * how.products)


def communicated(skeleton: Skeleton, gpus: int) -> float:
    """Return the bytes that each process sends for a micro-batch: weights gathered twice, gradients scattered once."""
    share = (gpus - 1) / gpus
    return share * (2 * 2 * skeleton.total + skeleton.gradients)
