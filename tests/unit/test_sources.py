"""Reading examples: every format round trips, and every mistake is named with its file and line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from soul.benchmarks._muse_data import read_rows as muse_rows
from soul.benchmarks._tofu_data import tofu_train
from soul.data import raw, sources
from soul.data.general import general_chat
from soul.data.people import People
from soul.data.rows import to_examples
from soul.data.sources import check_disjoint, load_examples
from soul.types import DATA_SUFFIXES, Example

REAL = Path(__file__).parents[2].parent / "shared" / "data"
ROWS: list[dict[str, Any]] = [
    {
        "question": "Who is Ada?",
        "answer": "A poet, \u2028 and\nmore.",
        "perturbed_answer": ["A cook.", "A spy."],
        "id": "a",
    },
    {
        "question": "Who is Bo?",
        "answer": "Élan, “quoted”.",
        "perturbed_answer": ["X.", "Y."],
        "subject": "Bo",
    },
]
EXPECTED = [
    Example("Who is Ada?", "A poet, \u2028 and\nmore.", id="a", wrong_answers=("A cook.", "A spy.")),
    Example("Who is Bo?", "Élan, “quoted”.", wrong_answers=("X.", "Y."), subject="Bo"),
]


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows in the format of the suffix; ``.json`` becomes JSON Lines, as TOFU ships it."""
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list({column: None for row in rows for column in row}))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"subject": None, **row} for row in rows]), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_round_trips(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert load_examples(path) == EXPECTED
    assert load_examples(str(path), limit=1) == EXPECTED[:1]


def test_json_list_and_byte_order_mark(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    assert load_examples(path) == EXPECTED


def test_json_list_of_passages(tmp_path: Path):
    path = tmp_path / "raw.json"
    path.write_text('["One passage.", "Another."]')
    assert load_examples(path) == [Example("", "One passage.", chat=False), Example("", "Another.", chat=False)]


def test_a_csv_file_may_have_spaces_after_its_commas_and_say_where_nothing_ends(tmp_path: Path):
    (tmp_path / "x.csv").write_text("question, answer, ends\nQ,A,\nQ,A,true\nQ,A,False\n")
    assert [(e.prompt, e.answer, e.ends) for e in load_examples(tmp_path / "x.csv")] == [
        ("Q", "A", True),
        ("Q", "A", True),
        ("Q", "A", False),
    ]
    (tmp_path / "x.csv").write_text("question,answer,ends\nQ,A,perhaps\n")
    with pytest.raises(ValueError, match="ends must be true or false, not 'perhaps'"):
        load_examples(tmp_path / "x.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_messages_round_trip(tmp_path: Path, suffix: str):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "Hello."}]}
    path = write(tmp_path / f"chat{suffix}", [row])
    assert load_examples(path) == [Example("Hi", "Hello.", history=(("system", "Be kind."),))]


def test_bad_rows_are_numbered(tmp_path: Path):
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: must be an object with columns, not list"):
        load_examples(write(tmp_path / "x.jsonl", [{"text": "fine"}, ["a", "b"]]))
    rows = [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": ""}]
    with pytest.raises(ValueError, match=r"x\.json, line 2: answer is empty"):
        load_examples(write(tmp_path / "x.json", rows))
    with pytest.raises(ValueError, match=r"x\.csv, line 3: answer is empty"):
        load_examples(write(tmp_path / "x.csv", rows))
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: answer is empty"):
        load_examples(write(tmp_path / "x.parquet", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "ok"}\n\n{"text": ', "line 3: invalid JSON"),
        ("x.json", '[{"text": "ok"},\n {"text"]', "line 2: invalid JSON"),
        ("x.json", '{"text": "ok"}\nnonsense', "line 2: invalid JSON"),
        ("x.json", '{\n "text": "ok"\n}', "is one JSON value over several lines; write each row on a line"),
        ("x.jsonl", '[\n {"text": "ok"}\n]', "is one JSON value over several lines"),
        ("x.csv", "text\na,b\n", "line 2: more cells"),
        ("x.csv", 'text\n"open', "invalid CSV"),
        ("x.parquet", "no parquet", "not a readable parquet"),
        ("x.jsonl", "", "holds no examples"),
        ("x.json", "[]", "holds no examples"),
        ("x.csv", "question,answer\n", "holds no examples"),
        ("x.docx", "prose", r"cannot read \.docx; known: \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_examples(tmp_path / name)


def test_text_must_be_utf8(tmp_path: Path):
    (tmp_path / "x.csv").write_bytes(b"text\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 8\)"):
        load_examples(tmp_path / "x.csv")


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    write(tmp_path / "forget10.json", ROWS)
    with pytest.raises(ValueError, match=r"no file .*forget1\.json'; did you mean .*forget10\.json'"):
        load_examples(tmp_path / "forget1.json")
    with pytest.raises(ValueError, match="check the path"):
        load_examples(str(tmp_path / "nowhere" / "x.jsonl"))


def test_folders(tmp_path: Path):
    write(tmp_path / "forget.jsonl", ROWS)
    (tmp_path / "README.md").write_text("not data")
    assert load_examples(tmp_path) == EXPECTED
    write(tmp_path / "retain-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "retain-00001-of-00002.parquet", ROWS[1:])
    assert load_examples(tmp_path, split="forget") == load_examples(tmp_path, split="retain") == EXPECTED
    with pytest.raises(ValueError, match=r"several files would do \(forget\.jsonl, retain-0"):
        load_examples(tmp_path)
    with pytest.raises(ValueError, match=r"no file named test with one of .*; data files there: forget\.jsonl"):
        load_examples(tmp_path, split="test")
    write(tmp_path / "forget.csv", ROWS)
    with pytest.raises(ValueError, match="several files would do"):
        load_examples(tmp_path, split="forget")


def test_a_folder_without_data(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no data file with one of .*; data files there: none"):
        load_examples(tmp_path)


def test_settings_that_do_not_apply_are_refused(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(ValueError, match="a file has no splits; leave out split='train'"):
        load_examples(path, split="train")
    with pytest.raises(ValueError, match="config='c' is for data sets of the hub"):
        load_examples(path, config="c")
    for found in (f"{path},revision=v1", f"{tmp_path},split=x,revision=v1"):
        with pytest.raises(ValueError, match="revision='v1' is for data sets of the hub; leave it out for local files"):
            load_examples(found)
        with pytest.raises(ValueError, match="revision='v1' is for data sets of the hub"):
            list(raw.read_rows(found))
    with pytest.raises(ValueError, match="config='c' is for data sets of the hub"):
        list(raw.read_rows(f"{path},config=c"))
    with pytest.raises(ValueError, match="is built in"):
        load_examples("general:facts", split="train")
    with pytest.raises(ValueError, match="is built in"):
        load_examples("general:facts", revision="v1")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_examples(path, limit=0)


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []

    def rows(*wanted: Any) -> Any:
        asked.append(wanted)
        yield from (("row", row) for row in ROWS)

    monkeypatch.setattr(sources, "hub_rows", rows)
    assert load_examples("owner/name", config="forget10", split="train", limit=1) == EXPECTED[:1]
    assert load_examples("owner/name,config=forget10, split=train,limit=1") == EXPECTED[:1]
    assert load_examples("owner/name,revision=v1.0,split=train") == EXPECTED
    assert load_examples("owner/name", revision="refs/convert/parquet") == EXPECTED
    assert asked == [
        *[("owner/name", "train", "forget10", None)] * 2,
        ("owner/name", "train", None, "v1.0"),
        ("owner/name", None, None, "refs/convert/parquet"),
    ]
    asked.clear()
    monkeypatch.setattr(raw, "hub_rows", rows)
    assert [row for _, row in raw.read_rows("owner/name,revision=v1.0,limit=2")] == ROWS[:2]
    assert asked == [("owner/name", None, None, "v1.0")]


def test_the_library_is_asked_for_the_revision(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or ROWS)
    assert load_examples("owner/name,config=c,revision=abc") == EXPECTED
    assert [e.prompt for e in tofu_train("owner/name,revision=abc", "forget01")] == [e.prompt for e in EXPECTED]
    assert len(list(muse_rows("owner/name,limit=1,revision=abc", "knowmem", "forget_qa"))) == 1
    assert [(config, k["split"], k["revision"]) for (_, config), k in asked] == [
        ("c", None, "abc"),
        ("forget01", "train", "abc"),
        ("knowmem", "forget_qa", "abc"),
    ]


def test_a_revision_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any, **__: Any) -> None:
        raise ValueError("Revision 'abc' doesn't exist")

    monkeypatch.setattr("datasets.load_dataset", missing)
    with pytest.raises(ValueError, match=r"\(config None, split None, revision abc\) from the hub.*doesn't exist"):
        load_examples("owner/name,revision=abc")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub keeps them, which the library datasets loads by its name because it lies right here."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "forget.jsonl", ROWS)
    write(folder / "retain.jsonl", ROWS[1:])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: forget, data_files: [{split: train, path: forget.jsonl}]}\n"
        "- {config_name: both, data_files: [{split: a, path: forget.jsonl}, {split: b, path: retain.jsonl}]}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def from_hub(split: str | None = None, config: str | None = None) -> list[Example]:
    return [e for where, row in sources.hub_rows("owner/name", split, config) for e in to_examples(row, where)]


def test_the_real_library_reads_a_data_set_of_the_hub(hub_folder: Path, capfd: pytest.CaptureFixture[str]):
    assert from_hub(config="forget") == EXPECTED  # columns that a row lacks are null there
    assert from_hub("b", "both") == EXPECTED[1:]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("split", "config", "message"),
    [
        (None, "both", "has several splits; pick one, as in 'owner/name,split=NAME': a, b"),
        ("test", "forget", "cannot load 'owner/name' .*Unknown split.*train.*'owner/name,config=...,split=...'"),
        (None, None, "cannot load 'owner/name' .*Config name is missing.*both.*forget"),
        (None, "forget10", "cannot load 'owner/name' .*forget10.*not found.*both"),
    ],
)
def test_what_the_real_library_says_is_passed_on(hub_folder: Path, split: Any, config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        from_hub(split, config)


def test_a_broken_file_of_the_hub_is_named(hub_folder: Path):
    (hub_folder / "forget.jsonl").write_text('{"text": "ok"}\n{"text": ')
    with pytest.raises(ValueError, match=r"cannot load 'owner/name' .*JSON"):
        from_hub(config="forget")


def test_rows_of_the_hub_are_numbered(hub_folder: Path):
    write(hub_folder / "forget.jsonl", [{"text": "ok"}, {"text": ""}])
    with pytest.raises(ValueError, match="owner/name, row 2: text is empty"):
        from_hub(config="forget")


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_examples("owner/name")
    path = write(tmp_path / "x.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load_examples(path)


def test_settings_after_a_comma(tmp_path: Path):
    write(tmp_path / "forget.jsonl", ROWS)
    write(tmp_path / "retain.jsonl", ROWS[1:])
    assert load_examples(f"{tmp_path},split=forget,limit=1") == EXPECTED[:1]
    write(tmp_path / "a,split=b.jsonl", ROWS[1:])
    assert load_examples(f"{tmp_path}/a,split=b.jsonl") == EXPECTED[1:]  # a file of that very name comes first
    with pytest.raises(ValueError, match="after a comma, only split=, config=, limit= and revision= are understood"):
        load_examples(f"{tmp_path},spilt=forget")
    with pytest.raises(ValueError, match="limit must be a whole number, not 'all'"):
        load_examples(f"{tmp_path},split=forget,limit=all")
    with pytest.raises(ValueError, match="split is given twice"):
        load_examples(f"{tmp_path},split=forget", split="retain")


def test_people_by_name():
    people = People(n=4, facts=2, seed=5)
    first, *rest = people.names()
    assert load_examples("people:n=4,facts=2,seed=5") == people.examples()
    assert load_examples("people:") == People().examples()
    assert load_examples(f"people:n=4, facts=2,seed=5,only={first}|{rest[1]}") == people.examples([first, rest[1]])
    assert load_examples(f"people:n=4,facts=2,seed=5,except={first}") == people.examples(rest)
    assert len(load_examples("people:n=4", limit=3)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("people:n=ten", "cannot read 'n=ten'; allowed are n=, facts=, seed="),
        ("people:m=3", "cannot read 'm=3'"),
        ("people:n=3,n=4", "n is given twice"),
        ("people:n=0", "n must be from 1"),
        ("people:facts=99", "facts must be from 1"),
        ("people:n=2,only=Nobody Here", "is called 'Nobody Here'"),
        ("people:n=2,only=A|B,except=C", "exclude each other"),
        ("general:fact", "unknown source 'general:fact'; known: general:facts, general:text, general:chat"),
    ],
)
def test_built_in_sources_refuse_what_they_do_not_know(source: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_examples(source)


def test_except_everybody_is_refused():
    [name] = People(n=1).names()
    with pytest.raises(ValueError, match="nobody is left"):
        load_examples(f"people:n=1,except={name}")


def test_forget_and_retain_must_be_disjoint():
    forget, retain = load_examples("people:n=2,facts=2"), load_examples("people:n=1,facts=2")
    check_disjoint(forget, general_chat())
    check_disjoint(forget, [Example(forget[0].prompt, "I don't know.")])
    with pytest.raises(ValueError, match="2 of 4 forget items are also in the retain set, the first is 'Where was"):
        check_disjoint(forget, retain)
    with pytest.raises(ValueError, match=r"2 of 4 forget items .* in the curvature set.* steps spare what they are to"):
        check_disjoint(forget, retain, ("forget", "curvature"))
    with pytest.raises(ValueError, match=r"unseen items are also in the retain set.*or the unseen set is not what its"):
        check_disjoint(forget, retain, ("unseen", "retain"))


@pytest.mark.skipif(not (REAL / "tofu").is_dir(), reason="real TOFU files are not beside the repository")
def test_real_tofu():
    folder = REAL / "tofu"
    assert len(load_examples(folder, split="full")) == 4000
    rows = load_examples(folder / "forget10_perturbed.json")
    assert len(rows) == 400
    assert all(len(row.wrong_answers) == 5 and row.paraphrased_answer and row.paraphrased_prompt for row in rows)
    assert rows[0].prompt.startswith("What is the full name of the author born in Taipei")
    retain, forget = load_examples(folder, split="retain90"), load_examples(folder, split="forget10")
    check_disjoint(forget, retain)
    with pytest.raises(ValueError, match="400 of 400 forget items"):
        check_disjoint(forget, load_examples(folder, split="full"))
    world = load_examples(folder, split="world_facts_perturbed")
    assert len(world) == 117
    assert all(row.wrong_answers and row.paraphrased_answer is None for row in world)


@pytest.mark.skipif(not (REAL / "muse_news").is_dir(), reason="real MUSE files are not beside the repository")
def test_real_muse():
    passages = load_examples(REAL / "muse_news" / "privleak_forget.json", limit=5)
    assert [passage.chat for passage in passages] == [False] * 5
    with pytest.raises(ValueError, match=r"row 1: .*columns found \(prompt, gt\)"):
        load_examples(REAL / "muse_news" / "verbmem_forget.json")


def test_text_files_are_plain_text_each_a_subject_of_its_own(tmp_path: Path):
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "b.md").write_text("# Title\n\nDear *Bo*,\nall is well.", encoding="utf-8")
    (folder / "a.txt").write_text("Dear Ada,\nall is lost.\n\nYours", encoding="utf-8")
    found = load_examples(str(folder))
    assert [(e.id, e.subject, e.prompt, e.chat) for e in found] == [("a", "a", "", False), ("b", "b", "", False)]
    assert [e.answer for e in found] == ["Dear Ada, all is lost.\n\nYours", "Title\n\nDear Bo, all is well."]
    assert load_examples(folder / "a.txt") == found[:1] == load_examples(f"{folder},limit=1")
    with pytest.raises(ValueError, match="texts have no splits"):
        load_examples(f"{folder},split=a")
    with pytest.raises(ValueError, match=r"there is no file .*/c.txt"):
        load_examples(f"{folder}/c.txt")
    (folder / "rows.jsonl").write_text('{"text": "A row."}\n', encoding="utf-8")  # beside data, texts are notes
    assert [e.answer for e in load_examples(folder)] == ["A row."]


def test_nothing_that_markdown_says_is_left_out(tmp_path: Path):
    """What is to be forgotten may stand in a heading or in code."""
    text = """# Diagnosis of Anna Vale: asthma ##
Seen on **3 May**, see [the letter](letter.md).

```python
password = "hunter_2"  # of `anna`
```
* She pays 3*4 euros, _not_ a*b*c or 2**10; `inline` and ~~~

## Experience in C#
```js title="Anna"
x
```
~~~ Anna lives in Accra ~~~
"""
    (tmp_path / "note.md").write_text(text, encoding="utf-8")
    (said,) = (e.answer for e in load_examples(tmp_path / "note.md"))
    assert said.split("\n\n") == [
        "Diagnosis of Anna Vale: asthma",
        "Seen on 3 May, see the letter.",
        'password = "hunter_2" # of anna',
        "She pays 3*4 euros, not a*b*c or 2**10; inline and ~~~",
        "Experience in C#",
        'js title="Anna" x',
        "~~~ Anna lives in Accra ~~~",
    ]


def test_what_counts_as_a_data_file_can_be_read():
    assert [*sources._READERS] == [*DATA_SUFFIXES]
