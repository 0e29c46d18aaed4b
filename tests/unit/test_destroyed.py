"""Scores of a destroyed model, which are no finite numbers, fail whatever reads them back."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from soul.cli import _show_precision
from soul.rundir import score_dict
from soul.types import Score

BROKEN = (math.inf, math.nan)


@pytest.fixture
def script(monkeypatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("value", BROKEN)
def test_the_demo_checks_fail(tmp_path: Path, script, value: float):
    demo = script("demo")
    known = {(split, metric) for _, split, metric, *_ in demo.CHECKS} | {(s, m) for s, m, *_ in demo.RELATIVE}
    scores = {
        when: [score_dict(Score(metric, split, of, 4)) for split, metric in known]
        for when, of in (("before", 0.9), ("after", value))
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores, allow_nan=False))
    (tmp_path / "record.json").write_text('{"format": 1}')
    checks = demo.check(tmp_path)
    assert not any(check["passed"] for check in checks if not check["name"].startswith("before"))
    assert json.loads((tmp_path / "record.json").read_text())["checks"] == checks


@pytest.mark.parametrize("value", BROKEN)
def test_a_cell_of_an_experiment_is_no_gap_and_no_success(script, value: float):
    cells, copyright_, detox = (script(name) for name in ("cells", "copyright", "detox"))

    def values(number: float) -> dict[tuple[str, str], dict[str, object]]:
        names = (("forget", "rougeL_recall"), ("kept", "rougeL_recall"), ("text", "perplexity"))
        names += tuple((split, "expected_max_toxicity[any]") for split in detox.TOXIC_SPLITS)
        return {(split, metric): score_dict(Score(metric, split, number, 4)) for split, metric in names}

    broken = values(value)
    assert cells.number(broken["text", "perplexity"]) == ("infinite" if value == math.inf else "not a number")
    assert cells.number(None) == "-"
    for judge in (copyright_.judge, detox.judge):
        assert set(judge(broken, {"base": values(0.1), "taught": values(0.9)}).values()) == {0.0}


def test_precisions_are_shown_beside_each_other(tmp_path: Path, capsys):
    after = [Score("perplexity", "text", 24.5, 4), Score("nll", "text", 3.2, 4), Score("nll", "kept", 3.0, 4)]
    coarse = [Score("perplexity", "text", math.inf, 4), Score("nll", "text", math.nan, 4)]
    scores = {"after": after, "bfloat16": coarse}
    (tmp_path / "scores.json").write_text(json.dumps({k: [score_dict(s) for s in v] for k, v in scores.items()}))
    _show_precision(tmp_path, "bfloat16")
    lines = [line for line in capsys.readouterr().out.splitlines() if "text" in line or "kept" in line]
    assert lines[0].count("infinite") == lines[1].count("not a number") == 2
    assert lines[2].count("—") == 3
