"""Imports point one way: what measures or trains may use what computes, never the reverse."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "soul"
ROOMS = sorted({p.stem for p in SOURCE.glob("*.py")} | {p.parent.name for p in SOURCE.glob("*/__init__.py")})
TOP = {"plan", "trainer", "evaluate", "assess", "recipe", "run", "rundir", "sequence"}
TOP |= {"export", "push", "lineage", "cli", "api"}
# Room -> rooms it may use, besides itself. A room that is not here may use everything below TOP.
ONLY = {
    "types": set(),
    "stored": {"strict"},
    "folderlock": {"stored"},
    "checkpoints": {"stored", "types"},
    "registry": set(),
    "strict": set(),
    "intact": {"strict"},
    "gguf_file": {"intact"},
    "visible": set(),
    "words": set(),
    "truncation": {"types"},
    "config": {"registry", "strict", "visible"},
    "arguments": {"strict", "visible"},
    "console": {"visible", "processes"},
    "machine": {"processes"},
    "processes": set(),
    "parallel": {"curvature", "forward", "optim", "quantized", "zero"},
    "zero": {"curvature", "optim"},
    "report": {"types", "metrics", "stored", "strict", "visible"},
    "metrics": {"types", "stored", "words"},
    "data": {"types", "strict", "words"},
    "optim": {"registry", "choices", "curvature", "finite", "machine", "types"},
    "choices": set(),
    "finite": set(),
    "forward": {"data"},
    "combine": {"types", "optim"},
    "embedding": {"data", "pretrained"},
    "overlaps": {"types", "data", "embedding", "machine", "stored"},
    "anchors": {"types", "data", "generation", "stored", "strict"},
    "quantized": set(),
    "pretrained": {"data", "models", "intact"},
    "toxicity": {"types", "data", "metrics", "pretrained"},
}
NOT_TOP = ("data", "metrics", "objectives", "optim", "curvature", "benchmarks", "forward", "reference", "models")


def imports(text: str) -> set[str]:
    """Return the rooms of soul that a source text imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "soul":
                names |= {f"soul.{alias.name}" for alias in node.names}
            else:
                names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("soul.")}


def files(room: str) -> list[Path]:
    return [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").is_file() else sorted((SOURCE / room).rglob("*.py"))


def uses(room: str) -> set[str]:
    return {used for file in files(room) for used in imports(file.read_text(encoding="utf-8"))} - {room}


def test_the_reader_of_imports_sees_them():
    text = (
        "import soul.run\nfrom soul import config\nfrom soul.data.rows import x\ndef f():\n    from soul.cli import y"
    )
    assert imports(text) == {"run", "config", "data", "cli"}
    assert imports("import os, torch\nfrom transformers import Trainer") == set()
    assert "objectives" in uses("trainer")


@pytest.mark.parametrize("room", sorted(ONLY))
def test_room_uses_only(room):
    assert files(room)
    assert uses(room) <= ONLY[room]


@pytest.mark.parametrize("room", NOT_TOP)
def test_room_does_not_know_who_drives_it(room):
    assert files(room)
    assert not uses(room) & TOP


@pytest.mark.parametrize("room", [r for r in ROOMS if not r.startswith("__")])
def test_nothing_uses_the_command_line(room):
    assert "cli" not in uses(room)


def test_methods_may_train_and_the_trainer_knows_none():
    assert "trainer" in uses("methods")
    assert "methods" not in uses("trainer")


def test_training_and_measuring_do_not_know_each_other():
    assert "evaluate" not in uses("trainer")
    assert "trainer" not in uses("evaluate")


@pytest.mark.parametrize("module", ["soul", "soul.types", "soul.registry", "soul.cli", "soul.report", "soul.stored"])
def test_import_is_light(module):
    code = f"import sys, {module}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
