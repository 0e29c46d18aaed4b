"""The benchmark of evaluation, whole, on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.types import Example

SCRIPT = Path(__file__).parents[2] / "benchmarks/evaluation.py"


@pytest.fixture
def tofu(tmp_path: Path, forget_set: list[Example], retain_set: list[Example]) -> Path:
    for name, examples, paraphrased in (
        ("forget01", forget_set, True), ("retain", retain_set, True),
        ("real_authors", retain_set[:3], False), ("world_facts", retain_set[:1], False),
    ):  # fmt: skip
        rows = [
            {"question": e.prompt, "answer": e.answer, "perturbed_answer": [f"No, {e.answer}", "Never."]}
            | ({"paraphrased_answer": f"It is this: {e.answer}"} if paraphrased else {})
            for e in examples
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}_perturbed.json").write_text(text, encoding="utf-8")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *arguments])
    return importlib.import_module("evaluation").main()


def test_batches_agree_with_one_at_a_time_and_both_are_timed(
    tofu: Path,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(seed=3).save_pretrained(tofu / "model")
    tokenizer.save_pretrained(tofu / "model")
    words = ("--model", str(tofu / "model"), "--tofu", str(tofu), "--examples", "10", "--new-tokens", "6")
    assert run(monkeypatch, *words, "--rounds", "2", "--json", str(tofu / "raw.json")) == 0
    text, raw = capsys.readouterr().out, json.loads((tofu / "raw.json").read_text())
    assert raw["examples"] == 3 + 3 + 2 + 1  # a set of one gives one
    exact = raw["agreement"]["in batches, fp32"]
    assert exact["likelihoods"] == 6 * 4 + 3 * 3
    assert exact["largest difference of a likelihood"] < 1e-5
    assert exact["greedy answers equal"] == 1
    coarse = raw["agreement"]["in batches, bf16 weights"]
    assert coarse["largest difference of a likelihood"] > exact["largest difference of a likelihood"]
    assert {name: len(values) for name, values in raw["seconds"].items()} == dict.fromkeys(raw["seconds"], 2)
    both = raw["speed"]["both"]
    assert both["alone"] == pytest.approx(
        raw["speed"]["likelihoods"]["alone"] + raw["speed"]["answers"]["alone"], rel=0.5
    )
    assert "every likelihood within 1e-05: yes" in text
    assert "| both |" in text


def test_bad_input_is_told(tofu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--tofu", str(tofu), "--examples", "2") == 2
    assert "at least 4" in capsys.readouterr().err
    assert run(monkeypatch, "--tofu", str(tofu / "nowhere")) == 2
    assert "forget01_perturbed.json" in capsys.readouterr().err
