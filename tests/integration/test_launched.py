"""``soul unlearn`` in two processes, from the command line: started by accelerate, and ended by one that fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from soul.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples/accelerate"
RECIPE = """
model: {{path: {d}/model, device: cpu}}
data: {{forget: {d}/forget.jsonl, retain: {d}/retain.jsonl, overlap: ignore}}
objective: {{name: npo, retain: kl}}
optimizer: {{name: sophia, lr: 1e-3, curvature: {{interval: 2}}}}
training: {{batch_size: 2, epochs: 2, save_steps: 2, precision: float32}}
benchmark: {{name: request, forget: {d}/forget.jsonl, kept: {d}/retain.jsonl, general: "", text: ""}}
evaluation: {{max_new_tokens: 8}}
"""
ALONE = ["training.accumulation=2", "optimizer.curvature.micro_batches=2"]  # what one process does in place of two
FAILS = """
import sys
import soul.run
if {rank}:
    def lost(spec):
        raise ValueError("this process has no model")
    soul.run.load_model = lost
from soul.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer, forget_set, retain_set):
    folder = tmp_path_factory.mktemp("launched")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, examples in (("forget", forget_set[:-1]), ("retain", retain_set)):
        lines = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No.", "Yes."]} for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(RECIPE.format(d=folder))
    return folder


def environment(place: Path, **more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "SOUL_CACHE": str(place / "cache")} | more


def test_two_processes_end_together_within_a_budget(place, tmp_path):
    """The step that leaves the budget is shortened alike in both, and one of them says why the run ended."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "ddp.yaml")]
    words += ["--num_processes", "2", "--main_process_port", "0", "-m", "soul", "unlearn", str(place / "recipe.yaml")]
    words += ["--out", str(tmp_path / "out"), "--no-evaluate", "stop.when=forgotten", "stop.kl_budget=1e-6"]
    done = subprocess.run(words, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stopped = json.loads((tmp_path / "out/record.json").read_text())["stopped"]
    assert 1e-7 < max(stopped["moved"].values()) <= 1e-6
    assert stopped["step"] == json.loads((tmp_path / "out/record.json").read_text())["steps"] == 2
    assert done.stdout.count(f"Stopped after {stopped['step']} steps") == 1


def test_accelerate_launches_a_sharded_run_that_leaves_one_record(place, monkeypatch, capsys):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "fsdp2.yaml")]
    words += ["--num_processes", "2", "--main_process_port", "0", "-m", "soul", "unlearn", str(place / "recipe.yaml")]
    out = place / "two"
    done = subprocess.run([*words, "--out", str(out)], env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nreport: ") == 1
    assert "error" not in done.stderr
    monkeypatch.setenv("SOUL_CACHE", str(place / "cache"))
    assert main(["unlearn", str(place / "recipe.yaml"), "--out", str(place / "one"), *ALONE]) == 0
    capsys.readouterr()
    kept = {
        folder: {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} for folder in (out, place / "one")
    }
    assert kept[out] == kept[place / "one"]
    weights, alone = (load_file(folder / "model/model.safetensors") for folder in (out, place / "one"))
    assert weights.keys() == alone.keys()
    gaps = torch.cat([(weights[name] - alone[name]).abs().flatten() for name in weights])
    assert (gaps > 1e-6).float().mean() < 1e-3
    for file in ("rows/before/forget.jsonl", "rows/after/kept.jsonl", "log.jsonl"):
        two, one = ([json.loads(line) for line in (f / file).read_text().splitlines()] for f in (out, place / "one"))
        assert [row.keys() for row in two] == [row.keys() for row in one]
        for row, other in zip(two, one, strict=True):
            for name in ("id", "step"):
                assert row.get(name) == other.get(name)
            for name in {"nll", "loss"} & row.keys():
                assert row[name] == pytest.approx(other[name], rel=1e-3)
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert json.loads((place / "one/environment.json").read_text())["processes"] == 1
    # not finished, it goes on with as many examples in a step as before, or not at all
    (out / "record.json").unlink()
    assert main(["unlearn", str(place / "recipe.yaml"), "--out", str(out)]) == 2
    assert "set training.accumulation to 2" in " ".join(capsys.readouterr().err.split())


def test_a_process_that_fails_ends_the_others_with_one_message(place):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["unlearn", str(place / "recipe.yaml"), "--out", str(place / "failed")]
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = FAILS.format(rank=rank)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *words], env=environment(place, **own, **where), stderr=subprocess.PIPE
            )
        )
    said = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert [text.count("error:") for text in said] == [0, 1], said
    assert "this process has no model" in said[1]
    assert "Traceback" not in "".join(said)
    assert not (place / "failed/record.json").exists()


def test_what_does_not_divide_says_so(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["list"]) == 2
    assert "soul list runs in one process: start it without a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["list"]) == 2
    assert capsys.readouterr().err == ""
