"""`soul evaluate` on a tiny model: several benchmarks, what is left out, precisions, and what may be published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soul.cli import main
from soul.report import read_run

QUICK = " evaluation.max_new_tokens=4"
TOFU = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
PAIR = "--benchmark request,tofu request.general= request.text= tofu.forget=forget01 --data data"


@pytest.fixture
def place(tmp_path, make_model, tokenizer, forget_set, retain_set, monkeypatch) -> Path:
    """A model, and a folder of data that holds a request and TOFU but nothing else."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data/tofu").mkdir(parents=True)
    wrong = {"perturbed_answer": ["No.", "Yes."], "paraphrased_answer": "Indeed."}
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer, **wrong}) for e in examples]
        (tmp_path / f"data/{name}.jsonl").write_text("\n".join(lines))
    for name in TOFU:
        source = tmp_path / f"data/{'forget' if name.startswith('forget') else 'retain'}.jsonl"
        (tmp_path / f"data/tofu/{name}.json").write_text(source.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("soul.data.hub.reachable", lambda: False)
    return tmp_path


def run(command: str) -> None:
    assert main(command.split()) == 0


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text())


def values(folder: Path, when: str = "after") -> dict[tuple[str, str], float]:
    return {(s["split"], s["metric"]): s["value"] for s in record(folder)[when]}


def test_a_record_says_what_was_measured(place):
    run(f"evaluate model --benchmark request --data data general= text= --out e {QUICK}")
    found = record(place / "e")
    assert (found["format"], found["benchmark"], found["version"]) == (2, "request", 3)
    assert found["settings"]["forget"] == "data/forget.jsonl", "--data stands in for a source that is not given"
    assert found["environment"]["torch"]
    assert found["left_out"] == {}
    cut = [note for note in read_run(place / "e").warnings if note.startswith(("forget: ", "kept: "))]
    assert len(cut) == 2, "four tokens are fewer than most answers have"
    assert len(read_run(place / "e").after) == len(found["after"]) > 0


def test_several_benchmarks_leave_a_record_each_and_continue(place, capsys):
    run(f"evaluate model {PAIR} --out e {QUICK}")
    printed = " ".join(capsys.readouterr().out.split())
    assert "e/request/report.html" in printed
    assert "e/tofu/report.html" in printed
    # a folder of data without the holdout set has no membership inference, and says so
    assert "membership" in record(place / "e/tofu")["left_out"]
    assert any("membership" in note for note in read_run(place / "e/tofu").warnings)
    alone = f"evaluate model --benchmark tofu forget=forget01 --data data --out alone {QUICK}"
    run(alone)
    assert values(place / "alone") == values(place / "e/tofu")
    kept = (place / "e/tofu/rows/after/retain.jsonl").stat().st_mtime_ns
    (place / "e/request/rows/after/forget.jsonl").unlink()
    run(f"evaluate model {PAIR} --out e {QUICK}")
    assert (place / "e/tofu/rows/after/retain.jsonl").stat().st_mtime_ns == kept
    assert (place / "e/request/rows/after/forget.jsonl").is_file()


def test_rows_of_an_earlier_definition_are_not_taken_up(place, capsys, monkeypatch):
    command = f"evaluate model --benchmark request --data data general= text= --out e {QUICK}"
    run(command)
    monkeypatch.setattr("soul.benchmarks.request.DeletionRequest.version", 99)
    assert main(command.split()) == 2
    assert "another version than request 99" in " ".join(capsys.readouterr().err.split())


def test_all_measures_what_there_is_and_says_why_not_the_rest(place, capsys):
    run(f"evaluate model --benchmark all --data data tofu.forget=forget01 custom.samples=1 --out e {QUICK}")
    printed = " ".join(capsys.readouterr().out.split())
    done = {folder.name for folder in (place / "e").iterdir() if (folder / "record.json").is_file()}
    assert {"custom", "request", "tofu"} <= done
    for name in ("copyright", "lm_eval"):
        assert f"left out: {name} (" in printed
        assert name not in done
    assert "reached" in printed.partition("left out: lm_eval (")[2] or "not installed" in printed


def test_all_goes_on_where_one_benchmark_fails_and_one_by_name_does_not(place, capsys, monkeypatch):
    from soul.benchmarks.tofu import Tofu

    def fail(*_):
        raise ValueError("the judge is out")

    monkeypatch.setattr(Tofu, "score", fail)
    settings = "tofu.forget=forget01 custom.samples=0 evaluation.generate=false"
    run(f"evaluate model --benchmark all --data data {settings} --out e")
    assert "left out: tofu (the judge is out)" in " ".join(capsys.readouterr().out.split())
    assert (place / "e/request/record.json").is_file()
    assert not (place / "e/tofu/record.json").is_file()
    assert main(["evaluate", "model", "--benchmark", "tofu", "forget=forget01", "--data", "data", "--out", "f"]) == 2
    assert "the judge is out" in capsys.readouterr().err


