"""The examples run as they are, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_sophia_learns_letters() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "sophia_in_a_plain_loop"]
    told = runpy.run_path(str(path))["main"]()
    assert told["loss"] < told["loss of letter frequencies"] - 0.4
    assert 0 < told["win rate"] < 1
