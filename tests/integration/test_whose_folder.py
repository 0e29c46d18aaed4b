"""Folders and files that are somebody's own stay as they are, and are taken for nothing that they are not."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest

from soul.cli import main
from soul.stopping import Stopping

WORDS = "--model model --forget forget.jsonl --retain retain.jsonl "
QUICK = "optimizer=adamw training.max_steps=1 evaluation.generate=false stop.when=never "
RECIPE = "# my own words\nmodel: model\ndata: {forget: forget.jsonl, retain: retain.jsonl}\noptimizer: adamw\n"


def run(line: str) -> None:
    assert main(line.split()) == 0


def refused(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert main(line.split()) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_recipe_of_ones_own_makes_no_run_of_its_folder(place, capsys):
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "checkpoints").mkdir()
    (place / "checkpoints/mine.txt").write_text("mine")
    refused(capsys, f"unlearn recipe.yaml --out . {QUICK}", "holds a recipe.yaml that no run wrote")
    shutil.rmtree(place / "checkpoints")
    refused(capsys, f"unlearn recipe.yaml --out . {QUICK}", "holds a recipe.yaml that no run wrote")
    assert (place / "recipe.yaml").read_text() == RECIPE


def test_a_models_own_folder_takes_no_run(place, capsys):
    refused(capsys, f"unlearn {WORDS} --out model {QUICK}", "is a model's folder (it holds config.json")
    assert not (place / "model/model").exists()


def test_a_folder_beside_an_export_is_nobodys_to_clear_away(place):
    run(f"unlearn {WORDS} --out a {QUICK}")
    (place / "film.part").mkdir()
    (place / "film.part/mine.txt").write_text("mine")
    run("export a --out film")
    assert (place / "film.part/mine.txt").read_text() == "mine"
    assert not [f.name for f in place.iterdir() if f.name.startswith(".film")]


def test_a_run_that_is_measured_later_is_not_finished_before(place, monkeypatch):
    line = f"unlearn {WORDS} --out a {QUICK}"
    run(f"{line} --no-evaluate")
    from soul import run as running

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_record", killed)
        assert main(line.split()) == 130
    assert (place / "a/scores.json").is_file()
    assert not (place / "a/record.json").exists()
    run(line)
    assert "scores.json" in json.loads((place / "a/record.json").read_text())["files"]


def test_a_verdict_on_merged_weights_is_not_lost_by_a_kill(place, monkeypatch):
    """The adapter alone is kept; what a kill leaves before its merged weights are judged is no model."""
    again, seen = Stopping.measure_again, []

    def look(rule: Stopping, model: Any) -> None:
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt
        again(rule, model)

    monkeypatch.setattr(Stopping, "measure_again", look)
    line = f"unlearn {WORDS} --out a --no-evaluate optimizer=adamw adapter.r=2 adapter.merge=false "
    line += "model.dtype=bfloat16 training.max_steps=2 stop.when=forgotten"
    assert main(line.split()) == 130
    assert not (place / "a/model").exists()
    assert main(line.split()) in (0, 3)
    assert len(seen) == 2
    assert (place / "a/model/adapter_config.json").is_file()
    assert not [f.name for f in (place / "a").iterdir() if "unjudged" in f.name]


def test_nothing_is_kept_of_curvature_of_what_is_forgotten(place):
    def kept(source: str) -> bool:
        shutil.rmtree(place / "cache", ignore_errors=True)
        more = f"optimizer=kfac training.max_steps=1 stop.when=never optimizer.curvature.source={source}"
        run(f"unlearn {WORDS} --out {source.replace('+', '-')} --no-evaluate {more}")
        return any((place / "cache/curvature").rglob("*.safetensors"))

    assert kept("retain")
    assert not kept("forget")
    assert not kept("retain+forget")


def test_reading_a_recipe_runs_no_code(place, monkeypatch, capsys):
    (place / "evilopt.py").write_text("open('ran', 'w').close()\nfrom torch.optim import SGD as O\n")
    (place / "recipe.yaml").write_text(RECIPE.replace("adamw", "{name: external, path: evilopt.O}"))
    monkeypatch.syspath_prepend(place)
    run("show recipe.yaml")
    assert not (place / "ran").exists()
    run("unlearn recipe.yaml --out a --no-evaluate training.max_steps=1 stop.when=never")
    assert (place / "ran").exists()
    (place / "recipe.yaml").write_text(RECIPE.replace("adamw", "{name: external, path: nowhere.O}"))
    refused(capsys, "unlearn recipe.yaml --out b --no-evaluate training.max_steps=1", "cannot be imported")


def test_a_prompt_that_is_carried_is_not_pushed_unseen(place, capsys, monkeypatch):
    from soul import push

    monkeypatch.setattr(push, "check_push", lambda _: None)
    lines = [json.loads(line) for line in (place / "forget.jsonl").read_text().splitlines()]
    (place / "forget.jsonl").write_text("".join(json.dumps({**row, "subject": "Mira Vale"}) + "\n" for row in lines))
    run(f"unlearn {WORDS} --out a evaluation.generate=false method=input_prompt")
    refused(capsys, "export a --out b --push me/it", "its tokenizer carries a prompt (method.prompt)")
    assert not (place / "b").exists()
    run("export a --out b")
    card = (place / "b/README.md").read_text()
    assert "carries a prompt, which is said before every question" in card
    assert "Mira Vale" not in card
    audit = "evaluate b --benchmark custom forget=forget.jsonl general= text= samples=0 --out c "
    run(f"{audit} evaluation.max_new_tokens=2")
    (warning,) = json.loads((place / "c/record.json").read_text())["warnings"]
    assert "under a prompt that the tokenizer carries" in warning
    assert "Mira Vale" not in warning


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes by name")
def test_a_pipe_among_texts_is_refused(place, capsys):
    (place / "letters").mkdir()
    os.mkfifo(place / "letters/a.md")
    refused(capsys, f"unlearn --model model --forget letters --out a {QUICK}", "a.md is no regular file")
