"""A plan is compared with what the model's own code does: bytes kept, operations counted, rows tokenised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soul.adapters import AdapterSpec, add_adapter
from soul.cli import main
from soul.curvature.passes import CurvaturePasses
from soul.data.templates import Encoded
from soul.evaluate import measure as evaluate
from soul.forward import head_on
from soul.models import freeze_embeddings
from soul.plan import Machine, Plan, find_machine, find_work, make_plan
from soul.plan.activations import saved
from soul.plan.advice import options, smaller_batches
from soul.plan.show import lines
from soul.plan.skeleton import measure
from soul.plan.speed import operations, time_of_run
from soul.plan.work import Batch
from soul.recipe import Recipe, recipe_from_tree
from soul.run import default_benchmark
from soul.trainer import make_dataset
from soul.training import TrainingSpec
from soul.types import Example

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
GPU = Machine("cuda", 141e9, 989e12, 60e12, 3.3e12, int(0.6e9))
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"training": {"frozen": "embeddings"}},
    "lora": {"adapter": {"r": 4}},
}


def config(depth: int = 3, **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 340, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": depth}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder that holds no weights: whatever is planned from it, nothing was loaded."""
    (tmp_path / "config.json").write_text(json.dumps(config()))
    return tmp_path


def recipe(path: Path, **tree: Any) -> Recipe:
    return recipe_from_tree({"objective": "grad_diff", "optimizer": "adamw", "model": {"path": str(path)}, **tree})


def real(path: Path, way: str) -> Any:
    """Return the model itself, with numbers, ready to train as the recipe says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).train()
    if way == "lora":
        model = add_adapter(model, AdapterSpec(r=4))
    if way == "frozen":
        freeze_embeddings(model)
    return model


def run(model: Any, rows: int, width: int, answers: int, *, bf16: bool = False) -> torch.Tensor:
    """Run the model on rows whose last tokens are answers, as training does."""
    keep = torch.zeros(rows, width, dtype=torch.bool)
    keep[:, -answers:] = True
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    ids = torch.arange(rows * width).view(rows, width) % 340
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0  # real batches are padded, and attention then takes another way
    with autocast, head_on(model, keep):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float(), ids[keep], reduction="none")


def keeps(model: Any, *batch: int, bf16: bool) -> int:
    """Return the bytes that autograd keeps of a real pass, parameters left out."""
    found: dict[int, torch.UntypedStorage] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run(model, *batch, bf16=bf16)
    return sum(storage.nbytes() for at, storage in found.items() if at not in own)


# Sizes


@pytest.mark.parametrize("way", WAYS)
def test_parameters_are_those_of_the_model(folder: Path, way: str) -> None:
    skeleton, model = measure(recipe(folder, **WAYS[way])), real(folder, way)
    params = list(model.parameters())
    assert skeleton.total == sum(p.numel() for p in params)
    assert skeleton.trainable == sum(p.numel() for p in params if p.requires_grad)
    assert skeleton.weights == sum(t.numel() * t.itemsize for t in (*params, *model.buffers()))
    assert skeleton.gradients == 4 * skeleton.trainable


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_those_the_model_keeps(folder: Path, way: str, bf16: bool) -> None:
    """Found from one and two blocks and rows without numbers, for three blocks and five rows with them."""
    rows, width, answers = 5, 24, 9
    found = saved(recipe(folder, **WAYS[way]), 3, width, answers, bf16=bf16)
    assert not found.estimated
    assert found.constant + found.of(rows) == pytest.approx(
        keeps(real(folder, way), rows, width, answers, bf16=bf16), rel=0.03
    )


def test_activations_have_a_formula_where_code_looks_at_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = saved(recipe(folder), 3, 24, 9, bf16=True)

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("a number, please")

    monkeypatch.setattr("soul.plan.activations._kept", stop)
    rough = saved(recipe(folder), 3, 24, 9, bf16=True)
    assert rough.estimated
    assert rough.per_row == pytest.approx(exact.per_row, rel=0.4)
    assert rough.constant == pytest.approx(exact.constant, rel=0.2)


@pytest.mark.parametrize("way", WAYS)
def test_operations_are_those_a_counter_counts(folder: Path, way: str) -> None:
    model, rows, width, answers = real(folder, way), 4, 24, 9
    skeleton = measure(recipe(folder, **WAYS[way]))
    skeleton = dataclasses.replace(skeleton, attention=0)  # which the counter does not see on every processor
    batch = Batch(rows, width, rows * answers)
    with FlopCounterMode(display=False) as forward:
        loss = run(model, rows, width, answers).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    def products(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts()["Global"]
        return sum(n for name, n in counts.items() if "attention" not in str(name) and "bmm" not in str(name))

    assert operations(skeleton, batch, backward=False) == pytest.approx(products(forward), rel=0.01)
    both = products(forward) + products(backward)
    assert operations(skeleton, batch) == pytest.approx(
        both, rel=0.05
    )  # the first block needs no gradient of its input


# Work


def test_rows_are_counted_where_data_are_here(
    tmp_path: Path, tokenizer: Any, forget_set: Any, retain_set: Any, folder: Path
) -> None:
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    tokenizer.save_pretrained(folder)
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    planned = recipe(folder, data=data, training={"batch_size": 2})
    work = find_work(planned)
    dataset = make_dataset(tokenizer, forget_set, retain_set, planned.objective, planned.training)
    longest = max(len(row) for rows in dataset.encoded.values() for row in rows)
    assert work.typical.rows == 4
    assert work.largest.width == longest
    assert work.items == len(forget_set)
    answers = [row.answer_length for row in dataset.encoded["forget"]]
    assert sum(answers) / len(answers) * 2 < work.typical.answers < 4 * max(answers) + 40


def test_the_longest_texts_are_found_where_only_a_sample_is_tokenised(
    tmp_path: Path, tokenizer: Any, folder: Path
) -> None:
    rows = [
        {"question": f"Who is {i}?", "answer": "A poet." if i != 777 else "A poet of many words. " * 9}
        for i in range(1000)
    ]
    (tmp_path / "retain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "forget.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Ada."}))
    tokenizer.save_pretrained(folder)
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    work = find_work(recipe(folder, data=data, training={"batch_size": 1}))
    planned = recipe(folder).objective, TrainingSpec()
    longest = make_dataset(
        tokenizer, [Example("Who?", "Ada.")], [Example("Who is 777?", rows[777]["answer"])], *planned
    )
    assert work.largest.width == len(longest.encoded["retain"][0])
    assert work.typical.width < work.largest.width / 2


@pytest.fixture
def data(tmp_path: Path, folder: Path, tokenizer: Any, forget_set: Any, retain_set: Any) -> dict[str, str]:
    """Both sets in files, and a tokenizer beside the model's configuration."""
    tokenizer.save_pretrained(folder)
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No.", "Yes."]} for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}


