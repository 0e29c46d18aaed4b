"""Run directories are read whole, or refused in one sentence."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from report_runs import make_run

from soul.report import read_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_reads_what_was_written(run_dir: Path):
    run = read_run(run_dir)
    assert run.label == "SOUL (sophia)"
    assert run.steps == 60
    assert run.environment["cores"] == "2"
    assert len(run.log) == 60
    assert math.isnan(next(score for score in run.after if score.metric == "model_utility").low)
    assert [len(rows) for rows in run.rows_after.values()] == [16, 1, 32]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("record.json", "{", "record.json: invalid JSON"),
        ("record.json", "[]", "must hold an object"),
        ("record.json", '{"format": 2}', "format must be 1"),
        ("record.json", '{"format": 1, "steps": "many"}', "steps must be int"),
        ("record.json", '{"format": 1, "checks": [{"name": "x"}]}', "a check needs a name and passed"),
        ("scores.json", '{"before": [{"metric": "x"}]}', "a score needs a metric and a value"),
        ("scores.json", '{"before": [{"metric": "x", "value": 1}, {"metric": "x", "value": 2}]}', "twice"),
        ("log.jsonl", '{"loss": 1}', "log.jsonl, line 1 has no step"),
        ("log.jsonl", '{"step": 1}\n{"st', "line 2: invalid JSON"),
        ("rows/after/forget.jsonl", '{"id": "z", "prompt": "p"}', "needs answer, a string"),
        ("rows/after/forget.jsonl", '{"id": "z", "prompt": "p", "answer": "a"}', "hold different examples"),
    ],
)
def test_broken_records_are_refused_in_one_sentence(run_dir: Path, file: str, text: str, words: str):
    (run_dir / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_run(run_dir)
    assert "\n" not in str(caught.value)
