"""A run that is killed for good, at any point, is continued by the same command and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from soul.cli import main

RECIPE = """
model: {d}/model
data: {{forget: {d}/forget.jsonl, retain: {d}/retain.jsonl}}
objective: {{name: npo, retain: kl}}
optimizer: {{name: sophia, lr: 1e-3, curvature: {{interval: 2}}}}
training: {{batch_size: 2, accumulation: 2, epochs: 20, save_steps: 4, precision: float32}}
benchmark: {{name: request, forget: {d}/forget.jsonl, kept: {d}/retain.jsonl, general: "", text: ""}}
evaluation: {{max_new_tokens: 8}}
"""
STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer, forget_set, retain_set):
    folder = tmp_path_factory.mktemp("kill")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No.", "Yes."]} for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(d=folder))
    return folder


def command(place: Path, out: Path) -> list[str]:
    return ["unlearn", str(place / "recipe.yaml"), "--out", str(out)]


def start(place: Path, out: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOUL_CACHE": str(place / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "soul.cli", *command(place, out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Kill the process, as a lost machine or a full memory would, as soon as something is there."""
    while not ready():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()}"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def what_matters(out: Path) -> dict[str, object]:
    """Return what must not depend on how often a run was interrupted: weights, scores, rows, losses."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "curvature_seconds")
    return {
        "weights": (out / "model/model.safetensors").read_bytes(),
        "scores": (out / "scores.json").read_text(),
        "rows": {p.relative_to(out): p.read_text() for p in sorted(out.glob("rows/*/*.jsonl"))},
        "log": [{k: v for k, v in line.items() if k not in timed} for line in log],
    }


@pytest.fixture(scope="module")
def uninterrupted(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOUL_CACHE", str(place / "cache-of-the-whole"))
        assert main(command(place, place / "whole")) == 0
    found = what_matters(place / "whole")
    log = found["log"]
    assert isinstance(log, list)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    return found


@pytest.fixture
def again(place, monkeypatch):
    """The same command once more, to its end."""
    monkeypatch.setenv("SOUL_CACHE", str(place / "cache"))
    return lambda out: main(command(place, out))


def test_killed_between_two_checkpoints(place, uninterrupted, again):
    out = place / "cut"
    log = out / "log.jsonl"

    def steps() -> int:
        return len(log.read_text().splitlines()) if log.is_file() else 0

    kill_when(start(place, out), lambda: steps() >= 10)
    assert 10 <= steps() < STEPS - 5
    whole = [p.parent for p in out.glob("checkpoints/checkpoint-*/trainer_state.json")]
    assert whole
    assert not (out / "model").exists()
    torn = out / "checkpoints/checkpoint-36"  # as if the kill had come while this one was written
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 3')
    assert again(out) == 0
    assert what_matters(out) == uninterrupted
    assert not (out / "checkpoints").exists()
    assert json.loads((out / "record.json").read_text())["steps"] == STEPS


def test_killed_while_measuring_and_again_while_saving(place, uninterrupted, again):
    out = place / "often"
    kill_when(start(place, out), (out / "rows/before/forget.jsonl").is_file)
    assert not (out / "log.jsonl").exists()
    kill_when(start(place, out), lambda: (out / "model.part").exists() or (out / "model").exists())
    assert not (out / "rows/after").exists()
    assert again(out) == 0
    assert what_matters(out) == uninterrupted
    assert not (out / "model.part").exists()


def test_a_finished_run_returns_at_once_with_the_same_report(place, uninterrupted, again, capsys):
    out = place / "whole"
    report, written = (out / "report.html").read_text(), (out / "model/model.safetensors").stat().st_mtime_ns
    assert again(out) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    assert (out / "report.html").read_text() == report
    assert (out / "model/model.safetensors").stat().st_mtime_ns == written
