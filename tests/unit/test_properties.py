"""What holds for any text, drawn by hypothesis: what was written is read back; what cannot be is a ``ValueError``."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from soul import config
from soul.data.rows import to_examples
from soul.data.sources import load_examples, source_options
from soul.data.templates import ChatTemplate
from soul.recipe import recipe_from_tree
from soul.report.card import escaped
from soul.report.record import read_run
from soul.strict import json_value, yaml_tree
from soul.types import Example
from soul.visible import clean, hides, message, one_line

# the same draws every time: a test must not fail on a change that it has nothing to do with
settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=50, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")

TEXT = st.text(max_size=60)
SAID = TEXT.filter(lambda text: bool(text.strip()))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.text("\ud800\udfff\x00a", max_size=3)
TREE = st.recursive(
    PLAIN, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3), max_leaves=8
)
KEYS = st.sampled_from(
    ["question", "answer", "prompt", "response", "completion", "messages", "text", "id", "ends", "subject"]
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", 7, ""])), max_size=3
)


def read(content: bytes, name: str) -> list[Example]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        return load_examples(file)


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_rows_are_read_as_they_were_written(pairs: list[tuple[str, str]], ascii_only: bool, windows: bool):
    end = "\r\n" if windows else "\n"
    rows = [json.dumps({"question": q, "answer": a}, ensure_ascii=ascii_only) for q, a in pairs]
    found = read(end.join(rows).encode("utf-8-sig" if windows else "utf-8"), "x.jsonl")
    assert [(e.prompt, e.answer) for e in found] == pairs
    assert read(json.dumps([json.loads(row) for row in rows]).encode(), "x.json") == found
    table = io.StringIO()
    csv.writer(table).writerows([("question", "answer"), *pairs])
    assert [(e.prompt, e.answer) for e in read(table.getvalue().encode(), "x.csv")] == pairs


@given(st.binary(max_size=200) | TEXT.map(str.encode), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet"]))
def test_any_bytes_are_examples_or_a_value_error(content: bytes, name: str):
    with contextlib.suppress(ValueError):
        assert read(content, name)


@given(st.dictionaries(KEYS, TREE | TURNS, max_size=5))
def test_any_row_is_an_example_or_a_value_error(row: dict[str, Any]):
    with contextlib.suppress(ValueError):
        examples = to_examples(row, "here")
        assert examples
        assert all(example.answer.strip() for example in examples)


@given(TEXT)
def test_any_source_is_read_or_a_value_error(text: str):
    with contextlib.suppress(ValueError):
        source_options(f"owner/name,{text}", None, None, None)
    with contextlib.suppress(ValueError):
        load_examples(f"people:{text}"[:40], limit=1)


@given(TREE | TEXT)
def test_any_text_is_yaml_and_json_or_a_value_error(tree: Any):
    for text in (str(tree), json.dumps(tree), yaml.safe_dump(tree)):
        with contextlib.suppress(ValueError):
            yaml_tree(text, "x")
        with contextlib.suppress(ValueError):
            json_value(text, "x")


@given(
    st.lists(TEXT | st.builds("{}={}".format, st.sampled_from(["a", "a.b", "optimizer.lr", "label"]), TEXT), max_size=4)
)
def test_any_settings_are_a_tree_or_a_value_error(assignments: list[str]):
    with contextlib.suppress(ValueError):
        recipe_from_tree(config.override({}, assignments))


@given(
    SAID,
    st.floats(min_value=1e-12, max_value=1e6),
    st.integers(1, 10**6),
    st.booleans(),
    st.none() | st.integers(1, 64),
)
def test_a_setting_is_what_was_written(text: str, lr: float, epochs: int, merge: bool, r: int | None):
    adapter = None if r is None else {"r": r, "merge": merge}
    data = {"forget": text, "retain": [text, text], "refusals": text}
    tree = {"label": text, "data": data, "optimizer": {"name": "adamw", "lr": lr}, "training": {"epochs": epochs}}
    recipe = recipe_from_tree({**tree, "model": {"path": text}, "adapter": adapter})
    written = config.dump(recipe)
    assert recipe_from_tree(yaml_tree(written, "x")) == recipe
    assert config.dump(recipe_from_tree(yaml_tree(written, "x"))) == written
    assert not hides(written)
    given_so = [f"optimizer.lr={lr!r}", f"training.epochs={epochs}", f"adapter.merge={str(merge).lower()}"]
    assert recipe_from_tree(config.override({}, [*given_so[:2]])).optimizer.lr == lr
    assert recipe_from_tree(config.override({}, given_so)).training.epochs == epochs


@settings(max_examples=30)
@given(TREE)
def test_any_tree_is_a_recipe_or_a_value_error(tree: Any):
    for section in (
        "model",
        "data",
        "objective",
        "optimizer",
        "training",
        "benchmark",
        "method",
        "adapter",
        "evaluation",
    ):
        with contextlib.suppress(ValueError):
            recipe_from_tree({section: tree})


def test_a_template_keeps_the_answer(tokenizer, make_tokenizer):
    templates = [ChatTemplate(tokenizer, 4096), ChatTemplate(make_tokenizer(template=False), 4096)]

    @given(SAID, SAID, st.booleans())
    def keeps(prompt: str, answer: str, chat: bool) -> None:
        for template in templates:
            found = template.encode(Example(prompt, answer, chat=chat))
            own = found.input_ids[found.answer_start : -1]
            assert found.input_ids[-1] == template.end_of_turn
            said = str(template.tokenizer.decode(list(own), clean_up_tokenization_spaces=False))
            assert said.removeprefix(" ") == answer.removeprefix(" ")
            whole = template.tokenizer.decode(list(found.input_ids), clean_up_tokenization_spaces=False)
            assert (prompt.strip() if chat else prompt) in whole

    keeps()


@given(st.text(st.characters(), max_size=300))
def test_shown_text_neither_hides_nor_steers(text: str):
    for show in (clean, one_line, message):
        shown = show(text)
        assert not hides(shown)
        assert show(shown) == shown
    assert "\n" not in message(text)
    assert "\n" not in one_line(text)


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


MARKS = st.text(st.sampled_from("*_`[]()<>!#|~&;:/.\\-+=a1 \n\t\"'@$^{}"), max_size=60)


@given(MARKS | TEXT)
def test_any_text_in_a_card_is_a_paragraph(text: str):
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(f"Said: {escaped(text)}")
    assert _Tags(page).found == ["p"]


@given(
    st.dictionaries(st.sampled_from(["label", "steps", "seconds", "checks", "warnings", "n_forget"]), TREE), TREE, TREE
)
def test_any_record_is_a_run_or_a_value_error(record: dict[str, Any], scores: Any, row: Any):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "record.json").write_text(json.dumps({"format": 1, **record}))
        (Path(folder) / "scores.json").write_text(json.dumps({"after": scores}))
        (Path(folder) / "log.jsonl").write_text(json.dumps({"step": 1, "loss": row}) + "\n")
        with contextlib.suppress(ValueError):
            assert re.fullmatch(r".*", read_run(folder).label, re.DOTALL)
