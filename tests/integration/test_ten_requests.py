"""The experiment of ten requests, on a tiny model: the plain command, a line of record each, and it goes on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def experiment(tmp_path, make_model, tokenizer, forget_set, retain_set, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    made = importlib.import_module("ten_requests")
    make_model().save_pretrained(made.TAUGHT)
    tokenizer.save_pretrained(made.TAUGHT)
    data = tmp_path / "runs/first-run/data/taught.jsonl"
    data.parent.mkdir(parents=True)
    asked = [*forget_set, *retain_set][:16]
    data.write_text("".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in asked))
    monkeypatch.setattr(made, "QUESTIONS", 4)
    monkeypatch.setattr(made, "ASKED", 1)
    monkeypatch.setattr(made, "REQUESTS", ((0,), (1, 3)))
    monkeypatch.setattr(sys, "argv", ["ten_requests.py", "--results", str(tmp_path)])
    return made


def test_each_request_is_served_once_and_recorded(experiment, tmp_path, capsys):
    assert experiment.main() == 0
    text = (tmp_path / "ten-requests.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["request"] for line in lines] == ["authors-0", "authors-1-3"]
    assert [line["after"]["forget"]["n"] for line in lines] == [4, 8]
    assert [line["after"]["kept"]["n"] for line in lines] == [3, 2]
    for line in lines:
        assert line["stopped"]["why"] == "forgotten"  # noise knows nothing
        assert line["looks"][-1]["step"] == line["stopped"]["step"]
        assert line["before"]["forget"]["probability"] != line["after"]["forget"]["probability"]
        assert "=" not in line["command"], "nothing is set"
    page = tmp_path / "ten-requests.md"
    assert "Forgotten within the budget: 2 of 2" in page.read_text()
    assert not list((tmp_path / "runs/ten-requests").rglob("*.safetensors"))
    page.write_text(page.read_text().replace("# Ten requests\n", "# Ten requests\n\nWhat I think.\n"))
    (tmp_path / "ten-requests.jsonl").write_text(
        text.splitlines()[0] + "\n"
    )  # as if it had been killed after the first
    (tmp_path / "runs/ten-requests/authors-1-3/record.json").unlink()
    capsys.readouterr()
    assert experiment.main() == 0
    again = [json.loads(line) for line in (tmp_path / "ten-requests.jsonl").read_text().splitlines()]
    assert [line["request"] for line in again] == ["authors-0", "authors-1-3"]
    assert "What I think." in page.read_text()
    assert page.read_text().count("| authors-1-3 |") == 1