@pytest.mark.parametrize(
    ("tree", "rows"),
    [
        ({"training": {"max_steps": 2, "accumulation": 4}}, 3),  # an epoch is a single short window, and a step
        ({"training": {"epochs": 2}, "stop": {"when": "forgotten", "steps": 5}}, 5),
        ({"training": {"epochs": 2}}, 2),
    ],
)
def test_the_reference_is_asked_of_the_epochs_that_the_trainer_asks_it(
    folder: Path, data: dict[str, str], tree: dict[str, Any], rows: int
) -> None:
    one = data | {"forget": data["forget"] + ",limit=1"}
    training = {"batch_size": 1, **tree["training"]}
    objective = {"name": "grad_diff", "retain": "kl"}
    work = find_work(recipe(folder, data=one, objective=objective, **(tree | {"training": training})))
    assert work.reference
    assert work.reference.rows == rows


def test_what_an_evaluation_asks_is_counted(
    folder: Path, data: dict[str, str], make_model: Any, tokenizer: Any
) -> None:
    made = recipe(folder, data=data, evaluation={"max_new_tokens": 2})
    asked = find_work(made).measured
    benchmark = default_benchmark(made)
    assert benchmark
    assert asked
    measured = evaluate(benchmark, make_model(), tokenizer, spec=made.evaluation).values()
    found = [row for rows in measured for row in rows]
    assert asked.answers == sum("generated" in row for row in found)
    assert asked.likelihoods == sum(1 + ("paraphrased_nll" in row) + len(row.get("wrong_nll", ())) for row in found)
    said = f"{asked.answers} answers of up to 2 tokens and {asked.likelihoods} likelihoods before training"
    assert said in "\n".join(lines(make_plan(made, GPU, find_work(made))))


