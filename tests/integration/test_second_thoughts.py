"""What may be changed of a run that has begun, and what is found out before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import soul.run
from soul.cli import main
from soul.data.pieces import pieces
from soul.data.templates import ChatTemplate
from soul.recipe import read_recipe
from soul.rundir import changed_files
from soul.types import Example

DATA = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
COMMAND = ["unlearn", *DATA, "--out", "run", "training.max_steps=2"]
QUICK = "evaluation.max_new_tokens=2"


@pytest.fixture
def measured(place, monkeypatch) -> Path:
    """A run that was interrupted after it measured the model before."""

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(soul.run, "train_and_save", stopped)
        assert main([*COMMAND, QUICK]) == 130
    assert {file.name for file in (place / "run/rows").iterdir()} == {"before"}
    return place


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method=retrain"], "give method.base"),
        (["method={name: retrain, base: ./nowhere}"], "no such model folder: ./nowhere"),
        (["optimizer=adamw", "training.trust_kl=0.1", "training.combine=dual"], "makes two"),
        (["objective=rmu", "training.compile=true"], "looks at what a decoder block gives"),
        (["objective=rmu", "training.compile=true", "adapter.r=2"], "looks at what a decoder block gives"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_measured(place, capsys, settings, said):
    assert main([*COMMAND, QUICK, *settings]) == 2
    assert said in capsys.readouterr().err
    assert not (place / "run/rows").exists()


def test_a_rehearsal_leaves_the_model_as_it_was(place):
    plain = [*COMMAND, QUICK, "optimizer=adamw", "adapter.r=2"]
    assert main(plain) == 0
    scores = json.loads((place / "run/scores.json").read_text())
    alone = [
        "evaluate",
        "model",
        "--benchmark",
        "request",
        "--out",
        "alone",
        "forget=forget.jsonl",
        "kept=retain.jsonl",
    ]
    assert main([*alone, QUICK]) == 0
    assert scores["before"] == json.loads((place / "alone/scores.json").read_text())["after"]


def test_who_has_only_measured_may_train_otherwise(measured, capsys):
    assert main([*COMMAND, QUICK, "optimizer=adamw", "training.accumulation=2"]) == 0
    recipe = read_recipe(measured / "run/recipe.yaml")
    assert (recipe.optimizer.name, recipe.training.accumulation) == ("adamw", 2)
    assert main([*COMMAND, QUICK, "optimizer=sophia"]) == 2  # what has trained has not
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["evaluation.max_new_tokens=3", "evaluation.max_length=99"])
def test_rows_are_not_mixed_with_those_of_another_measurement(measured, capsys, setting):
    assert main([*COMMAND, QUICK, setting]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_batches_may_be_smaller_where_memory_was_not_enough(place, monkeypatch, capsys):
    class OutOfMemoryError(RuntimeError):
        """As torch's is called."""

    measure = soul.run.measure_benchmark

    def short(*args, **kwargs):
        if (Path("run") / "model").exists() and kwargs["spec"].generation_batch > 2:
            raise OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return measure(*args, **kwargs)

    monkeypatch.setattr(soul.run, "measure_benchmark", short)
    assert main([*COMMAND, QUICK]) == 2
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "evaluation.generation_batch" in said
    assert "Traceback" not in said
    less = [*COMMAND, QUICK, "evaluation.generation_batch=2", "evaluation.max_tokens=512", "label=again"]
    assert main(less) == 0
    recipe = read_recipe(place / "run/recipe.yaml")
    assert (recipe.evaluation.generation_batch, recipe.label) == (2, "again")
    assert json.loads((place / "run/record.json").read_text())["label"] == "again"
    assert main([*COMMAND, QUICK, "label=late"]) == 2  # a finished run is what it is
    assert main(less) == 0


def test_a_finished_run_vouches_for_its_files(place, capsys):
    assert main([*COMMAND, QUICK]) == 0
    run = place / "run"
    kept = json.loads((run / "record.json").read_text())["files"]
    assert {"recipe.yaml", "scores.json", "rows/before/forget.jsonl", "rows/after/kept.jsonl"} <= kept.keys()
    assert changed_files(run) == []
    scores = json.loads((run / "scores.json").read_text())
    scores["after"][0]["value"] = 0.0
    (run / "scores.json").write_text(json.dumps(scores))
    assert changed_files(run) == ["scores.json"]
    capsys.readouterr()
    assert main(["export", "run", "--out", "exported"]) == 2
    assert "was changed since it was finished (scores.json)" in capsys.readouterr().err
    assert not (place / "exported").exists()


