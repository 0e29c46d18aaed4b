from __future__ import annotations

import copy
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from soul import config
from soul.contest.entry import Entry, Knob
from soul.contest.matrix import Task, matrix_from_tree, read_matrix
from soul.contest.trial import _seconds
from soul.curvature.spec import CurvatureSpec
from soul.optim.sophia import SophiaSpec

FOLDER = Path(__file__).parents[2] / "recipes/contests"
TREE = {
    "tasks": {
        "t": {
            **{name: f"{{request}}/{name}.jsonl" for name in ("forget", "retain", "seen", "unseen")},
            "model": "m",
            "gold": "gold/{request}",
            "text": "general:text",
            "tune": ["a"],
            "report": ["b"],
        }
    },
    "objectives": ["npo", {"name": "grad_diff"}],
    "optimizers": [
        "signum",
        {"name": "kfac", "order": "second", "knob": {"setting": "damping", "low": 0.01, "high": 1}},
    ],
    "training": {"max_steps": 12},
    "budget": {"points": 5, "checkpoints": 3},
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_contests_of_the_repository_load(path):
    matrix = read_matrix(path)
    assert matrix_from_tree(yaml.safe_load(config.dump(matrix.tree()))) == matrix
    assert {e.order for e in matrix.optimizers} == {"first", "second"}


def test_the_matrix_of_the_documentation_loads():
    page = (FOLDER.parents[1] / "docs/contests.md").read_text(encoding="utf-8")
    block = page.partition("    tasks:\n")[1:]
    lines = "".join(block).partition("\n\n")[0]
    matrix = matrix_from_tree(yaml.safe_load(textwrap.dedent(lines)))
    assert [e.steps for e in matrix.optimizers] == [0, 0, 12]
    assert set(matrix.attackers) == {"relearn", "quantize"}
    fields = {f.name for f in dataclasses.fields(Entry)} - {"optimizer"}
    assert not [name for name in fields if f"`{name}" not in page]  # each is told of


def test_steps_of_an_entry_and_seconds_of_all_are_not_both_said():
    optimizers = [*TREE["optimizers"], {"name": "lion", "steps": 3}]
    with pytest.raises(ValueError, match=r"lion: steps or budget\.seconds"):
        matrix_from_tree({**TREE, "optimizers": optimizers, "budget": {"seconds": 60}})


def test_cells_checkpoints_and_sources():
    tree = copy.deepcopy(TREE)
    tree["tasks"]["t"]["facts"] = {"world": "{request}/world.jsonl", "all": "all.jsonl"}
    found = matrix_from_tree(tree).tasks["t"].fact_sources("a")
    assert found == {"world": "a/world.jsonl", "all": "all.jsonl"}
    matrix = matrix_from_tree(TREE)
    assert len(matrix.cells) == 4
    assert matrix.checkpoints(12) == [4, 8, 12]
    assert matrix.tasks["t"].source("forget", "a") == "a/forget.jsonl"
    assert matrix.tasks["t"].source("curvature", "a") == ""


def test_an_entry_may_have_fewer_trials_and_settings():
    entries = [*TREE["optimizers"], {"name": "lion", "points": 1, "settings": 1}]
    matrix = matrix_from_tree({**TREE, "optimizers": entries})
    assert [matrix.sizes(name) for name in ("signum", "kfac", "lion")] == [(5, 2), (5, 2), (1, 1)]


def test_braces_of_sources_stand_for_a_request_alone():
    task = {"model": "m", "gold": "{request}/g", "forget": "f", "retain": "r", "seen": "s", "unseen": "u", "text": "t"}
    whole = {**task, "tune": ["a"], "report": ["b{0}"]}
    assert Task(**whole).source("gold", "b{0}") == "b{0}/g"
    for wrong in ("{reqest}/g", "{0}", "{request.x}", "{request:>9}", "a}"):
        with pytest.raises(ValueError, match=r"gold: .* has braces, and \{request\} alone stands for something"):
            Task(**{**whole, "gold": wrong})
    with pytest.raises(ValueError, match=r"world: '\{x\}' has braces"):
        Task(**whole, facts={"world": "{x}"})


def test_an_entry_may_take_part_under_some_objectives_only():
    entries = [*TREE["optimizers"], {"name": "lion", "objectives": ["npo"]}]
    matrix = matrix_from_tree({**TREE, "objectives": ["npo", "grad_diff"], "optimizers": entries})
    assert len(matrix.cells) == len(matrix_from_tree(TREE).cells) + 1
    assert {c.objective for c in matrix.cells if c.optimizer == "lion"} == {"npo"}
    assert matrix_from_tree(yaml.safe_load(config.dump(matrix.tree()))) == matrix


def test_all_cells_share_their_points_and_more_points_leave_them():
    few, many = matrix_from_tree(TREE), matrix_from_tree({**TREE, "budget": {"points": 20}})
    assert np.array_equal(few.points(), many.points()[:5])
    centre = 1e-3
    for i, (x, y, z) in enumerate(few.points()):
        found = few.settings("kfac", i, centre)
        assert found["lr"] == pytest.approx(centre * 10 ** (2 * x - 1))
        assert found["retain_weight"] == pytest.approx(0.5 * 16**y)
        assert found["knob"] == pytest.approx(0.01 * 100**z)
        assert few.settings("signum", i, centre).keys() == {"lr", "retain_weight"}
        assert few.entry("kfac").spec(found).lr == found["lr"]
        assert few.objective("npo", found).retain_weight == found["retain_weight"]


def test_a_knob_may_be_part_of_a_setting():
    optimizers = [{"name": "adamw", "knob": {"setting": "betas.1", "low": 0.9, "high": 0.999, "scale": "complement"}}]
    entry = matrix_from_tree({**TREE, "optimizers": optimizers}).entry("adamw")
    assert entry.spec({"knob": 0.95}).settings()["betas"] == (0.9, 0.95)
    assert Knob("x", 0.9, 0.999, "complement").at(0.5) == pytest.approx(0.99)
    assert Knob("x", 0.0, 2.0, "linear").at(0.25) == 0.5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("objectives",), [], "lacks objectives"),
        (("optimisers",), [], "unknown section 'optimisers'"),
        (("optimizers",), ["adam"], "unknown optimizer 'adam'"),
        (("optimizers",), ["signum", "signum"], "same label"),
        (
            ("optimizers",),
            [{"name": "signum", "knob": {"setting": "moment", "low": 0.1, "high": 1}}],
            "optimizer.moment",
        ),
        (
            ("optimizers",),
            [{"name": "signum", "knob": {"setting": "momentum", "low": 1, "high": 0.1}}],
            "low must be below",
        ),
        (("optimizers",), "signum", "must be a list"),
        (("optimizers",), [{"name": "signum", "objectives": ["dpo"]}], "names 'dpo', which the matrix has not"),
        (("optimizers",), [{"name": "signum", "settings": 3}], r"settings must be from 1 to budget.settings \(2\)"),
        (("optimizers",), [{"name": "signum", "points": 1}], r"points must be from the settings that go on \(2\)"),
        (
            ("optimizers",),
            [{"name": "signum", "steps": 13}],
            r"steps must be from budget.checkpoints \(3\) to .* \(12\)",
        ),
        (("optimizers",), [{"method": {"name": "influence"}, "steps": 3}], "a method has settings of its own"),
        (("optimizers",), [{"method": {"name": "influence"}, "match": "run"}], "a method has settings of its own"),
        (("optimizers",), [{"name": "signum", "match": "run"}], "match: run is for an entry with steps of its own"),
        (("optimizers",), [{"method": {"name": "influence"}}], "needs a knob"),
        (("optimizers",), [{"name": "signum", "method": {"name": "influence"}}], "one of the two"),
        (("objectives",), [3], "a name, or a mapping"),
        (("attacks",), ["quantize", "quantize"], "two of the attacks"),
        (("attacks",), ["bribe"], "unknown attack 'bribe'"),
        (("training", "max_steps"), 0, "max_steps must be given"),
        (("training", "max_steps"), 2, "at least budget.checkpoints"),
        (("budget", "settings"), 6, "settings <= points"),
        (("budget",), {"seconds": 60, "pilot_steps": 1}, "set budget.pilot_steps to 2 or more"),
        (("tasks", "t", "report"), ["a"], "tuned on or reported, not both"),
        (("tasks", "t", "report"), [], "needs requests"),
        (("tasks", "t", "golden"), "x", "unknown setting tasks.t.golden"),
    ],
)
def test_a_bad_matrix_is_told(path, value, message):
    tree = copy.deepcopy(TREE)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        matrix_from_tree(tree)


