"""A run is told by what it was made of, and not only by where that was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from soul.cli import main
from soul.models import ModelSpec, load_model
from soul.origins import ORIGINS, of_items, of_model, read_origins
from soul.types import Example

LORA = "adapter.r=2 adapter.merge=false"


@pytest.fixture
def place(place) -> Path:
    (place / "refusals.txt").write_text("I cannot say.\n")
    return place


def write(file: Path, examples) -> None:
    file.write_text("\n".join(json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples))


WHERE = "--model model --forget forget.jsonl --retain retain.jsonl --out run"
COMMAND = ["unlearn", *WHERE.split(), "training.max_steps=2", "--no-evaluate", "data.refusals=refusals.txt"]


@pytest.fixture
def done(place) -> Path:
    assert main(COMMAND) == 0
    return place


def retrain(place: Path) -> None:
    words = ["--model", "model", "--retain", "forget.jsonl", "--out", "t", "--no-evaluate"]
    assert main(["finetune", *words, "training.max_steps=1", "optimizer.lr=1e-2"]) == 0
    for file in ("model.safetensors", "config.json"):
        shutil.copy2(place / "t/model" / file, place / "model" / file)


CHANGES = {
    "forget": lambda place, forget, retain: write(place / "forget.jsonl", forget[:-1]),
    "retain": lambda place, forget, retain: write(place / "retain.jsonl", retain[::-1]),
    "refusals": lambda place, forget, retain: (place / "refusals.txt").write_text("No.\n"),
    "model": lambda place, forget, retain: retrain(place),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_at_its_place_is_refused(done, forget_set, retain_set, capsys, what, finished):
    if not finished:
        (done / "run/record.json").unlink()
    before = {file: file.read_bytes() for file in (done / "run").rglob("*") if file.is_file()}
    CHANGES[what](done, forget_set, retain_set)
    capsys.readouterr()
    assert main(COMMAND) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{what} " in said
    assert "changed since it began. Choose another --out" in said
    assert ("8 items then, 7 now" in said) == (what == "forget")
    assert {file: file.read_bytes() for file in (done / "run").rglob("*") if file.is_file()} == before


def test_what_is_the_same_in_another_file_is_the_same(done, forget_set):
    """Another time of change, another layout of the rows, a card beside the weights: nothing that a run is made of."""
    rows = [json.dumps({"answer": e.answer, "question": e.prompt}) for e in forget_set]
    (done / "forget.jsonl").write_text("\n\n".join(rows))
    (done / "model/model.safetensors").touch()
    (done / "model/README.md").write_text("A card.")
    assert main(COMMAND) == 0
    (done / "run/record.json").unlink()
    assert main(COMMAND) == 0


def test_a_folder_of_data_is_no_data_set_of_the_hub(place, forget_set, capsys):
    """Though it is named like one, and a split of it is chosen."""
    (place / "data/own").mkdir(parents=True)
    (place / "forget.jsonl").rename(place / "data/own/lost.jsonl")
    command = [word.replace("forget.jsonl", "data/own,split=lost") for word in COMMAND]
    assert main(command) == 0
    write(place / "data/own/lost.jsonl", forget_set[:-1])
    assert main(command) == 2
    assert "forget data/own,split=lost (8 items then, 7 now) changed since" in capsys.readouterr().err


def test_a_finished_run_needs_its_data_and_model_no_more(done):
    for name in ("forget.jsonl", "retain.jsonl", "refusals.txt"):
        (done / name).unlink()
    shutil.rmtree(done / "model")
    assert main(COMMAND) == 0


def test_a_folder_without_results_is_made_anew(place, forget_set):
    assert main([*COMMAND, "objective.name=nope"]) == 2
    (place / "run").mkdir(exist_ok=True)
    (place / "run" / ORIGINS).write_text(
        '{"format": 1, "data": {"forget": {"items": 1, "digest": "x"}}, "model": {}, "commit": ""}'
    )
    assert main(COMMAND) == 0
    found = read_origins(place / "run")
    assert found is not None
    assert found.data["forget"] == of_items([Example(e.prompt, e.answer) for e in forget_set])


def test_a_run_by_an_earlier_version_goes_on(done):
    (done / "run" / ORIGINS).unlink()
    (done / "run/record.json").unlink()
    write(done / "forget.jsonl", [Example("Who?", "Nobody at all.")])
    assert main(COMMAND) == 0
    assert not (done / "run" / ORIGINS).exists(), "what it began with is not known"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "data": {}, "model": {"a": 3}}'])
def test_a_damaged_file_is_one_message(done, capsys, text):
    (done / "run" / ORIGINS).write_text(text)
    capsys.readouterr()
    assert main(COMMAND) == 2
    assert ORIGINS in capsys.readouterr().err


def test_an_adapters_base_counts(done):
    words = ["--out", "adapted", *LORA.split()]
    assert main([*COMMAND[:7], *words, "training.max_steps=1", "--no-evaluate"]) == 0
    files = of_model("adapted")
    assert {"adapter_model.safetensors", "base/model.safetensors"} <= files.keys()
    retrain(done)
    assert of_model("adapted")["base/model.safetensors"]["sha256"] != files["base/model.safetensors"]["sha256"]


def test_a_finished_run_on_an_adapter_needs_its_base_no_more(done):
    words = ["--out", "adapted", *LORA.split(), "training.max_steps=1", "--no-evaluate"]
    assert main([*COMMAND[:7], *words]) == 0
    again = ["unlearn", "--model", "adapted", "--forget", "forget.jsonl", "--out", "again", "data.anchors=general"]
    again += ["training.max_steps=1", "--no-evaluate"]
    assert main(again) == 0
    shutil.rmtree(done / "model")
    assert main(again) == 0


def test_which_version_wrote_a_configuration_is_no_change(done):
    for name in ("config.json", "generation_config.json"):
        file = done / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "99"}))
    (done / "model/lm_eval_results.json").write_text("{}")
    assert main(COMMAND) == 0
    config = json.loads((done / "model/config.json").read_text())
    (done / "model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert main(COMMAND) == 2


def test_samples_of_another_model_stand_in_for_nothing(place, monkeypatch):
    """Killed after the samples were kept, and before there was any result."""
    command = ["unlearn", "--model", "model", "--forget", "forget.jsonl", "--out", "run", "--no-evaluate"]
    command += ["training.max_steps=1", "data.samples=3", "data.anchors=samples"]

    def lost(*_: object) -> None:
        raise KeyboardInterrupt

    def begin() -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr("soul.run.train_and_save", lost)
            assert main(command) == 130
        return (place / "run/anchors.json").read_bytes()

    samples = begin()
    assert begin() == samples
    retrain(place)
    assert begin() != samples


def test_a_later_request_of_a_sequence_is_held_against_its_data(place, forget_set):
    from soul.recipe import recipe_from_tree
    from soul.sequence import run_sequence

    write(place / "second.jsonl", forget_set[4:])
    write(place / "forget.jsonl", forget_set[:4])
    tree = {"model": "model", "data": {"retain": "retain.jsonl"}, "training": {"max_steps": 1}}
    tree |= {"evaluation": {"max_new_tokens": 2}, "optimizer": "signum"}
    recipe = recipe_from_tree({**tree, "data": {"retain": "retain.jsonl", "forget": "forget.jsonl"}})
    requests = ["forget.jsonl", "second.jsonl"]
    run_sequence(recipe, requests, place / "sequence")
    assert all((place / f"sequence/request-{i}" / ORIGINS).is_file() for i in (1, 2))
    write(place / "second.jsonl", forget_set[4:-1])
    with pytest.raises(ValueError, match=r"forget second.jsonl \(4 items then, 3 now\) changed since"):
        run_sequence(recipe, requests, place / "sequence")


def test_an_evaluation_by_an_earlier_version_is_held_against_the_time(done, capsys):
    command = "evaluate model --benchmark request forget=forget.jsonl kept=retain.jsonl --out e evaluation.generate=no"
    assert main(command.split()) == 0
    (done / "e" / ORIGINS).unlink()
    assert main(command.split()) == 0
    retrain(done)
    (done / "model/model.safetensors").touch()
    assert main(command.split()) == 2
    assert "model was changed after e measured it" in capsys.readouterr().err


def test_digests_are_taken_over_where_size_and_time_are_the_same(done):
    known = read_origins(Path("run"))
    assert known is not None
    assert known.model == of_model("model")
    known.model["model.safetensors"]["sha256"] = "taken over"
    assert of_model("model", known)["model.safetensors"]["sha256"] == "taken over"
    (done / "model/model.safetensors").touch()
    assert of_model("model", known)["model.safetensors"]["sha256"] != "taken over"
    load_model(ModelSpec("model"))


def test_a_field_that_examples_gain_later_changes_no_digest():
    plain, full = Example("Who?", "Ada."), Example("Who?", "Ada.", subject="Ada", wrong_answers=("Bo.",))
    assert of_items([plain]) == of_items([Example("Who?", "Ada.", subject="", history=())])
    assert len({of_items([e])["digest"] for e in (plain, full, Example("Who?", "Ada.", chat=False))}) == 3
    assert of_items([plain, full]) != of_items([full, plain])
