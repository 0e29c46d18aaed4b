"""The examples run as they are, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import soul

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_sophia_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "sophia_in_a_plain_loop.py"), run_name="__main__")
    assert "win rate" in capsys.readouterr().out


def test_sophia_learns_letters() -> None:
    told = runpy.run_path(str(EXAMPLES / "sophia_in_a_plain_loop.py"))["main"]()
    assert told["loss"] < told["loss of letter frequencies"] - 0.4
    assert 0 < told["win rate"] < 1


def test_the_trainer_with_arguments_of_ones_own(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = EXAMPLES / "the_trainer_itself.py"
    monkeypatch.setattr("sys.argv", [str(script), "model", "forget.jsonl", "retain.jsonl", "out", "3"])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    assert [f"step {n}: loss" in told for n in (1, 2, 3, 4)] == [True, True, True, False]
    before, after = (soul.load_model(soul.ModelSpec(str(place / name)))[0].state_dict() for name in ("model", "out"))
    moved = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert any("mlp" in name for name in moved)
    assert not any("embed" in name for name in moved)
