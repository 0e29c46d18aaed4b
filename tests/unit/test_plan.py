"""A plan is compared with what the model's own code does: bytes kept, operations counted, rows tokenised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import GPU, bare_model, recipe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soul.adapters import AdapterSpec, add_adapter
from soul.evaluate import measure as evaluate
from soul.forward import head_on
from soul.models import freeze_embeddings
from soul.plan import find_work, make_plan
from soul.plan.activations import saved
from soul.plan.show import lines
from soul.plan.skeleton import measure
from soul.plan.speed import operations, time_of_run
from soul.plan.work import Batch
from soul.run import default_benchmark
from soul.trainer import make_dataset
from soul.training import TrainingSpec
from soul.types import Example

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"training": {"frozen": "embeddings"}},
    "lora": {"adapter": {"r": 4}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_model(tmp_path)


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
