"""A plan as text."""

from __future__ import annotations

import math

from soul.plan import GIGA, USABLE, Plan
from soul.plan.advice import options
from soul.plan.speed import communicated
from soul.plan.work import curvature_of


def lines(plan: Plan) -> list[str]:
    """Return the lines that say what a run will take."""
    return [*_model(plan), "", *_memory(plan), "", *_time(plan), "", verdict(plan), *_advice(plan)]


def size(value: float) -> str:
    """Return bytes in GB, or in MB where that is less than a tenth of one.

    Example:
        >>> size(13.5e9), size(2e6)
        ('13.5 GB', '2 MB')
    """
    return f"{value / GIGA:.1f} GB" if value >= 1e8 else f"{value / 1e6:.0f} MB"


def _model(plan: Plan) -> list[str]:
    s, recipe = plan.skeleton, plan.recipe
    how = "LoRA" if recipe.adapter else "in full" if s.trainable == s.total else "in part"
    tokens = plan.work.typical
    return [
        f"model       {recipe.model.path}: {_many(s.total)} parameters, {_many(s.trainable)} trained ({how}), "
        f"weights in {recipe.model.quantize if recipe.model.quantize != 'none' else recipe.model.dtype}",
        f"run         {recipe.objective.name} + {recipe.optimizer.name}; micro-batches of {tokens.rows:.0f} rows, "
        f"{tokens.width:.0f} tokens wide on average, {plan.work.largest.width:.0f} at most",
        f"data        {plan.work.source}",
        *([f"warning     {plan.work.cut}"] if plan.work.cut else []),
    ]


def _many(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    each = f" a GPU, of {plan.machine.gpus} (FSDP2)" if plan.machine.gpus > 1 else ""
    out = [f"memory{each}"]
    rows = [*memory.held.items(), *([("gathered blocks", memory.shared)] if memory.shared else [])]
    for name, value in rows:
        per = ""
        if name == "optimizer states" and plan.skeleton.trainable:
            per = f"  ({plan.cost.kept / plan.skeleton.trainable:.2f} bytes a trained parameter)"
        out.append(f"  {name:<42}{size(value):>10}{per}")
    for name, value in memory.moments.items():
        mark = "  <- the peak" if name == memory.moment else ""
        out.append(f"  + {name:<40}{size(value):>10}{mark}")
    if plan.kept.estimated:
        out.append("  (activations by a formula: this model's code cannot be run without numbers)")
    return [*out, f"  {'peak':<42}{size(memory.peak):>10}"]


def _time(plan: Plan) -> list[str]:
    machine, found = plan.machine, plan.time
    if found is None:
        out = ["time        not known: give --flops (and --bandwidth) of the GPU"]
    else:
        speed = f"{machine.flops / 1e12:.2f} TFLOP/s, {machine.bandwidth / GIGA:.0f} GB/s"
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in found.parts.items())
        out = [
            f"time        {found.step:.3g} s a step ({parts}) at {speed}{', measured here' if machine.measured else ''}"
        ]
        if found.before:
            out.append(f"            {found.before:.3g} s before the first step")
        if found.steps:
            most = "" if plan.recipe.stop.when == "never" else "at most "
            out.append(f"            {most}{found.steps} steps: {_duration(found.total)}, measuring apart")
        if plan.recipe.training.compile:
            out.append(
                "            planned as if not compiled: training.compile takes less a step, once it has compiled"
            )
    if machine.gpus > 1:
        sent = communicated(plan.skeleton, machine.gpus)
        out.append(f"            {size(sent)} sent by each GPU for a micro-batch")
    if curvature_of(plan.recipe) and not plan.cost.backward:
        out.append("            curvature passes go forward only")
    if asked := plan.work.measured:
        each = f"{asked.answers} answers of up to {plan.recipe.evaluation.max_new_tokens} tokens"
        out.append(f"measuring   {each} and {asked.likelihoods} likelihoods before training, as many after it")
    return out


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def verdict(plan: Plan) -> str:
    """Say in a sentence whether the run fits."""
    if plan.refused:
        return f"cannot run on {plan.machine.gpus} GPUs: {plan.refused}"
    memory = plan.machine.memory
    if not math.isfinite(memory):
        return "fits?       not known: give --memory, the GB of a GPU"
    word = "fits        " if plan.fits else "does not fit: "
    return f"{word}{size(plan.memory.peak)} of {size(memory)} ({USABLE:.0%} of it can be filled)"


def _advice(plan: Plan) -> list[str]:
    known = math.isfinite(plan.machine.memory)
    if plan.fits or (not known and not plan.refused):
        return []
    found = options(plan)
    fit = [option for option in found if option.plan.fits]
    if not found:
        return ["no setting known to this command makes it smaller: use a smaller model, or shorter examples"]
    out = ["", "it fits with" if fit else "nothing known to this command is enough; nearest come"]
    nearest = sorted(found, key=lambda o: o.plan.memory.peak)[:3]
    return out + [f"  {size(o.plan.memory.peak):>9}  {o.settings}  ({o.note})" for o in fit or nearest]
