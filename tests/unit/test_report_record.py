"""Run directories are read whole, or refused in one sentence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from report_runs import make_run

from soul.report import read_run
from soul.report.view import sentences
from soul.rundir import score_dict
from soul.strict import json_value
from soul.types import Score


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


def test_what_is_no_finite_number_is_read_as_it_was_written(run_dir: Path):
    values = {"inf": math.inf, "minus": -math.inf, "nan": math.nan, "one": 1.0}
    scores = [Score(name, "text", value, 4, low=1.0, high=math.inf) for name, value in values.items()]
    scores.append(Score("bare", "text", 1.0, 4))  # no interval
    text = json.dumps({"format": 1, "after": [score_dict(s) for s in scores]}, allow_nan=False)
    json_value(text, "scores.json")  # strict JSON
    (run_dir / "scores.json").write_text(text)
    assert repr(read_run(run_dir).after) == repr(tuple(scores))


def test_a_value_that_an_older_record_does_not_tell_is_left_out_and_noted(run_dir: Path):
    old = [{"metric": "perplexity", "split": "text", "value": None, "n": 4}, {"metric": "nll", "value": 1}]
    before = [{"metric": "perplexity", "split": "text", "value": 24.5, "n": 4}]
    (run_dir / "scores.json").write_text(json.dumps({"before": before, "after": old}))
    run = read_run(run_dir)
    assert sentences(run) == ("Perplexity on general text was 24.5, and was not measured after.",)
    assert [score.metric for score in run.after] == ["nll"]
    assert "after, perplexity on text has no value" in run.warnings[-1]


@pytest.mark.parametrize(("value", "read"), [(None, None), ("inf", math.inf), ("nan", math.nan), (0.5, 0.5)])
def test_a_check_keeps_what_was_measured(run_dir: Path, value: float | str | None, read: float | None):
    record = json.loads((run_dir / "record.json").read_text())
    record["checks"] = [{"name": "text perplexity <= 30", "passed": False, "value": value}]
    (run_dir / "record.json").write_text(json.dumps(record))
    (check,) = read_run(run_dir).checks
    assert repr(check.value) == repr(read)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("scores.json", '{"before": [{"metric": "x", "value": "many"}]}', "x: value must be int or float"),
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
