"""Which changes of settings would make a run fit, each planned as the run itself is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from soul.adapters import AdapterSpec
from soul.curvature.estimators import ESTIMATORS, gradient_cotangent
from soul.curvature.kronecker import linear_layers, widest
from soul.curvature.spec import CurvatureSpec
from soul.optim.base import CurvatureOptimizerSpec
from soul.optim.kronecker_spec import KroneckerSpec
from soul.plan import Plan, make_plan
from soul.plan.work import curvature_of, resized
from soul.recipe import Recipe
from soul.registry import OPTIMIZERS

MOST_GPUS = 1024
SMALL = 2
"""Rows in a micro-batch of a curvature pass that is to take little memory."""

SHARDED = (
    ("stop", "when", "never"),
    ("training", "compile", False),
    ("training", "combine", "sum"),
    ("model", "quantize", "none"),
)
"""What settings have to be where weights are sharded, by section and name."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A change, and what the run would then take.

    Attributes:
        settings: What to add to the command.
        note: What else a person should know.
        plan: The run with it.
    """

    settings: str
    note: str
    plan: Plan


def options(plan: Plan) -> list[Option]:
    """Return changes under which a run takes less, those that fit first; several at once where none alone does."""
    found: list[Option] = []
    words = ""
    if plan.machine.gpus > 1:  # what no sharded run does goes first, whatever else is changed
        recipe, words = shardable(plan.recipe)
        if words:
            plan = _again(plan, recipe)
            found.append(Option("", "what sharded weights do not allow, left out", plan))
    for changes in (_single(plan), _several(plan)):
        if any(o.plan.fits and o.plan.machine.gpus == plan.machine.gpus for o in found):
            break
        found += [o for o in changes if o.plan.memory.peak < plan.memory.peak or plan.refused]
    found = [Option(" ".join(filter(None, (words, o.settings))), o.note, o.plan) for o in found]
    unique = {option.settings: option for option in found}
    return sorted(unique.values(), key=lambda o: not o.plan.fits)


def _single(plan: Plan) -> Iterator[Option]:
    recipe = plan.recipe
    small, words = smaller_batches(recipe)
    if words:
        yield Option(words, "the same gradients, in small batches", _again(plan, small))
    if not recipe.training.gradient_checkpointing:
        training = dataclasses.replace(recipe.training, gradient_checkpointing=True)
        again = _again(plan, dataclasses.replace(recipe, training=training))
        yield Option("training.gradient_checkpointing=true", "the same gradients, a third more time", again)
    narrow = _narrower(plan)
    if narrow is not None:
        yield narrow
    lightest = _lightest(plan)
    if lightest is not None:
        yield Option(f"optimizer={lightest.recipe.optimizer.name}", "another rule: tune its lr", lightest)
    if recipe.training.frozen == "nothing" and recipe.adapter is None:
        yield Option(
            "training.frozen=embeddings", "embeddings and head stay as they are", _again(plan, _frozen(recipe))
        )
    if recipe.adapter is None:
        yield Option("adapter.r=8", "LoRA", _again(plan, dataclasses.replace(recipe, adapter=AdapterSpec())))
    sharded = _sharded(plan)
    if sharded is not None:
        yield Option(_shards(plan, sharded), "weights, gradients and states sharded by FSDP2", sharded)


def _several(plan: Plan) -> Iterator[Option]:
    recipe = plan.recipe
    lightest = _lightest(plan) or plan
    rule = "" if lightest is plan else f"optimizer={lightest.recipe.optimizer.name}"
    small, words = smaller_batches(lightest.recipe)
    yield _option(plan, "smallest in full", small, rule, words)
    sharded = _sharded(lightest)
    if sharded is not None:
        yield Option(" ".join(filter(None, (rule, _shards(lightest, sharded)))), "sharded by FSDP2", sharded)
    lora = "" if recipe.adapter else "adapter.r=8"
    for light in dict.fromkeys(("", rule)):
        base = lightest.recipe if light else recipe
        adapted = dataclasses.replace(base, adapter=base.adapter or AdapterSpec())
        small, words = smaller_batches(adapted)
        yield _option(plan, "LoRA in small batches", small, light, lora, words)
        rounded = dataclasses.replace(small, model=dataclasses.replace(recipe.model, dtype="bfloat16"))
        half = "" if recipe.model.dtype == "bfloat16" else "model.dtype=bfloat16"
        yield _option(plan, "LoRA on bf16 weights", rounded, light, lora, half, words)
        if plan.machine.device == "cuda":
            four = dataclasses.replace(rounded, model=dataclasses.replace(rounded.model, quantize="nf4"))
            yield _option(plan, "on 4-bit weights", four, light, lora, half, "model.quantize=nf4", words)


def _option(plan: Plan, note: str, changed: Recipe, *words: str) -> Option:
    return Option(" ".join(filter(None, words)), note, _again(plan, changed))


def _frozen(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, frozen="embeddings"))


def smaller_batches(recipe: Recipe) -> tuple[Recipe, str]:
    """Return the recipe with the smallest micro-batches that add up to the same steps and passes, and the settings.

    Passes are left as they are where their examples and passages do not both divide into as many smaller micro-batches.
    """
    training, optimizer, words = recipe.training, recipe.optimizer, []
    if training.batch_size > 1:
        count = training.batch_size * training.accumulation
        training = dataclasses.replace(training, batch_size=1, accumulation=count)
        words += ["training.batch_size=1", f"training.accumulation={count}"]
    spec = curvature_of(recipe)
    many = _parts(spec) if spec else 1
    if isinstance(optimizer, CurvatureOptimizerSpec) and spec and many > 1:
        changes = {name: getattr(spec, name) // many for name in ("batch", "general_text")}
        changes |= {name: getattr(spec, name) * many for name in ("micro_batches", "warm_start")}
        optimizer = dataclasses.replace(optimizer, curvature=dataclasses.replace(spec, **changes))
        words += [f"optimizer.curvature.{name}={value}" for name, value in changes.items() if value]
    return dataclasses.replace(recipe, training=training, optimizer=optimizer), " ".join(words)


def _parts(spec: CurvatureSpec) -> int:
    """Return into how many micro-batches of at least :data:`SMALL` rows one divides that keep its share of text."""
    if ESTIMATORS[spec.estimator].cotangent is gradient_cotangent:  # of smaller batches it would be something else
        return 1
    common, rows = math.gcd(spec.batch, spec.general_text), spec.batch + spec.general_text
    return max((n for n in range(1, common + 1) if common % n == 0 and rows // n >= SMALL), default=1)


def shardable(recipe: Recipe) -> tuple[Recipe, str]:
    """Return the recipe without what sharded weights do not allow whatever else is chosen, and the settings."""
    words = []
    for section, name, value in SHARDED:
        part = getattr(recipe, section)
        if getattr(part, name) != value:
            recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(part, **{name: value})})
            words.append(f"{section}.{name}={str(value).lower()}")
    optimizer, spec = recipe.optimizer, curvature_of(recipe)
    if isinstance(optimizer, CurvatureOptimizerSpec) and spec:
        changes: dict[str, Any] = {} if ESTIMATORS[spec.estimator].cotangent else {"estimator": CurvatureSpec.estimator}
        changes |= {"shuffled": False} if spec.shuffled else {}
        optimizer = dataclasses.replace(optimizer, curvature=dataclasses.replace(spec, **changes))
        recipe = dataclasses.replace(recipe, optimizer=optimizer)
        words += [f"optimizer.curvature.{name}={str(value).lower()}" for name, value in changes.items()]
    return recipe, " ".join(words)


def _shards(plan: Plan, sharded: Plan) -> str:
    """Return the settings that lead from a plan to the one over several GPUs."""
    _, words = shardable(plan.recipe)
    return " ".join(filter(None, (words, f"--gpus {sharded.machine.gpus}")))


def _again(plan: Plan, recipe: Recipe) -> Plan:
    work = resized(plan.work, recipe.training.batch_size / plan.recipe.training.batch_size)
    before, now = (getattr(r.optimizer, "curvature", None) for r in (plan.recipe, recipe))
    if work.curvature and before and now and before.batch != now.batch:
        share = (now.batch + now.general_text) / (before.batch + before.general_text)
        old = work.curvature
        work = dataclasses.replace(
            work, curvature=dataclasses.replace(old, rows=old.rows * share, answers=old.answers * share)
        )
    return make_plan(recipe, plan.machine, work, plan)


def _lightest(plan: Plan) -> Plan | None:
    """Return the plan with the registered rule that keeps least, if that is another one."""
    kept: dict[str, int] = {}
    for name in OPTIMIZERS.names():
        try:
            rule = OPTIMIZERS.get(name)()
            cost = rule.cost(plan.skeleton.params, plan.skeleton.model, plan.machine.device)
        except ValueError:  # it declares nothing
            continue
        if not rule.needs_whole or plan.machine.gpus == 1:
            kept[name] = cost.kept
    name = min(kept, key=lambda n: kept[n])
    if kept[name] >= plan.cost.kept and not plan.refused:
        return None
    return make_plan(dataclasses.replace(plan.recipe, optimizer=OPTIMIZERS.get(name)()), plan.machine, plan.work, plan)


def _narrower(plan: Plan) -> Option | None:
    """Return the plan in which the widest layers have no Kronecker factors, if they are not all of one width.

    Not of adapters: a half of one has another width than the other half, and does nothing without it.
    """
    rule, model = plan.recipe.optimizer, plan.skeleton.model
    if not isinstance(rule, KroneckerSpec) or plan.recipe.adapter is not None:
        return None
    layers = linear_layers(model, rule.max_dim, outputs=rule.watches_outputs)
    widths = {name: widest(layer, rule.watches_outputs) for name, layer in layers.items()}
    rest = [width for width in widths.values() if width < max(widths.values())]
    if not rest:
        return None
    weights = sum(layer.weight.numel() for layer in layers.values())
    left = sum(layers[name].weight.numel() for name, width in widths.items() if width > max(rest))
    again = _again(plan, dataclasses.replace(plan.recipe, optimizer=dataclasses.replace(rule, max_dim=max(rest))))
    become = "stay as they are" if rule.others == "frozen" else "take diagonal steps"
    note = f"wider layers, {left / weights:.0%} of the weights of layers, {become}: tune lr"
    return Option(f"optimizer.max_dim={max(rest)}", note, again)


def _sharded(plan: Plan) -> Plan | None:
    """Return the plan with the smallest number of GPUs, a power of two, that it fits on."""
    if plan.machine.device != "cuda" or plan.recipe.optimizer.needs_whole:
        return None
    gpus = max(2, 2 * plan.machine.gpus)
    recipe, _ = shardable(plan.recipe)
    while gpus <= MOST_GPUS:
        found = make_plan(recipe, dataclasses.replace(plan.machine, gpus=gpus), plan.work, plan)
        if found.fits:
            return found
        if found.refused or found.skeleton.weights > plan.machine.memory:  # on any number
            return None
        gpus *= 2
    return None