def test_a_retained_model_is_the_reference_of_each(place, capsys):
    run(f"evaluate model {PAIR} --out retained {QUICK}")
    run(f"evaluate model {PAIR} --out e --reference retained {QUICK}")
    assert values(place / "e/tofu")["forget", "forget_quality"] == 1, "the same model on both sides"
    assert values(place / "e/request")["forget", "forget_quality"] == 1
    run(f"evaluate model --benchmark tofu forget=forget01 --data data --out alone --reference retained {QUICK}")
    assert values(place / "alone")["forget", "forget_quality"] == 1
    assert main(f"evaluate model {PAIR} --out f --reference retained/tofu {QUICK}".split()) == 2
    assert "one evaluation" in capsys.readouterr().err


def test_bf16_is_shown_beside_fp32(place, capsys):
    command = f"evaluate model --benchmark request --data data general= text= {QUICK}"
    run(command + " --out plain")
    capsys.readouterr()
    run(command + " --out e --precision bfloat16")
    printed = capsys.readouterr().out
    assert "difference" in printed
    assert values(place / "e") == values(place / "plain"), "what is published stays fp32"
    run(command + " --out coarse model.dtype=bfloat16")
    assert values(place / "e", "bfloat16") == values(place / "coarse")
    assert values(place / "e", "bfloat16") != values(place / "e")


def test_what_is_published_holds_no_word_of_a_private_request(place):
    facts = [("Where was Mira Vale born?", "In Accra, Ghana."), ("What does Mira Vale teach?", "Harmony and fugue.")]
    lines = [json.dumps({"question": q, "answer": a, "subject": "Mira Vale", "id": f"Vale {q}"}) for q, a in facts]
    (place / "data/forget.jsonl").write_text("\n".join(lines))
    (place / "model").rename(place / "Vale")
    run(f"evaluate Vale --benchmark custom --data data samples=2 general= text= retain= --publish --out e {QUICK}")
    public = "".join(f.read_text() for f in (place / "e/public").rglob("*") if f.is_file())
    own = "".join(f.read_text() for f in place.glob("e/**/*.jsonl") if "public" not in f.parts)
    for word in ("Vale", "Accra", "fugue"):
        assert word in own
        assert word not in public
    assert "sha256" not in public, "whoever guesses a date finds its digest"
    assert values(place / "e/public") == values(place / "e")
    rows = read_run(place / "e/public").rows_after["forget"]
    assert [len(row.get("samples", ())) for row in rows] == [2, 2]
    assert [(row["id"], row["subject"], row["answer"]) for row in rows] == [(i, "1", "(private)") for i in "12"]
    assert read_run(place / "e/public").label == "(not shown)"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--benchmark tofu,request limit=3 --data data", "tofu.limit=3"),
        ("--benchmark tofu --data nowhere", "no folder 'nowhere'"),
        ("--benchmark custom", "forget=FILE"),
        ("--benchmark request", "needs forget=..., kept=..."),
        ("--benchmark all custom.sampels=1 --data data", "Did you mean 'samples'?"),
        ("--benchmark lm_eval tasks=wmdp --data data", "no copy of wmdp_bio"),
        ("--benchmark tofuu", "Did you mean 'tofu'?"),
        ("--benchmark tofu forget=forget01 --data data --precision int4", "must be bfloat16"),
        ("--benchmark tofu forget=forget01 --data data --precision bfloat16 model.dtype=bfloat16", "leave one"),
        ("--benchmark tofu,request tofu.forget=forget01 --data data --reference gone", "'gone' has no rows/after"),
    ],
)
def test_bad_input_is_one_message(place, command, said, capsys):
    assert main(f"evaluate model {command} --out e".split()) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error


def test_scores_of_an_earlier_version_still_open(place, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "record.json").write_text('{"format": 1, "label": "old"}')
    (folder / "scores.json").write_text('{"after": [{"metric": "probability", "split": "forget", "value": 0.5}]}')
    assert read_run(folder).after[0].value == 0.5
    (folder / "scores.json").write_text('{"format": 3, "after": []}')
    with pytest.raises(ValueError, match="newer version"):
        read_run(folder)
