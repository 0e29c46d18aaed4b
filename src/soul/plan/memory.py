"""Peak memory of a run: what is held throughout, what each moment of a step adds, and the most of it."""

from __future__ import annotations

import dataclasses

from soul.optim.cost import RuleCost
from soul.plan.activations import Saved
from soul.plan.skeleton import Skeleton
from soul.plan.work import Batch, Work, curvature_of
from soul.recipe import Recipe

LOSS = 6
"""Bytes a logit as the backward pass begins, beside its fp32 log-probability: gradients in fp32 and in bf16."""
HEAP = 1.4
"""What a C library's heap takes for activations, as a multiple: pieces freed between those kept stay empty. Measured on
glibc at 135M: 1.17 in full, 1.43 with LoRA; 1.0 with ``MALLOC_MMAP_THRESHOLD_=65536``."""
CURVATURE_LOSS = 14
"""Bytes a logit of a curvature pass: logits, probabilities, noise and the cotangent."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        held: What is there in every moment of a step, by name.
        moments: What comes on top, by moment.
        shared: What each process of several holds whole for a moment: gathered blocks and their gradients.
    """

    held: dict[str, int]
    moments: dict[str, int]
    shared: int = 0

    @property
    def moment(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        """Bytes in that moment."""
        return sum(self.held.values()) + self.shared + self.moments[self.moment]


def memory_of_run(
    recipe: Recipe,
    skeleton: Skeleton,
    cost: RuleCost,
    work: Work,
    saved: tuple[Saved, Saved | None],
    *,
    base: int,
    bf16: bool,
    heap: float = 1.0,
    gpus: int = 1,
    device: str = "cpu",
) -> Memory:
    """Return what a process of the run needs.

    ``held = base + weights + states + reference``, and the peak is what the largest of these adds:

    - where the backward pass begins: activations, copies of the weights in bf16, logits; the gradient of the head too
      where it is trained, and all gradients where they add up over micro-batches;
    - where it ends: all gradients, and a second one of the embeddings;
    - the step: gradients, and what the rule works on; under a trust region the weights before it too, and while it is
      measured how far each has moved beside them;
    - on a quantized base the end of the run: the adapter is merged into plain weights;
    - in several processes, loading: the whole model is in each before it is sharded, and again beside its shards when
      it is gathered at the end, to be measured and saved;
    - a curvature pass: as the first two, with an explicit estimate and the factors' sums. K-FAC's makes no gradients of
      weights, and its peak was measured to be no lower for it (``benchmarks/kronecker_pass.py``).

    Args:
        recipe: What is planned.
        skeleton: Its model.
        cost: Of its update rule.
        work: Its batches.
        saved: Activations of a row of the largest batch, and of a curvature pass.
        base: Bytes of the process itself.
        bf16: Matrices are multiplied in bf16.
        heap: What activations take of the allocator's memory, as a multiple: :data:`HEAP` on CPUs.
        gpus: Processes that share weights, gradients and states (FSDP2); activations and gathered blocks are each
            process's own.
        device: Where; a stopping rule's copy of what is trained is on the CPU.
    """
    pieces = 2 if recipe.training.combine != "sum" else 1  # forget and retain gradients apart
    rules = 2 if recipe.training.combine == "dual" else 1  # each with states of its own; they step in turn
    cost = dataclasses.replace(cost, state=rules * cost.state, whole=rules * cost.whole, refresh=rules * cost.refresh)
    gradients = skeleton.gradients * pieces // gpus
    held = {
        "process": base,
        "weights": skeleton.weights // gpus,
        "optimizer states": cost.state // gpus,
        "Kronecker factors, and what divides by them": cost.whole,
        "reference": reference_bytes(recipe, skeleton, work, gpus),
        "stopping rule": stopping_bytes(recipe, skeleton, device, gpus),
    }
    embedding = skeleton.embeddings * (4 if recipe.model.dtype == "float32" else 2) // gpus
    act = _activations(saved[0], work.largest, skeleton, LOSS, heap, gpus)
    accumulated = gradients if recipe.training.accumulation > 1 or pieces > 1 else embedding
    trust = skeleton.gradients // gpus if recipe.training.trust_kl else 0
    moments = {
        "activations, as the backward pass begins": act + accumulated,
        "gradients, as the backward pass ends": gradients + embedding,
        "the optimizer's step": gradients + cost.step + trust,
    }
    if trust:
        moments["measuring the step"] = gradients + 2 * trust
    if curvature_of(recipe) is not None and work.curvature is not None and saved[1] is not None:
        moments["a curvature pass"] = _curvature_bytes(recipe, skeleton, cost, work.curvature, saved[1], heap, gpus)
    if recipe.model.quantize != "none":
        width = 4 if recipe.model.dtype == "float32" else 2
        moments["plain weights, as the adapter is merged"] = skeleton.total * width
    gathered = 0
    if gpus > 1:
        moments["the whole model, as it is loaded, and gathered at the end"] = skeleton.weights
        # two blocks at a time, and the gradient of one, before it is scattered
        gathered = 3 * skeleton.largest_block * (2 if bf16 else 4)
    return Memory({name: size for name, size in held.items() if size}, moments, gathered)


def _activations(saved: Saved, batch: Batch, skeleton: Skeleton, per_logit: int, heap: float, gpus: int) -> int:
    copies = 0 if gpus > 1 else saved.constant  # sharded weights are gathered in bf16, and let go
    return int(heap * (saved.of(batch.rows) + copies) + batch.answers * skeleton.rows * per_logit)


def _curvature_bytes(
    recipe: Recipe, skeleton: Skeleton, cost: RuleCost, batch: Batch, saved: Saved, heap: float, gpus: int
) -> int:
    spec = curvature_of(recipe)
    assert spec is not None
    # the states that a first step makes are not there yet where the only pass comes before it
    absent = 0 if spec.interval else cost.state // gpus
    if not cost.backward:
        return max(0, cost.refresh - absent)
    act = _activations(saved, batch, skeleton, CURVATURE_LOSS, heap, gpus)
    explicit = spec.warm_start > 0 or spec.micro_batches > 1 or spec.shuffled
    estimate = 4 * skeleton.trainable // gpus if explicit else 0
    ends = skeleton.gradients // gpus
    return max(act, ends) + estimate + cost.refresh - min(absent, estimate + cost.refresh)


def stopping_bytes(recipe: Recipe, skeleton: Skeleton, device: str, gpus: int = 1) -> int:
    """Return what a stopping rule holds: a frozen head for KL and, on the CPU, the last weights within the budget."""
    if recipe.stop.when == "never":
        return 0
    return skeleton.head * 4 + (skeleton.gradients // gpus if device == "cpu" else 0)


def reference_bytes(recipe: Recipe, skeleton: Skeleton, work: Work, gpus: int = 1) -> int:
    """Return what remembers the model as it was: cached numbers, a frozen head, or a copy of the weights."""
    objective, mode = recipe.objective, recipe.training.reference
    asks = bool(objective.needs_distributions or objective.needs_states)
    if objective.needs_model or (asks and mode == "copy"):
        alone = recipe.adapter is not None and mode != "copy"  # the adapters are switched off
        return 0 if alone else skeleton.weights // gpus
    if not asks or mode != "cache":
        return 0
    cached = int((work.reference.answers if work.reference else 0) * skeleton.width * 4)
    return cached + (skeleton.head * 4 if objective.needs_distributions else 0)