def test_nothing_is_fetched_to_count_what_an_evaluation_asks(folder: Path, data: dict[str, str]) -> None:
    away = {"name": "request", "forget": data["forget"], "kept": "owner/data"}
    for tree in ({"benchmark": "tofu"}, {"benchmark": away}, {"method": "retrain", "data": {}}):
        made = recipe(folder, **({"data": data} | tree))
        assert find_work(made).measured is None
    work = find_work(recipe(folder, data=data, evaluation={"generate": False}))
    assert work.measured
    assert work.measured.answers == 0


def test_rows_that_are_cut_are_told_before_training(
    folder: Path, data: dict[str, str], tmp_path: Path, tokenizer: Any, forget_set: Any, retain_set: Any
) -> None:
    made = recipe(folder, data=data, training={"max_length": 40})
    found = make_dataset(tokenizer, forget_set, retain_set, made.objective, made.training).encoded
    forget, retain = (sum(row.lost > 0 for row in found[name]) for name in ("forget", "retain"))
    assert min(forget, retain) > 0
    text = "\n".join(lines(make_plan(made, GPU, find_work(made))))
    assert text.count("longer than training.max_length") == 1
    assert f"warning     {forget} of 8 forget items and {retain} of 10 retain items are longer" in text
    assert not find_work(recipe(folder, data=data)).cut
    many = [
        {"question": f"Who is {i}?", "answer": "A poet of many words. " * (9 if i == 777 else 1)} for i in range(999)
    ]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, many)))
    made = recipe(folder, data=data | {"retain": str(tmp_path / "many.jsonl")}, training={"max_length": 100})
    assert find_work(made).cut.startswith("at least 1 of 999 retain items are longer")


def test_a_pass_that_leaves_no_gradients_is_planned_without(folder: Path) -> None:
    plans = {}
    for name in ("kfac", "ekfac", "whiten"):
        planned = recipe(folder, optimizer=name, training={"batch_size": 1})
        plans[name] = make_plan(planned, GPU, find_work(planned, 32))
    assert [plans[name].cost.gradients for name in plans] == [False, True, False]
    lean = plans["kfac"]
    dear = dataclasses.replace(lean.cost, gradients=True)
    kept = (lean.kept, lean.passes)
    again = time_of_run(lean.recipe, lean.skeleton, dear, lean.work, kept, GPU)
    assert lean.time.before < again.before


def test_two_states_are_held_and_fed_twice(folder: Path) -> None:
    plans = []
    for combine in ("projected", "dual"):
        planned = recipe(folder, optimizer="kfac", training={"combine": combine, "batch_size": 1})
        plans.append(make_plan(planned, GPU, find_work(planned, 32)))
    one, two = plans
    for name in ("optimizer states", "Kronecker factors, and what divides by them"):
        assert two.memory.held[name] == 2 * one.memory.held[name]
    assert two.memory.moments["a curvature pass"] > one.memory.moments["a curvature pass"]
    assert two.time.before > one.time.before


def test_lengths_come_from_settings_where_data_are_not_here(folder: Path) -> None:
    away = {"forget": "owner/data", "retain": "owner/more"}
    work = find_work(recipe(folder, data=away, training={"max_length": 300, "batch_size": 3}))
    assert work.largest == Batch(6, 300, 6 * 150)
    assert find_work(recipe(folder, data=away), length=80, answer=20).largest.answers == 8 * 20
    with pytest.raises(ValueError, match="answers no longer than rows"):
        find_work(recipe(folder), length=10, answer=20)


# Plans


def planned(path: Path, machine: Machine = GPU, length: int = 256, answer: int = 64, **tree: Any) -> Plan:
    made = recipe(path, **tree)
    return make_plan(made, machine, find_work(made, length, answer))


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


def test_70b_is_sharded() -> None:
    plan = planned(CONFIGS / "70b", dataclasses.replace(GPU, gpus=8))
    assert not plan.fits
    found = [o for o in options(plan) if o.plan.fits and "--gpus" in o.settings]
    assert found
    assert found[0].plan.machine.gpus in (16, 32)


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
    plan = planned(CONFIGS / "7b", dataclasses.replace(GPU, memory=24e9), stop={"when": "forgotten"})
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
