"""Run directories are read whole, or refused in one sentence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from report_runs import make_run

from soul.report import read_run, read_runs
from soul.report.seeds import by_seed
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


def test_runs_side_by_side_are_told_apart_by_their_folders(tmp_path: Path):
    one, other, third = (make_run(tmp_path / name) for name in ("seed0", "seed1", "seed2"))
    record = json.loads((third / "record.json").read_text())
    (third / "record.json").write_text(json.dumps({**record, "label": "own"}))
    assert [run.label for run in read_runs([one, other, third])] == [
        "SOUL (sophia) (seed0)",
        "SOUL (sophia) (seed1)",
        "own",
    ]


def test_numbers_that_do_not_compare_are_told(tmp_path: Path):
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c", "d")]
    measured = [
        {"benchmark": "tofu", "version": 3, "settings": {"split": "forget10", "seed": 0}},
        {"benchmark": "tofu", "version": 3, "settings": {"split": "forget01", "seed": 0}},
        {"benchmark": "request", "version": 3, "settings": {"seed": 0}},
        {},  # an older record
    ]
    for run, how in zip(runs, measured, strict=True):
        scores = json.loads((run / "scores.json").read_text())
        (run / "scores.json").write_text(json.dumps({**scores, **how}))
    first, second, other, old = read_runs(runs)
    assert "split forget01, there forget10" in second.warnings[-1]
    assert "benchmark request, there tofu" in other.warnings[-1]
    assert not any("not measured as" in warning for run in (first, old) for warning in run.warnings)


def test_a_change_of_the_same_items_may_be_sure_where_intervals_overlap(tmp_path: Path):
    """Items differ much from one another and move alike; a coin's toss of the same size is not sure."""
    run = make_run(tmp_path / "run")
    scores = json.loads((run / "scores.json").read_text())
    for stage, value in (("before", 0.45), ("after", 0.43)):
        kept = {"metric": "probability", "split": "kept", "value": value, "n": 20, "low": value - 0.1}
        scores[stage] = [{**kept, "high": value + 0.1, "better": "higher"}]
    (run / "scores.json").write_text(json.dumps(scores))
    for moved, sure in (([0.05] * 20, True), ([0.2, -0.2] * 10, False)):
        for stage in ("before", "after"):
            rows = [
                {"id": str(i), "prompt": f"{i}?", "answer": ".", "subject": "", "tokens": 9}
                | {"nll": 0.1 * (i + 1) + (0.01 * (i % 3) + moved[i] if stage == "after" else 0.0)}
                for i in range(20)
            ]
            (run / "rows" / stage / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (said,) = [sentence for sentence in sentences(read_run(run)) if "fell" in sentence]
        assert ("overlap" in said) is not sure


def test_seeds_are_put_together_where_nothing_else_differs(tmp_path: Path):
    runs = [make_run(tmp_path / name, shift=0.01 * i) for i, name in enumerate(("a", "b", "c", "copy"))]
    for run, seed in zip(runs, (0, 1, 2, 2), strict=True):
        (run / "recipe.yaml").write_text(f"objective: {{name: npo}}\ntraining: {{seed: {seed}, epochs: 1}}\n")
    ((name, spreads),) = by_seed(read_runs(runs[:3]))
    assert name.endswith("3 seeds")
    known = next(s for s in spreads if "probability" in s.title.lower())
    assert known.mean == pytest.approx(sum(known.values) / 3)
    assert known.half == pytest.approx(4.302653 * known.sd / math.sqrt(3), rel=1e-6)  # Student's t with 2 degrees
    assert by_seed(read_runs(runs)) == []  # a run and its copy are no two seeds
    (runs[1] / "recipe.yaml").write_text("objective: {name: npo}\ntraining: {seed: 1, epochs: 2}\n")
    assert by_seed(read_runs(runs[:2])) == []


def test_a_seed_that_was_lost_is_seen_in_the_mean(tmp_path: Path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for seed, run in enumerate(runs):
        (run / "recipe.yaml").write_text(f"training: {{seed: {seed}}}\n")
    scores = json.loads((runs[1] / "scores.json").read_text())
    for score in scores["after"]:
        score["value"] = "nan"
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    ((_, spreads),) = by_seed(read_runs(runs))
    assert spreads
    assert all(math.isnan(s.mean) and math.isnan(s.sd) and math.isnan(s.half) for s in spreads)