def test_an_export_says_how_its_run_ended(place, capsys):
    assert main([*COMMAND, QUICK, "optimizer.lr=1e-9"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--out", "exported"]) == 0
    assert "the run: Stopped after" in " ".join(capsys.readouterr().out.split())


def test_documents_are_forgotten_whole(place, tokenizer):
    words = " ".join(f"Word{i} of the letter to Mira." for i in range(120))
    (place / "letters.jsonl").write_text(json.dumps({"text": words, "id": "letter", "subject": "Mira"}) + "\n")
    command = ["unlearn", "--model", "model", "--forget", "letters.jsonl", "--retain", "retain.jsonl", "--out", "run"]
    assert main([*command, QUICK, "training.max_steps=1", "training.max_length=128", "--no-evaluate"]) == 0
    record = json.loads((place / "run/record.json").read_text())
    assert not [line for line in record["warnings"] if "training.max_length" in line]
    template = ChatTemplate(tokenizer, 128)
    found = pieces([Example("", words, id="letter", chat=False, subject="Mira")], template)
    assert "".join(e.answer for e in found) == words
    assert len(found) > 3
    assert {e.subject for e in found} == {"Mira"}
    assert [e.id for e in found[:2]] == ["letter:0", "letter:1"]
    rows = [template.encode(e) for e in found]
    assert all(row.lost == 0 for row in rows)
    assert max(map(len, rows)) < 1.3 * min(map(len, rows))
    assert all(words[words.index(e.answer) - 1].isspace() or e.answer[:1].isspace() for e in found[1:])


@pytest.mark.parametrize(
    "example",
    [Example("Who?", "word " * 400), Example("Who is", "word " * 400, chat=False), Example("", "short", chat=False)],
)
def test_answers_and_short_texts_stay_whole(tokenizer, example):
    assert pieces([example], ChatTemplate(tokenizer, 128)) == [example]


def test_a_budget_without_a_rule_is_refused(place, capsys):
    (place / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "model",
                "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
                "optimizer": {"name": "adamw", "lr": 1e-5},
            }
        )
    )
    assert main(["show", "recipe.yaml", "stop.kl_budget=0.02"]) == 2
    assert "set stop.when to forgotten" in " ".join(capsys.readouterr().err.split())
    assert main(["show", "recipe.yaml", "stop.kl_budget=0.02", "stop.when=forgotten"]) == 0
    capsys.readouterr()
    assert main(["show", "recipe.yaml", "optimizer.name=kfac"]) == 2  # AdamW's rate is none of K-FAC's
    assert "write optimizer=kfac" in " ".join(capsys.readouterr().err.split())
    assert main(["show", "recipe.yaml", "optimizer=kfac", "optimizer.lr=1e-3"]) == 0
    assert main(["show", "recipe.yaml", "optimizer.name=adamw"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "a?", "answer": "b", "paraphrase_question": "c?"}', "rename it to paraphrased_question"),
        ('{"question": "a?", "answer": "b", "perturbed_answers": ["c"]}', "rename it to perturbed_answer"),
        ('{"Question": "a?", "Answer": "b"}', "column names are in lower case"),
    ],
)
def test_columns_that_are_nearly_right_are_not_dropped(place, capsys, text, said):
    (place / "forget.jsonl").write_text(text + "\n")
    assert main([*COMMAND, QUICK]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_of_much_that_is_kept_some_is_measured(place):
    lines = (json.dumps({"question": f"Who is {i}?", "answer": f"Number {i}."}) for i in range(30))
    (place / "retain.jsonl").write_text("\n".join(lines))
    benchmark = "benchmark={name: request, forget: forget.jsonl, kept: retain.jsonl, limit: 7, general: '', text: ''}"
    assert main([*COMMAND, QUICK, benchmark]) == 0
    scores = json.loads((place / "run/scores.json").read_text())["after"]
    assert {s["n"] for s in scores if s["split"] == "kept"} == {7}
    assert {s["n"] for s in scores if s["split"] == "forget" and s["metric"] == "probability"} == {8}
