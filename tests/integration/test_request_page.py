"""The page that leads through a request: its commands are commands, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from soul import arguments
from soul.cli import main
from soul.models import ModelSpec, load_model

PAGE = (Path(__file__).parents[2] / "docs/request.md").read_text(encoding="utf-8")
COMMANDS = [re.split(r"\s+# ", line.strip())[0] for line in PAGE.splitlines() if line.startswith("    soul ")]
(PYTHON,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_understood(line: str) -> None:
    assert arguments.parse(shlex.split(line)[1:]).command in ("plan", "unlearn", "evaluate", "export")


def test_its_python_attacks_a_run(place: Path) -> None:
    words = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --out runs/request --no-evaluate"
    assert main([*words.split(), "optimizer=adamw", "training.max_steps=1", "stop.when=never"]) == 0
    exec(compile(PYTHON, "request.md", "exec"), {})
    before, after = (load_model(ModelSpec(path))[0].state_dict() for path in ("runs/request", "attacked"))
    assert any(not before[name].equal(after[name]) for name in before)
