"""The speed benchmark's smoke run, whole, on a tiny model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.types import Example

SCRIPT = Path(__file__).parents[2] / "benchmarks/throughput.py"


def run(*arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)


def write_lines(file: Path, rows: Sequence[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tofu(tmp_path: Path, forget_set: list[Example], retain_set: list[Example]) -> Path:
    folder = tmp_path / "tofu"
    folder.mkdir()
    write_lines(folder / "forget01.json", [{"question": e.prompt, "answer": e.answer} for e in forget_set])
    write_lines(folder / "retain99.json", [{"question": e.prompt, "answer": e.answer} for e in retain_set])
    judged = [
        {
            "question": e.prompt,
            "answer": e.answer,
            "paraphrased_answer": f"It is this: {e.answer}",
            "perturbed_answer": [f"It is this: {word} {e.answer}" for word in ("no", "two", "a", "never", "some")],
        }
        for e in forget_set
    ]
    write_lines(folder / "forget01_perturbed.json", judged)
    return folder


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_quick_mode_prints_its_tables_and_measures_the_same_thing_on_every_path(
    tofu: Path, model: Path, tmp_path: Path
) -> None:
    done = run("--quick", "--tofu", str(tofu), "--model", str(model), "--json", str(tmp_path / "raw.json"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for head, rows in (("training", 4), ("seconds of a step", 4), ("evaluation", 5), ("ratio", 4)):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
        table = lines[start : start + 2 + rows]
        assert len({line.count("|") for line in table}) == 1, table
        assert "nan" not in "".join(table)

    paths = {title: found[0] for title, found in json.loads((tmp_path / "raw.json").read_text())["paths"].items()}
    evaluated = {title: paths.pop(title) for title in ("soul, bf16 weights", "(c) plain, bf16 weights")}
    assert len(paths) == 4
    for title, found in paths.items():
        assert len(found["steps"]) == (1 if "released" in title else 2)
        for step in found["steps"]:
            assert 0 < step["answers"] < step["tokens"] <= step["body"]
            assert step["parts"].keys() >= {"forward", "backward", "optimizer"}
            assert 0 < sum(step["parts"].values()) <= step["seconds"]
        assert found["train_peak"] > 1 << 20
    whole, plain, released = paths["soul, Sophia"], paths["(b) plain, AdamW"], paths["(a) released, SophiaG"]
    # the head runs on answers alone here, on every padded position elsewhere; released pads 8 rows a step to 512
    assert all(step["head"] == step["answers"] for step in paths["soul, AdamW"]["steps"])
    assert all(step["head"] == step["body"] for step in plain["steps"])
    assert [(step["body"], step["head"]) for step in released["steps"]] == [(8 * 512, 8 * 512)]
    assert whole["nll"] == pytest.approx(plain["nll"], rel=0.02)
    assert whole["nll"] == pytest.approx(released["nll"], rel=0.02)
    for found in evaluated.values():
        assert not found["steps"]
        assert found["nll"] == pytest.approx(whole["nll"], rel=0.02)
    for found in (whole, plain, released, *evaluated.values()):
        assert found["generation"]["tokens"] > 0
        assert found["likelihoods"]["tokens"] > found["likelihoods"]["answers"] > 0


def test_steps_are_held_against_the_arithmetic_of_their_own_rows(tofu: Path, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("a plain text goes on and on, word after word. " * 2000)
    config = json.loads((model / "config.json").read_text())
    done = run(
        "--quick", "--tofu", str(tofu), "--wikitext", str(text), "--model", str(model), "--json",
        str(tmp_path / "raw.json"), script=SCRIPT.with_name("step_limit.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    short, long = json.loads((tmp_path / "raw.json").read_text())
    assert (short["trained"], short["length"], long["trained"], long["length"]) == ("full", "short", "LoRA", "long")
    assert 1 <= short["padded"] < 2
    # two rows (or as many tokens as the model has positions), all of them answer: 2 + 2 of the weights' operations
    weights = LlamaForCausalLM.from_pretrained(model)
    linear = sum(m.weight.numel() for m in weights.modules() if isinstance(m, nn.Linear))
    n, layers = long["tokens"] // 2, config["num_hidden_layers"]
    assert n > 64
    expected = 2 * 2 * 2 * n * linear + 3 * 2 * 2 * layers * config["hidden_size"] * n * n
    assert long["needed"] == pytest.approx(expected, rel=0.01)
    assert len({line.count("|") for line in done.stdout.splitlines() if line.startswith("|")}) == 1


def test_a_folder_without_the_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--quick", "--tofu", str(tmp_path)])
    assert importlib.import_module("throughput").main() == 2
    assert "forget01.json" in capsys.readouterr().err