def test_the_same_seconds_are_more_steps_for_who_takes_less():
    # twelve steps, every fourth of which takes 10 s and the others 2 s: the median says nothing of the former
    slow = {"steps": 12, "seconds": {"curvature": 20.0, "refreshes": 0.0, "first": 8.0, "train": 72.0, "step": 2.0}}
    quick = {"steps": 3, "seconds": {"curvature": 0.0, "refreshes": 0.0, "first": 2.0, "train": 6.0, "step": 2.0}}
    matrix = matrix_from_tree({**TREE, "budget": {"points": 5, "checkpoints": 3, "seconds": 80}})
    assert (matrix.steps(slow), matrix.steps(quick)) == (19, 40)
    cold = matrix_from_tree({**TREE, "budget": {"points": 5, "checkpoints": 3, "seconds": 80, "cold": True}})
    assert (cold.steps(slow), cold.steps(quick)) == (14, 40)
    assert matrix_from_tree(TREE).steps(slow) == matrix_from_tree(TREE).steps(quick) == 12
    sophia = SophiaSpec(curvature=CurvatureSpec(interval=5, warm_start=8, micro_batches=2))
    assert matrix.steps(slow, sophia) == 1 + int(72 / (4 + 20 * 2 / 8 / 5))  # a refresh is a quarter of the warm start
    none = matrix_from_tree({**TREE, "budget": {"points": 5, "checkpoints": 3, "seconds": 1}})
    assert none.steps(slow) == 3


def test_quick_steps_are_counted_too():
    records = [{"seconds": 0.0121, "curvature_seconds": 0.0043}, {"seconds": 0.0042}, {"seconds": 0.0044}]
    took = _seconds(records)
    assert took["train"] - took["curvature"] - took["refreshes"] - took["first"] == pytest.approx(0.0086)
    matrix = matrix_from_tree({**TREE, "budget": {"points": 5, "checkpoints": 3, "seconds": 1}})
    assert matrix.steps({"steps": 3, "seconds": took}) == 1 + int((1 - 0.0078) / 0.0043)
    coarse = {"curvature": 0.0, "refreshes": 0.0, "first": 0.01, "train": 0.01, "step": 0.0}  # of an older record
    with pytest.raises(ValueError, match=r"the pilot's 3 steps were too quick .* or set budget\.seconds to 0"):
        matrix.steps({"steps": 3, "seconds": coarse})
