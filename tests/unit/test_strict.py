"""What nobody can have meant is refused with its place; what is small to write takes no time to refuse."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
import yaml

from soul.config import dump
from soul.recipe import recipe_from_tree
from soul.strict import json_objects, json_value, plain_number, read_number, read_text, yaml_tree

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
        ("a: {b: 1, b: 1}", "the key 'b' is given twice"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: values tagged '!!python/object/apply:os.system'"),
        ("a: !!binary aGVsbG8=", "'!!binary' are not read"),
        ("a: !!set {x, y}", "'!!set' are not read"),
        ("a: !own 1", "'!own' are not read"),
        ("a: !!int words", "line 1: cannot read 'words' as int"),
        ("a: !!bool maybe", "cannot read 'maybe' as bool"),
        ("a: !!float ''", "cannot read '' as float"),
        ("a: " + "9" * 5000, "as int"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("? [a, b]\n: 1", "a key must be one word"),
        ("a: &a [*a]", "refers to itself"),
        (BOMB, "with its aliases written out"),
        ("[" * 60_000, "nested too deeply"),
        ("- " * 30_000, "nested too deeply"),
        ("a: 1\n" * 20_000, "characters of YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: [", "not valid YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_yaml_that_nobody_can_have_meant(text: str, words: str):
    started = time.process_time()
    with pytest.raises(ValueError, match=r"^x\.yaml") as caught:
        yaml_tree(text, "x.yaml")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text", ["", "a: 1", "- 1\n- [2, 3]", "a: &x {b: 1}\nc: *x", "a: &x {b: 1}\nc: {<<: *x, d: 2}"]
)
def test_yaml_that_is_meant_is_what_pyyaml_reads(text: str):
    assert yaml_tree(text, "x") == yaml.safe_load(text)


def test_a_date_is_its_text():
    assert yaml_tree("label: 2024-02-30", "x") == {"label": "2024-02-30"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"a": NaN}', "NaN is no number in JSON"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ('{"a": \n1,}', "x, line 2: invalid JSON"),
    ],
    ids=lambda value: value[:24],
)
def test_json_that_nobody_can_have_meant(text: str, words: str):
    with pytest.raises(ValueError, match=r"^x") as caught:
        json_value(text, "x")
    assert words in str(caught.value)


def test_json_keeps_what_is_odd_and_right():
    assert json_value('{"a": "\\ud83d\\ude00 \\u2028 \\u0000"}', "x") == {"a": "\U0001f600 \u2028 \x00"}
    assert json_value('{"a": NaN, "b": "\\ud800"}', "x", lenient=True)["b"] == "\ud800"


def test_lines_are_objects(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n{"a": 2}')
    assert [row["a"] for _, row in json_objects(file)] == ["\u2028", 2]
    file.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: must be an object"):
        list(json_objects(file))


def test_a_text_file_is_a_regular_utf8_file_of_some_length(tmp_path: Path):
    file = tmp_path / "x.yaml"
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "no regular file"),
        (".", "a folder"),
        ("none", "not there"),
        ("n" * 300, "name too long"),
    ):
        with pytest.raises(ValueError, match=words):
            read_text(tmp_path / name)
    file.write_bytes("a: 1\nb: é".encode("utf-16"))
    with pytest.raises(ValueError, match=r"line 1: not UTF-8 text \(byte 0; it looks like UTF-16\)"):
        read_text(file)
    file.write_bytes(b"a: 1\nb: \xe9")
    with pytest.raises(ValueError, match=r"x\.yaml, line 2: not UTF-8 text"):
        read_text(file)
    file.write_bytes(b"123456789")
    with pytest.raises(ValueError, match="9 bytes, and at most 8"):
        read_text(file, 8)


@pytest.mark.parametrize(
    "label", ["1e5", "2024-01-01", "no", "a\u202eb\x1b[31m", "é", "./a: e #b", "12e4: x", " x\n\n"]
)
def test_a_recipe_keeps_its_texts(label: str):
    recipe = recipe_from_tree({"label": label, "data": {"forget": label, "retain": [label]}, "model": label})
    text = dump(recipe)
    assert recipe_from_tree(yaml_tree(text, "x")) == recipe
    assert "\u202e" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"optimizer": {"name": "adamw", "lr": float("inf")}}, "optimizer.lr is not a finite number"),
        ({"training": {"epochs": 10**30}}, "training.epochs is too large a number"),
        ({"data": {"retain": ["\udcff"]}}, "data.retain.0 is not Unicode text"),
        ({"label": "\udcff"}, "recipe.label is not Unicode text"),
    ],
)
def test_settings_that_nothing_can_compute_with(tree: dict, words: str):
    with pytest.raises(ValueError, match=words):
        recipe_from_tree(tree)


@pytest.mark.parametrize("value", [0.5, -3, math.inf, -math.inf, math.nan])
def test_numbers_that_json_has_none_for_are_words(value: float):
    text = json.dumps(plain_number(value), allow_nan=False)
    assert repr(read_number(json_value(text, "x"))) == repr(value)


def test_what_was_written_before_there_were_words_is_no_number():
    assert math.isnan(read_number(None))
    assert read_number("many") == "many"
