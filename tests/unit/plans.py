"""Recipes, models without weights and machines that tests of plans begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soul.plan import Machine, Plan, find_work, make_plan
from soul.recipe import Recipe, recipe_from_tree

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
GPU = Machine("cuda", 141e9, 989e12, 60e12, 3.3e12, int(0.6e9))


def config(depth: int = 3, **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 340, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": depth}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads, **changes}


def bare_model(path: Path) -> Path:
    """Write a model's folder that holds no weights: whatever is planned from it, nothing was loaded."""
    (path / "config.json").write_text(json.dumps(config()))
    return path


def recipe(path: Path, **tree: Any) -> Recipe:
    return recipe_from_tree({"objective": "grad_diff", "optimizer": "adamw", "model": {"path": str(path)}, **tree})


def planned(path: Path, machine: Machine = GPU, length: int = 256, answer: int = 64, **tree: Any) -> Plan:
    made = recipe(path, **tree)
    return make_plan(made, machine, find_work(made, length, answer))
