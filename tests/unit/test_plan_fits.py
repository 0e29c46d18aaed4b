"""What plans say of memory and time on a machine, what they advise, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plans import CONFIGS, GPU, bare_model, config, planned, recipe

from soul.cli import main
from soul.curvature.passes import CurvaturePasses
from soul.data.templates import Encoded
from soul.plan import find_machine, find_work, make_plan
from soul.plan.activations import saved
from soul.plan.advice import options, smaller_batches
from soul.plan.show import lines
from soul.recipe import recipe_from_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_model(tmp_path)


def test_7b_in_full_fits_one_card_of_141_gb() -> None:
    plan = planned(CONFIGS / "7b")
    assert plan.fits
    assert plan.memory.peak > 16 * plan.skeleton.total  # weights, gradients, two states, in fp32


def test_7b_with_lora_fits_24_gb_by_what_is_advised() -> None:
    small = dataclasses.replace(GPU, memory=24e9)
    plan = planned(CONFIGS / "7b", small)
    assert not plan.fits
    alone = [o for o in options(plan) if o.plan.fits and o.plan.machine.gpus == 1]
    assert alone
    assert all("adapter.r=8" in o.settings and "bfloat16" in o.settings for o in alone)
    made = recipe(CONFIGS / "7b", **tree_of(alone[0].settings))
    assert make_plan(made, small, find_work(made, 256, 64)).memory.peak == alone[0].plan.memory.peak


def tree_of(settings: str) -> dict[str, Any]:
    from soul import config as settings_of

    return settings_of.override({"model": {"path": str(CONFIGS / "7b")}, "optimizer": "adamw"}, settings.split())


def test_what_a_card_holds_whole_is_sharded() -> None:
    """Each process loads the model before it is sharded, and holds it again at the end, to measure and save it."""
    plan = planned(CONFIGS / "7b", dataclasses.replace(GPU, memory=80e9))
    assert not plan.fits
    found = [o for o in options(plan) if o.plan.fits and "--gpus" in o.settings]
    assert found
    assert found[0].plan.machine.gpus in (2, 4)
    large = planned(CONFIGS / "70b", dataclasses.replace(GPU, gpus=64))
    assert not large.fits
    assert large.memory.peak > large.skeleton.weights > 270e9
    assert "the whole model" in large.memory.moment
    assert not any("--gpus" in o.settings for o in options(large))


def test_sharing_divides_what_is_held_and_not_activations() -> None:
    one, four = (planned(CONFIGS / "7b", dataclasses.replace(GPU, gpus=n)) for n in (1, 4))
    for name in ("weights", "optimizer states"):
        assert four.memory.held[name] == pytest.approx(one.memory.held[name] / 4, rel=1e-6)
    kept = one.kept.of(one.work.largest.rows)
    assert four.memory.moments["activations, as the backward pass begins"] > kept


def test_rules_with_factors_run_in_one_process(folder: Path) -> None:
    plan = planned(folder, dataclasses.replace(GPU, gpus=2), optimizer="kfac")
    assert not plan.fits
    assert "whole weight matrices" in plan.refused
    assert all(o.plan.recipe.optimizer.name != "kfac" for o in options(plan) if o.plan.fits)
    plan = planned(folder, dataclasses.replace(GPU, gpus=2), objective="l1_sparse")
    assert "l1_sparse sums over whole weights" in plan.refused
    assert not any(o.plan.fits for o in options(plan))


def test_factors_of_the_widest_layers_can_be_left_out() -> None:
    plan = planned(CONFIGS / "7b", optimizer="kfac")
    assert not plan.fits  # of 141 GB
    (narrow,) = [o for o in options(plan) if "max_dim" in o.settings]
    assert narrow.plan.fits
    assert narrow.settings == "optimizer.max_dim=4096"
    assert "67% of the weights of layers, stay as they are" in narrow.note  # 3 x 11008 of 3 x 11008 + 4 x 4096
    of_attention = 32 * 4 * 4096**2
    assert narrow.plan.skeleton.gradients < plan.skeleton.gradients - 4 * 32 * 3 * 4096 * 11008 + 4 * of_attention
    assert narrow.plan.skeleton.trained_body == of_attention
    inputs = planned(CONFIGS / "7b", dataclasses.replace(GPU, memory=80e9), optimizer="whiten")
    (narrow,) = [o for o in options(inputs) if "max_dim" in o.settings]  # gate and up have narrow inputs
    assert "22% of the weights" in narrow.note
    adapted = planned(CONFIGS / "7b", dataclasses.replace(GPU, memory=24e9), optimizer="kfac", adapter={"r": 8})
    assert not adapted.fits
    assert not [o for o in options(adapted) if "max_dim" in o.settings]  # which would leave halves without the other
    alike = planned(CONFIGS / "7b", optimizer={"name": "kfac", "max_dim": 4096})
    assert not [o for o in options(alike) if "max_dim" in o.settings]


def test_what_sharded_runs_refuse_is_not_planned_for_them(folder: Path) -> None:
    two = dataclasses.replace(GPU, gpus=2)
    plan = planned(folder, two, stop={"when": "forgotten"})
    assert "stop.when" in plan.refused
    assert [o.settings for o in options(plan) if o.plan.fits] == ["stop.when=never"]
    assert planned(folder, two, stop={"when": "never"}).fits
    assert planned(folder, stop={"when": "forgotten"}).fits  # in one process
    quantized = {"path": str(folder), "dtype": "bfloat16", "quantize": "nf4"}
    plan = planned(folder, two, model=quantized, adapter={"r": 4}, stop={"when": "forgotten"})
    assert [o.settings for o in options(plan) if o.plan.fits] == ["stop.when=never model.quantize=none"]


def test_advice_to_share_leaves_out_what_sharded_runs_refuse() -> None:
    plan = planned(CONFIGS / "7b", dataclasses.replace(GPU, memory=80e9), stop={"when": "forgotten"})
    (shared,) = [o for o in options(plan) if o.plan.fits and o.plan.machine.gpus > 1 and "optimizer" not in o.settings]
    assert shared.settings.startswith("stop.when=never --gpus ")
    assert not shared.plan.refused


@pytest.mark.parametrize(
    ("tree", "why", "way"),
    [
        ({"training": {"combine": "projected"}}, "training.combine", "training.combine=sum"),
        ({"training": {"combine": "dual"}}, "training.combine", "training.combine=sum"),
        ({"training": {"compile": True}}, "training.compile", "training.compile=false"),
        (
            {"optimizer": {"name": "sophia", "curvature": {"estimator": "hutchinson", "shuffled": True}}},
            "curvature.estimator hutchinson",
            "optimizer.curvature.estimator=ggn optimizer.curvature.shuffled=false",
        ),
        (
            {"optimizer": {"name": "sophia", "curvature": {"shuffled": True}}},
            "curvature.shuffled",
            "optimizer.curvature.shuffled=false",
        ),
    ],
)
def test_what_several_processes_refuse_the_plan_refuses(folder: Path, tree: dict[str, Any], why: str, way: str) -> None:
    assert planned(folder, **tree).fits
    plan = planned(folder, dataclasses.replace(GPU, gpus=2), **tree)
    assert not plan.fits
    assert why in plan.refused
    assert way in [o.settings for o in options(plan) if o.plan.fits]


def test_a_plan_says_that_it_does_not_know_what_compiling_saves(folder: Path) -> None:
    plan = planned(folder, training={"compile": True})
    assert plan.time == planned(folder).time
    assert "planned as if not compiled" in "\n".join(lines(plan))
    assert "planned as if not compiled" not in "\n".join(lines(planned(folder)))
    assert "one process" in planned(folder, dataclasses.replace(GPU, gpus=2), training={"compile": True}).refused


@pytest.mark.parametrize("optimizer", ["adamw", "sophia", "kfac", "whiten", "muon"])
def test_what_a_rule_keeps_is_what_the_plan_holds(folder: Path, optimizer: str) -> None:
    plan = planned(folder, optimizer=optimizer)
    held = sum(size for name, size in plan.memory.held.items() if name not in ("process", "weights", "reference"))
    assert held == plan.cost.kept
    assert ("a curvature pass" in plan.memory.moments) == plan.recipe.optimizer.needs_curvature


def test_memory_grows_as_it_should(folder: Path) -> None:
    plain = planned(folder).memory
    assert planned(folder, training={"batch_size": 8}).memory.peak > plain.peak
    assert planned(folder, training={"accumulation": 2}).memory.peak > plain.peak
    assert planned(folder, training={"frozen": "embeddings"}).memory.peak < plain.peak
    assert (
        planned(folder, training={"combine": "dual"}).memory.held["optimizer states"]
        == 2 * plain.held["optimizer states"]
    )
    copied = planned(folder, objective={"name": "grad_diff", "retain": "kl"}, training={"reference": "copy"}).memory
    assert copied.held["reference"] == plain.held["weights"]


def test_measuring_a_step_takes_the_weights_before_it_and_the_moves(folder: Path) -> None:
    bounded, free = (planned(folder, training={"trust_kl": budget}) for budget in (0.1, 0.0))
    trained = free.skeleton.gradients
    assert bounded.memory.moments["measuring the step"] == trained + 2 * trained
    assert bounded.memory.moments["the optimizer's step"] == free.memory.moments["the optimizer's step"] + trained
    assert "measuring the step" not in free.memory.moments


def test_checkpointing_keeps_one_block_and_what_enters_each(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config(depth=24)))
    planned = recipe(folder, training={"batch_size": 2})
    plan = make_plan(planned, GPU, find_work(planned, 64))
    option = next(o for o in options(plan) if "gradient_checkpointing" in o.settings)
    hidden = 4 * 64 * 48
    one = saved(planned, 1, 64, 32, bf16=True)
    assert option.plan.kept.per_row == pytest.approx(one.per_row + 24 * hidden, rel=0.01)
    assert option.plan.kept.per_row < plan.kept.per_row / 4
    assert option.plan.time is not None
    assert plan.time is not None
    assert plan.time.parts["backward"] < option.plan.time.parts["backward"]


def test_small_batches_add_up_to_the_same(folder: Path) -> None:
    made = recipe(folder, optimizer="sophia", training={"batch_size": 4, "accumulation": 2})
    small, words = smaller_batches(made)
    again = recipe_from_tree(
        {"objective": "grad_diff", "optimizer": {"name": "sophia", "curvature": {"batch": 2, "micro_batches": 4}}}
        | {"model": {"path": str(folder)}, "training": {"batch_size": 1, "accumulation": 8}}
    )
    assert small == again
    assert "training.accumulation=8" in words


def test_small_batches_leave_curvature_what_it_is_of(folder: Path) -> None:
    made = recipe(folder, optimizer="kfac")
    small, words = smaller_batches(made)
    before, now = made.optimizer.curvature, small.optimizer.curvature  # type: ignore[attr-defined]
    assert (now.batch, now.general_text, now.micro_batches, now.warm_start) == (4, 1, 2, 16)
    assert "curvature.batch=4 optimizer.curvature.general_text=1" in words
    rows, text = ([Encoded((n, i, *range(i % 7)), 1) for i in range(200)] for n in (1, 2))
    looked_at = [
        sorted((pick.row.key, pick.seed) for picks in CurvaturePasses(spec, rows, text).plan(0) for pick in picks)
        for spec in (before, now)
    ]
    assert looked_at[0] == looked_at[1]
    for optimizer in (
        {"name": "kfac", "curvature": {"batch": 7}},  # with two passages
        {"name": "adamw_retain"},  # squares of the gradients of whole batches
        {"name": "soul_release"},  # no passes
    ):
        assert "curvature" not in smaller_batches(recipe(folder, optimizer=optimizer))[1]


def test_time_follows_the_machine(folder: Path) -> None:
    slow = planned(folder, dataclasses.replace(GPU, flops=1e12, exact_flops=1e11, bandwidth=1e11)).time
    fast = planned(folder, dataclasses.replace(GPU, flops=2e12, exact_flops=2e11, bandwidth=2e11)).time
    assert slow
    assert fast
    assert slow.step == pytest.approx(2 * fast.step)
    assert planned(folder, dataclasses.replace(GPU, flops=0.0)).time is None
    every = {"name": "sophia", "curvature": {"interval": 1}}
    often = planned(folder, optimizer=every).time
    seldom = planned(folder, optimizer={**every, "curvature": {"interval": 10}}).time
    assert often
    assert seldom
    assert often.parts["curvature"] == pytest.approx(10 * seldom.parts["curvature"])


# The machine and the command


def test_the_machine_is_this_one_unless_another_is_given(folder: Path) -> None:
    here = find_machine(recipe(folder, model={"path": str(folder), "device": "cpu"}))
    assert here.device == "cpu"
    assert here.measured
    assert min(here.flops, here.bandwidth, here.base, here.memory) > 1e6
    there = find_machine(recipe(folder), memory=80, flops=989, gpus=4)
    assert (there.device, there.memory, there.gpus, there.flops) == ("cuda", 80e9, 4, 989e12)
    with pytest.raises(ValueError, match=r"--gpus is for GPUs"):
        find_machine(recipe(folder, model={"path": str(folder), "device": "cpu"}), gpus=2)
    with pytest.raises(ValueError, match=r"--memory"):
        find_machine(recipe(folder), memory=-1)


def test_the_command_prints_a_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(folder), "--memory", "24", "--flops", "300", "--length", "64", "optimizer=sophia"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for expected in ("8.00 bytes a trained parameter", "a curvature pass", "s a step", "fits"):
        assert expected in text
    words[words.index("24")] = "0.001"
    assert main(words) == 3  # so that a script can tell
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no model"),
        (["--model", "./nowhere"], "no such model folder"),
        (["--model", "FOLDER", "--gpus", "-1"], "--gpus"),
        (["--model", "FOLDER", "method=retrain"], "method"),
        (["--model", "FOLDER", "--length", "5", "--answer", "9"], "--answer"),
    ],
)
def test_bad_input_is_told(folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *(str(folder) if word == "FOLDER" else word for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_the_help_does_not_wait_for_torch() -> None:
    code = "import sys, soul.arguments; soul.arguments.parse(['plan', 'x.yaml']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
