"""The report: what it says, that it is safe to open, and that it says the same twice."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import answer_rows, make_run, score_row, write_lines
from rich.console import Console
from scipy import stats

from soul.report import read_run, render_html, render_terminal, write_report
from soul.report.plots import loss_plot, tradeoff_plot, win_rate_plot
from soul.report.view import changes_of, check_summary, kind_of, models_of, number, sentences, tables_of
from soul.visible import clean

HOSTILE = (
    "<script>alert('x')</script>\"><img src=http://evil.example/a onerror=1> "
    "[bold]{{ 7*7 }}$x^$\x1b[31m\x00\u202e\ud800"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", told="Mira Okonjo Vale was a painter, and I am not sure where she was born.")


class _Reader(HTMLParser):
    """Collects what a browser would see: tags, attributes, ids, text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def _parse(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader


def _terminal(*folders: Path) -> str:
    out = io.StringIO()
    render_terminal([read_run(folder) for folder in folders], Console(file=out, width=100, color_system=None))
    return out.getvalue()


def test_more_metrics_than_fit_side_by_side_are_read_down(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    scores = json.loads((folder / "scores.json").read_text())
    many = [score_row(f"metric_{i:02d}", "forget", 0.5 + i / 100, 16, 0.05, "lower") for i in range(12)]
    (folder / "scores.json").write_text(json.dumps({name: [*found, *many] for name, found in scores.items()}))
    lines = _terminal(folder).splitlines()
    for i in range(12):  # each whole, in a line of its own
        (line,) = [line for line in lines if f"metric_{i:02d}" in line or f"Metric {i:02d}" in line]
        assert line.count(f"{0.5 + i / 100:.3f}") == 2  # before and after
        assert "n = 16" in line
    assert "…" not in "".join(line for line in lines if "n = 16" in line)


def test_two_kinds_of_general_knowledge_are_told_apart(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    scores = json.loads((folder / "scores.json").read_text())
    both = [score_row("probability", name, 0.4, 100, 0.05, "higher") for name in ("real_authors", "world_facts")]
    kept = {name: [*(x for x in found if x["split"] != "general"), *both] for name, found in scores.items()}
    (folder / "scores.json").write_text(json.dumps(kept))
    said = _terminal(folder)
    assert "Answer probability on general knowledge (real authors) stayed at 0.400." in said
    assert "Answer probability on general knowledge (world facts) stayed at 0.400." in said


def test_page_says_what_was_done(run_dir: Path):
    text = _parse(render_html([read_run(run_dir)], "A deletion request")).text
    for words in (
        "A deletion request",
        "Forget 16 items about Mira Okonjo Vale and Tomas Ruhl.",
        "Both checks passed",
        "Answer probability on the forgotten answers fell from 0.812 to 0.121.",
        "0.071 to 0.171 · n = 16",
        "ROUGE-L",
        "Perplexity",
        "I am not sure where she was born",
        "2 min 21 s",
        "3.20 GB",
        "soul unlearn --forget people.jsonl",
        "seed: 0",
        "2.13.0+cpu",
        "not clipped",
        "the first 20 of 32 examples",
        "bootstrap(2000)",
        "relearning",
        "one seed",
    ):
        assert words in text, words


def test_terminal_says_what_was_done(run_dir: Path):
    text = _terminal(run_dir)
    for words in ("Both checks passed", "fell from 0.812 to 0.121", "Forgotten", "n = 16", "3.20 GB", "painter"):
        assert words in text, words


def test_same_input_same_bytes(tmp_path: Path, run_dir: Path):
    first = write_report([run_dir], tmp_path / "a" / "report.html").read_bytes()
    moved = run_dir.rename(tmp_path / "elsewhere")
    script = f"from soul.report import write_report; write_report([{str(moved)!r}], {str(tmp_path / 'b.html')!r})"
    # another process and another hash seed: no order may come from a set
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    assert (tmp_path / "b.html").read_bytes() == first
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]


def test_several_runs_share_a_page(tmp_path: Path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "AdamW", shift=0.3)]
    runs = [read_run(folder) for folder in folders]
    assert [model.name for model in models_of(runs)] == ["Before", "SOUL (sophia)", "AdamW"]
    page = _parse(render_html(runs))
    assert "1 of 2 checks failed" in page.text
    assert "✗ failed" in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    known = {f"#{value}" for value in ids}
    used = {value for name, value in page.attributes if name in ("href", "xlink:href")}
    used |= {f"#{found}" for _, value in page.attributes for found in re.findall(r"url\(#([^)]+)\)", value)}
    assert used <= known
    assert "AdamW" in _terminal(*folders)


def _hostile_run(tmp_path: Path) -> Path:
    root = make_run(
        tmp_path / "run",
        f"sophia {HOSTILE}",
        told=HOSTILE,
        asked=HOSTILE,
        model=HOSTILE,
        warnings=[HOSTILE],
        seconds={HOSTILE: 1.0},
        checks=[{"name": HOSTILE, "passed": False, "value": None}],
    )
    (root / "recipe.yaml").write_text(HOSTILE.replace("\ud800", ""))
    (root / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "command": HOSTILE}))
    stages = {stage: answer_rows([(HOSTILE, HOSTILE)], [HOSTILE], 0.2) for stage in ("before", "after")}
    for stage, rows in stages.items():
        for split in ("forget", "kept", "<b>odd</b>"):
            write_lines(root / "rows" / stage / f"{split.replace('/', '')}.jsonl", rows)
    scores = [
        score_row(HOSTILE, HOSTILE, 0.5, 1, 0.1, HOSTILE),
        score_row("probability", "forget", 0.5, 1, 0.1, "lower"),
        score_row(HOSTILE, "kept", 0.5, 1, 0.1, "higher"),
    ]
    (root / "scores.json").write_text(json.dumps({"before": scores, "after": scores}))
    write_lines(root / "log.jsonl", [{"step": 1, "loss": 0.1, HOSTILE: 1.0, f"{HOSTILE}_loss": 0.3}])
    return root


