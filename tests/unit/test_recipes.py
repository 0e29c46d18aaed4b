from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from soul import config
from soul.recipe import read_recipe, recipe_from_tree
from soul.registry import OBJECTIVES

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name != "contests")


def test_there_are_recipes():
    assert RECIPES


def round_trip(recipe):
    return recipe_from_tree(yaml.safe_load(config.dump(recipe)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_a_round_trip(path):
    recipe = read_recipe(path)
    assert recipe.label
    assert round_trip(recipe) == recipe


def test_every_section_survives_a_round_trip():
    tree = {
        "label": "all: of it",
        "model": {"path": "some/model", "dtype": "bfloat16"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"forget": "f.jsonl", "retain": ["r.jsonl", "general:chat"]},
        "objective": {"name": "dpo", "beta": 0.3, "retain": "kl", "retain_weight": 2.5},
        "optimizer": {"name": "sophia", "lr": 1e-7, "curvature": {"interval": 3}},
        "training": {"epochs": 2, "precision": "float32", "max_grad_norm": 0},
        "benchmark": {"name": "request", "forget": "f.jsonl", "kept": "r.jsonl"},
        "reference_run": "runs/retained",
        "evaluation": {"generate": False},
    }
    recipe = recipe_from_tree(tree)
    assert round_trip(recipe) == recipe
    assert config.dump(round_trip(recipe)) == config.dump(recipe)
    assert recipe.optimizer.lr == 1e-7
    assert recipe.adapter is not None
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]


def test_numbers_as_a_person_writes_them():
    recipe = recipe_from_tree(yaml.safe_load("optimizer: {name: adamw, lr: 3e-5}"))
    assert recipe.optimizer.lr == 3e-5


def test_overrides_apply_to_a_short_form(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("objective: npo\noptimizer: adamw\n")
    recipe = read_recipe(path, ["objective.beta=0.7", "optimizer.lr=1e-3", "training.epochs=9"])
    assert (recipe.objective.name, recipe.optimizer.lr, recipe.training.epochs) == ("npo", 1e-3, 9)
    assert config.plain(recipe.objective)["beta"] == 0.7


def test_overrides_apply_to_a_model_in_its_short_form(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: some/model\n")
    recipe = read_recipe(path, ["model.dtype=bfloat16"])
    assert (recipe.model.path, recipe.model.dtype) == ("some/model", "bfloat16")


RETRAIN = {"name": "retrain", "base": "./base"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": RETRAIN, "adapter": {"merge": False}}, r"retrain trains one on other weights.*adapter\.merge=true"),
        ({"method": RETRAIN, "data": {"forget": "f.jsonl"}}, r"learns the retain set.*give data\.retain"),
        ({"method": RETRAIN | {"training": {"max_length": 512}}}, r"method\.training\.max_length=512 has no effect"),
        ({"method": {"name": "task_vector", "training": {"max_length": 99}}}, r"as long as training\.max_length"),
    ],
)
def test_what_a_method_cannot_keep_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_tree(tree)


def test_what_a_method_can_keep_is_not():
    sets = {"forget": "f.jsonl", "retain": "r.jsonl"}
    for tree in (
        {"method": RETRAIN, "adapter": {"r": 2}, "data": sets},
        {"method": RETRAIN | {"training": {"epochs": 2}}, "training": {"max_length": 2048}, "data": sets},
        {"method": RETRAIN | {"training": {"max_length": 2048}}, "training": {"max_length": 2048}, "data": sets},
        {"method": "task_vector", "adapter": {"merge": False}, "data": sets},
    ):
        assert not recipe_from_tree(tree).needs_anchors


def test_settings_given_in_part_leave_the_rest_as_that_component_has_it():
    found = {}
    for name in ("kfac", "sophia"):
        found[name] = recipe_from_tree({"optimizer": {"name": name, "curvature": {"batch": 3}}}).optimizer
    kfac, sophia = (getattr(optimizer, "curvature") for optimizer in found.values())  # noqa: B009 - not every rule has it
    assert (kfac.batch, kfac.warm_start, kfac.interval) == (3, 8, 0)
    assert (sophia.batch, sophia.warm_start, sophia.interval) == (3, 0, 10)
    with pytest.raises(ValueError, match=r"unknown setting optimizer\.curvature\.bach\. Did you mean 'batch'\?"):
        recipe_from_tree({"optimizer": {"name": "kfac", "curvature": {"bach": 3}}})
    with pytest.raises(ValueError, match=r"curvature\.batch must be 1 or more"):
        recipe_from_tree({"optimizer": {"name": "kfac", "curvature": {"batch": 0}}})


def test_a_recipe_that_knew_turns_is_read_where_they_changed_nothing():
    kfac = recipe_from_tree({"optimizer": {"name": "kfac", "damping": 0.2}}).optimizer
    assert recipe_from_tree({"optimizer": {"name": "kfac", "damping": 0.2, "turns": 1}}).optimizer == kfac
    with pytest.raises(ValueError, match=r"optimizer\.turns is gone: optimizer\.every"):
        recipe_from_tree({"optimizer": {"name": "kfac", "turns": 6}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "npo", "layer": 1}, "layer 1 is looked at by nobody"),
        ({"name": "npo", "retain_schedule": {"end": 2.0}}, "retain_schedule.end is not read by the kind constant"),
        ({"name": "npo", "retain_schedule": {"kind": "dual", "end": 2.0}}, "end is not read by the kind dual"),
        (
            {"name": "npo", "retain_schedule": {"kind": "linear", "warmup": 0.1}},
            "warmup is not read by the kind linear",
        ),
        ({"name": "ap", "retain_weight": 5.0}, "preserve_weight is what weighs the retained answers"),
    ],
)
def test_settings_that_nothing_reads_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        config.component(OBJECTIVES, tree, "")


def test_a_schedule_can_be_taken_off():
    assert config.component(OBJECTIVES, {"name": "pdu", "retain_schedule": {"kind": "constant"}}, "")
