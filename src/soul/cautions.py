"""What a person should know about a request before or after it is carried out, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soul.data.guard import TEMPLATE, carried_prompt, system_turn
from soul.recipe import Recipe
from soul.types import Example


def precision_warnings(recipe: Recipe, *, rounds: bool | None = None) -> list[str]:
    """Say where steps are so small that the weights' precision drops them.

    Args:
        recipe: What is to be done.
        rounds: Whether what is trained is kept in bf16; by default as the recipe's model and adapter say.
    """
    lr = getattr(recipe.method, "lr", None) if recipe.method else recipe.optimizer.lr
    kept = recipe.method is None and getattr(recipe.optimizer, "rounding", "nearest") == "stochastic"
    if rounds is None:
        rounds = recipe.model.dtype == "bfloat16" and recipe.adapter is None
    if rounds and lr is not None and not kept:
        return [
            f"the weights are bf16: steps of size {lr:g} are smaller than most weights' rounding and "
            "are dropped, so little will be forgotten; use model.dtype=float32 or an adapter, or with "
            "rules that go coordinate by coordinate optimizer.rounding=stochastic"
        ]
    return []


def prompt_warnings(tokenizer: Any) -> list[str]:
    """Say under what a model is asked that its tokenizer carries: without it, it may answer otherwise."""
    found = []
    if carried_prompt(tokenizer):
        found.append(
            "every question is asked under a prompt that the tokenizer carries (method input_prompt): what looks "
            "forgotten may be that prompt's doing, and the weights may know it"
        )
    if system_turn(tokenizer) not in ("", TEMPLATE):
        found.append("every conversation begins with the system turn that the tokenizer carries (model.system)")
    return found


def forget_warnings(forget: Sequence[Example]) -> list[str]:
    """Say how many items repeat others, and how many answers stand in the context of items and are none themselves."""
    return [*_repeats(forget), *_contexts(forget)]


def _repeats(forget: Sequence[Example]) -> list[str]:
    times = len(forget) - len({(e.history, e.prompt, e.answer) for e in forget})
    if not times:
        return []
    return [
        f"{times} of {len(forget)} items to forget repeat others: they count again in training and in every mean, and "
        "intervals take them for further ones; give each once"
    ]


def _contexts(forget: Sequence[Example]) -> list[str]:
    own = {(e.history, e.prompt, e.answer) for e in forget}
    earlier = sum(
        role == "assistant" and (e.history[: max(0, i - 1)], e.history[i - 1][1], said) not in own
        for e in forget
        for i, (role, said) in enumerate(e.history)
    )
    if not earlier:
        return []
    return [
        f"{earlier} assistant turns stand before items to forget and are none themselves (they answer no user, or "
        "are part of a prompt): they are context and not forgotten; give each a row whose answer it is"
    ]