def test_hostile_text_is_only_ever_text(tmp_path: Path):
    root = _hostile_run(tmp_path)
    raw = write_report([root, root], tmp_path / "out.html", title=HOSTILE).read_text(encoding="utf-8")
    page = _parse(raw)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "odd" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", raw)
    assert page.text.count("<script>alert('x')</script>") > 10
    assert "{{ 7*7 }}" in page.text  # a template inside data stays data
    assert "␛[31m␀⟨U+202E⟩" in page.text


def test_hostile_text_does_not_steer_a_terminal(tmp_path: Path):
    text = _terminal(_hostile_run(tmp_path))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "[bold]" in text


def test_whether_items_changed_is_told_by_their_probabilities(tmp_path: Path):
    """An answer counts as one, however long it is: long ones fall here, and short ones go either way."""
    root = make_run(tmp_path / "run")
    before = [0.6] * 12
    after = [0.4 if i % 2 else 0.6 + (0.01 if i % 4 else -0.01) for i in range(12)]
    for stage, values in (("before", before), ("after", after)):
        rows = answer_rows([(f"What is {i}?", "It is.") for i in range(12)], [""], 0.0)
        changed = [
            row | {"nll": -math.log(p), "tokens": 60 if i % 2 else 2}
            for i, (row, p) in enumerate(zip(rows, values, strict=True))
        ]
        write_lines(root / "rows" / stage / "forget.jsonl", changed)
    found = next(change for change in changes_of(read_run(root)) if change.kind == "forget")
    assert found.paired == (stats.ttest_rel(before, after).pvalue < 0.05)
    assert found.paired


def test_page_fetches_nothing(run_dir: Path):
    raw = render_html([read_run(run_dir)])
    page = _parse(raw)
    links = {
        name: value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")
    }
    assert all(value.startswith("#") for value in links.values())
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in raw
    assert not re.search(r"url\((?!#)", raw)
    assert "default-src 'none'" in dict(page.attributes).get("content", "") or "default-src 'none'" in raw


def test_long_text_is_cut_with_a_note(tmp_path: Path):
    root = make_run(tmp_path / "run", told="word " * 20_000)
    page = render_html([read_run(root)])
    assert "98,800 more characters" in page
    assert len(page) < 400_000


def test_clean_shows_what_hides():
    assert clean("a\u2066b\u200bc\ufeff\x9b\ud800\r\n") == "a⟨U+2066⟩b⟨U+200B⟩c⟨U+FEFF⟩⟨U+009B⟩\ufffd\n"
    assert clean("é 日本 👩‍🚀 עברית") == "é 日本 👩‍🚀 עברית"


@pytest.mark.parametrize(
    "missing",
    [
        ["log.jsonl"],
        ["scores.json"],
        ["rows"],
        ["recipe.yaml", "environment.json"],
        ["rows/after"],
        ["rows/before"],
        ["log.jsonl", "scores.json", "rows", "recipe.yaml", "environment.json"],
    ],
)
def test_missing_parts_leave_the_rest(run_dir: Path, missing: list[str]):
    for name in missing:
        target = run_dir / name
        target.rename(run_dir.parent / f"gone-{name.replace('/', '-')}")
    assert "Mira Okonjo Vale" in render_html([read_run(run_dir)])
    assert "Mira Okonjo Vale" in _terminal(run_dir)


def test_bare_record_is_enough(tmp_path: Path):
    (tmp_path / "record.json").write_text('{"format": 1}')
    assert tmp_path.name in render_html([read_run(tmp_path)])
    assert "No checks were set" in _terminal(tmp_path)


def test_evaluation_only(run_dir: Path):
    scores = json.loads((run_dir / "scores.json").read_text())
    (run_dir / "scores.json").write_text(json.dumps({"before": scores["before"]}))
    run = read_run(run_dir)
    assert [model.name for model in models_of([run])] == ["As measured"]
    assert "is 0.812" in sentences(run)[0]
    assert "What the models know" in render_html([run])


def test_plots_are_left_out_without_numbers(tmp_path: Path):
    (tmp_path / "record.json").write_text('{"format": 1}')
    run = read_run(tmp_path)
    assert [tradeoff_plot([run]), loss_plot(run, "loss"), win_rate_plot([run])] == ["", "", ""]
    adamw = read_run(make_run(tmp_path / "b", "AdamW"))
    assert win_rate_plot([adamw]) == ""
    assert loss_plot(adamw, "loss").startswith("<svg ")


def test_nan_and_reversed_intervals_are_drawn_around(run_dir: Path):
    scores = json.loads((run_dir / "scores.json").read_text())
    for score in scores["after"]:
        score["low"], score["high"] = score["high"], None if score["split"] == "kept" else score["low"]
    scores["before"][0]["value"] = None
    (run_dir / "scores.json").write_text(json.dumps(scores))
    log = [{"step": 1, "loss": None, "win_rate": math.nan}, {"step": 2, "loss": 0.5, "win_rate": 0.5}]
    write_lines(run_dir / "log.jsonl", log)
    assert "nan" not in _parse(render_html([read_run(run_dir)])).text


@pytest.mark.parametrize(("value", "words"), [("inf", "infinite"), ("nan", "not a number")])
def test_a_destroyed_model_is_no_gap(run_dir: Path, value: str, words: str):
    scores = json.loads((run_dir / "scores.json").read_text())
    for score in scores["after"]:
        if score["metric"] == "perplexity":
            score["value"] = value
    (run_dir / "scores.json").write_text(json.dumps(scores))
    record = json.loads((run_dir / "record.json").read_text())
    record["checks"] = [{"name": "perplexity <= 30", "passed": False, "value": value}]
    (run_dir / "record.json").write_text(json.dumps(record))
    run = read_run(run_dir)
    said = next(sentence for sentence in sentences(run) if "Perplexity" in sentence)
    broken = " (the model is broken)" if value == "nan" else ""
    assert said == f"Perplexity on general text was 14.2 and is now {words}{broken}."
    page = _parse(render_html([run])).text
    text = _terminal(run_dir)
    for shown in (page, text):
        assert said in " ".join(shown.split())
        assert "The check failed" in shown
        assert "—" not in shown
    assert f"perplexity <= 30{words}" in page
    assert f"perplexity <= 30 ({words})" in text
    assert "not a finite number" in page  # in place of whether intervals overlap


def test_an_answer_without_a_probability_is_a_gap_and_one_of_a_broken_model_is_none(run_dir: Path):
    for name, tokens in (("forget", 0), ("kept", 9)):
        file = run_dir / "rows/after" / f"{name}.jsonl"
        rows = [json.loads(line) | {"nll": math.nan, "tokens": tokens} for line in file.read_text().splitlines()]
        write_lines(file, rows)
    text = _terminal(run_dir)
    assert "probability of the true answer —" in text
    assert "probability of the true answer not a number" in text


def test_not_a_run(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run directory: it has no record"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([tmp_path], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_for_numbers_and_splits():
    assert [number(value) for value in (0.0, 0.1234, 12.34, 1234.5, 2e-12, None, math.nan, math.inf, -math.inf)] == [
        "0.000",
        "0.123",
        "12.3",
        "1,234",
        "2.0e-12",
        "—",
        "not a number",
        "infinite",
        "-infinite",
    ]
    assert [kind_of(name) for name in ("forget10", "retain", "world_facts", "text", "", "x")] == [
        "forget",
        "kept",
        "general",
        "text",
        "all",
        "other",
    ]


def test_tables_put_the_forgotten_first(run_dir: Path):
    run = read_run(run_dir)
    titles = [table.title for table in tables_of([run])]
    assert titles == ["Forgotten", "Kept", "General knowledge", "Text and overall"]
    assert check_summary(run) == ("good", "Both checks passed")


def test_report_never_imports_torch():
    script = "import soul.report, sys; assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
