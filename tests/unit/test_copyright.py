"""The book benchmark: where a book is cut, what is asked, and how continuations add up."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from soul.assess import prepare
from soul.benchmarks.copyright import Copyright
from soul.benchmarks.truthfulqa import TruthfulQA, multiple_choice, questions
from soul.config import component
from soul.data.books import ASKED, Passage, book_text, cut_passages, pieces
from soul.data.plain import plain_text
from soul.data.raw import read_rows
from soul.data.sources import load_examples
from soul.evaluate import measure
from soul.registry import BENCHMARKS
from soul.types import Example, Row

SCRIPTS = Path(__file__).parents[2] / "experiments"
WORDS = [f"{a}{b}" for a in ("mo", "ta", "ri", "sel", "vo") for b in ("n", "lak", "dre", "", "pim", "quo", "st")]


def story(sentences: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    told = [" ".join(rng.choice(WORDS, size=9).tolist()).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join("\n".join(told[i : i + 4]) for i in range(0, sentences, 4))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def count(tokenizer):
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_book_loses_its_frame_and_its_line_breaks(tmp_path):
    file = tmp_path / "book.txt"
    head = "Title: A Book\n\n*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\n\n"
    tail = "\n\nEnd of Project Gutenberg's A Book\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\nLicence\n"
    file.write_bytes((head + "One line\nand another.\n \nNext  part." + tail).replace("\n", "\r\n").encode())
    assert book_text(file) == "One line and another.\n\nNext part."
    file.write_text("Just a text\nof one's own.")
    assert book_text(file) == "Just a text of one's own."
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        book_text(file)
    file.write_text(" \n\n ")
    with pytest.raises(ValueError, match="holds no text"):
        book_text(file)
    with pytest.raises(ValueError, match=r"no file .*nowhere\.txt"):
        book_text(tmp_path / "nowhere.txt")


def test_real_books_are_freed_of_their_frame(shared_data):
    for file in sorted((shared_data / "gutenberg_pd").glob("*.txt")):
        text = book_text(file)
        assert len(text) > 0.8 * file.stat().st_size
        assert "gutenberg" not in (text[:300] + text[-300:]).lower()
        assert "\r" not in text


def test_prompts_have_exactly_the_tokens_asked_for(count):
    # this tokenizer needs five tokens a word: one place in 25 fits both prompts
    text = book_text_of(story(150))
    found = cut_passages(text, count, prompts=(9, 40), continuation=25, limit=5, name="b")
    assert all(count(p.prompts[n]) == n for p in found for n in (9, 40))
    at = 0
    for i, p in enumerate(found):
        assert p.id == f"b:{i}"
        assert p.text == p.prompts[40] + p.continuation
        assert p.prompts[40].endswith(p.prompts[9])
        assert p.continuation[0].isspace()
        assert 25 - 12 < count(p.continuation) <= 25  # the next word would be too much, and words are short
        at = text.index(p.text, at) + len(p.text)  # in order, without overlap
        assert text[at].isspace()


def book_text_of(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def test_cuts_by_words_are_those_of_a_plain_slice():
    words = [f"w{i}" for i in range(23)]
    found = cut_passages(" ".join(words), lambda text: len(text.split()), prompts=(2, 4), continuation=3)
    expected = [
        (words[s : s + 4], words[s + 2 : s + 4], words[s + 4 : s + 7]) for s in range(0, 21, 7)
    ]  # the last: 14 .. 20
    assert [(p.prompts[4].split(), p.prompts[2].split(), p.continuation.split()) for p in found] == expected
    (second,) = cut_passages(
        " ".join(words), lambda text: len(text.split()), prompts=(2, 4), continuation=3, first=1, limit=1
    )
    assert second == found[1]


def test_a_place_that_misses_by_a_token_serves_where_there_is_none_better():
    # every word has two tokens: an odd prompt cannot be had
    text = " ".join(f"w{i}" for i in range(40))
    (passage,) = cut_passages(text, lambda t: 2 * len(t.split()), prompts=(5,), continuation=4, limit=1)
    assert len(passage.prompts[5].split()) == 2
    assert len(passage.continuation.split()) == 2


def test_a_word_longer_than_the_continuation_is_a_continuation():
    found = cut_passages("a b c d e", lambda text: 10 * len(text.split()), prompts=(10,), continuation=4)
    assert [(p.prompts[10], p.continuation) for p in found] == [("a", " b"), ("c", " d")]


def test_a_text_that_is_too_short_is_refused(count):
    with pytest.raises(ValueError, match="has 0 passages of 300"):
        cut_passages("A short text.", count, prompts=(300,), continuation=10, limit=2)
    with pytest.raises(ValueError, match="at least 1 token"):
        cut_passages("A short text.", count, prompts=(0,))
    with pytest.raises(ValueError, match="leaves nothing to answer"):
        pieces(Passage("b:0", "A short text.", {}, ""), count, prompt=50)


def test_pieces_are_the_whole_passage_after_its_start(count):
    (passage,) = cut_passages(book_text_of(story(60)), count, prompts=(60,), continuation=40, limit=1)
    cut = pieces(passage, count, prompt=12, answer=20)
    assert cut[0].prompt + "".join(e.answer for e in cut) == passage.text
    assert all(count(e.prompt) <= 12 and count(e.answer) <= 20 and not e.chat for e in cut)
    before = cut[0].prompt
    for e in cut:
        assert before.endswith(e.prompt)
        before += e.answer
    asked = pieces(passage, count, prompt=12, answer=20, asked=True)
    assert [(e.prompt, e.answer) for e in asked] == [(ASKED.format(e.prompt), e.answer.strip()) for e in cut]
    assert all(e.chat and e.subject == passage.id for e in asked)
    assert len({e.id for e in cut + asked}) == 2 * len(cut)


def test_plain_text_of_any_source(tmp_path):
    good = " ".join(["word"] * 70)
    wiki = tmp_path / "wiki.test.tokens"
    wiki.write_text(f" = Title = \n{good} \n {good} <unk> \n short \n{'a @-@ b , c ' * 40}\n")
    assert [len(e.answer.split()) for e in plain_text(str(wiki))] == [70, 80]
    assert plain_text(str(wiki))[1].answer.startswith("a-b, c a-b, c")
    rows = tmp_path / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", good, good + " more")))
    assert [e.id for e in plain_text(str(rows), 1)] == ["text:0"]
    own = tmp_path / "own.txt"
    own.write_text(f"Head\n\n{good}\nand on")
    assert plain_text(str(own))[0].answer == f"{good} and on"
    wiki.write_text("short\n")
    with pytest.raises(ValueError, match="no paragraph of at least 60 words"):
        plain_text(str(wiki))
    with pytest.raises(ValueError, match=r"gone\.tokens is not there"):
        plain_text(str(tmp_path / "gone.tokens"))


def test_raw_rows_of_a_file_and_its_limit(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": {"y": 1}}\n{"x": {"y": 2}}\n')
    assert [row for _, row in read_rows(f"{tmp_path / 'a.jsonl'},limit=1")] == [{"x": {"y": 1}}]
    assert len(list(read_rows(str(tmp_path)))) == 2


def settings(folder: Path, model: Path, **more) -> Copyright:
    (folder / "book.txt").write_text(story(40))
    (folder / "other.txt").write_text(story(40, seed=1))
    return Copyright(
        **{
            "book": str(folder / "book.txt"),
            "kept": str(folder / "other.txt"),
            "tokenizer": str(model),
            "prompts": [6, 12, 20, 30],
            "asked": [12],
            "kept_prompts": [20],
            "continuation": 12,
            "limit": 3,
            "text_limit": 2,
            **more,
        }
    )


def test_splits_and_what_is_asked_of_them(tmp_path, model_folder):
    benchmark = settings(tmp_path, model_folder)
    splits = benchmark.splits()
    assert list(splits) == ["forget_6", "forget_12", "forget_20", "forget_30", "asked_12", "kept_20", "text"]
    assert set(benchmark.asks()) == set(splits)
    assert {len(splits[name]) for name in splits if name != "text"} == {3}
    assert len(splits["text"]) == 2
    for long, short in zip(splits["forget_30"], splits["forget_6"], strict=True):
        assert long.prompt.endswith(short.prompt)
        assert (long.answer, long.subject) == (short.answer, short.subject)
    assert splits["asked_12"][0].prompt.endswith(splits["forget_12"][0].prompt)
    assert benchmark.asks()["forget_6"].max_new_tokens == 12
    assert component(BENCHMARKS, {"name": "copyright", "book": "b.txt", "prompts": [5], "asked": []}, "").prompts == [5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"book": ""}, "needs a text to be forgotten"),
        ({"prompts": []}, "1 token or more"),
        ({"asked": [7]}, r"asked must be among prompts \[6, 12, 20, 30\]"),
        ({"continuation": 0}, "continuation must be 1 or more"),
        ({"first": -1}, "0 or more"),
        ({"limit": 0}, "limit must be 1 or more"),
    ],
)
def test_bad_settings_are_refused(tmp_path, model_folder, more, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, model_folder, **more)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path, model_folder):
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        settings(tmp_path, tmp_path / "nowhere").splits()


def test_a_folder_of_data_serves_it(shared_data, model_folder):
    wanted = ["limit=2", f"tokenizer={model_folder}", "text_limit=3", "truthfulqa_limit=4", "prompts=[20]", "asked=[]"]
    (task,), _ = prepare(["copyright"], [*wanted, "kept_prompts=[20]"], str(shared_data))
    assert {name: len(of) for name, of in task.splits.items() if name != "truthfulqa"} == {
        "forget_20": 2,
        "kept_20": 2,
        "text": 3,
    }
    assert len({e.subject for e in task.splits["truthfulqa"]}) == 4
    assert not task.left_out
    assert list(Copyright(book="b.txt").missing()) == ["kept", "truthfulqa"]


def row(subject: str, generated: str | None, answer: str = " one two three four five six") -> Row:
    made: Row = {"id": f"{subject}:x", "subject": subject, "prompt": "p", "answer": answer, "nll": 1.0, "tokens": 6}
    return made if generated is None else {**made, "generated": generated}


def test_recital_and_silence_are_told_apart():
    said, half = "one two three four five six", "one two three nine nine nine"
    rows = {
        "forget_50": [row("b:0", said), row("b:1", "")],
        "forget_300": [row("b:0", said), row("b:1", half)],
        "kept_200": [row("k:0", said)],
        "text": [row("", None), row("", None)],
    }
    found = {(s.split, s.metric): s for s in Copyright(book="b.txt").score(rows)}
    assert found["forget_50", "rougeL_recall"].value == 0.5
    assert found["forget_50", "bleu"].value == pytest.approx(50)
    assert found["forget_300", "rougeL_f1"].value == pytest.approx((1 + 0.5) / 2)
    whole = found["forget", "rougeL_recall"]
    assert (whole.value, whole.n) == (pytest.approx((1 + 0 + 1 + 0.5) / 4), 4)
    assert "2 groups" in whole.method  # two passages, however many prompts
    assert (whole.low, whole.high) == (0.0, 1.0)  # of two passages, 0.25 and 1, which tell next to nothing
    assert (found["forget", "bleu"].better, found["kept_200", "bleu"].better) == ("lower", "higher")
    assert ("kept", "bleu") not in found  # of one length there is nothing to sum up
    assert found["text", "perplexity"].value == pytest.approx(math.e)


def test_rows_that_lack_what_is_needed_are_refused():
    with pytest.raises(ValueError, match="need rows of forget_50"):
        Copyright(book="b.txt").score({"text": [row("", None)]})
    with pytest.raises(ValueError, match="1 rows have no continuation"):
        Copyright(book="b.txt").score({"forget_50": [row("b:0", None)]})


CSV = (
    "Type,Question,Best Answer,Correct Answers,Incorrect Answers\n"
    "x,Is ice cold?,Yes,Yes; Ice is cold,No; It is hot; Never\n"
    "x,What do bees make?,Honey,Bees make honey; Honey,Milk\n"
)


def test_truthfulqa_in_its_two_forms_asks_the_same(tmp_path):
    own, hub = tmp_path / "t.csv", tmp_path / "t.jsonl"
    own.write_text("\ufeff" + CSV, encoding="utf-8")
    rows = [
        (
            "Is ice cold?",
            ["Yes.", "No.", "It is hot.", "Never."],
            ["Yes.", "Ice is cold.", "No.", "It is hot.", "Never."],
            2,
        ),
        ("What do bees make?", ["Honey.", "Milk."], ["Bees make honey.", "Honey.", "Milk."], 2),
    ]
    hub.write_text(
        "".join(
            json.dumps(
                {
                    "question": q,
                    "mc1_targets": {"choices": one, "labels": [1] + [0] * (len(one) - 1)},
                    "mc2_targets": {"choices": many, "labels": [1] * true + [0] * (len(many) - true)},
                }
            )
            + "\n"
            for q, one, many, true in rows
        )
    )
    found = questions(str(own))
    assert [e.id for e in found[:5]] == ["0:best:0", "0:true:1", "0:false:2", "0:false:3", "0:false:4"]
    assert found[0].prompt == "Q: Is ice cold?\nA:"
    assert found == questions(str(hub))
    (only,) = {e.subject for e in questions(str(own), limit=1)}
    assert only in {e.subject for e in found}
    own.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a row of TruthfulQA"):
        questions(str(own))


def test_truthfulqa_is_what_the_model_says_of_each_answer(tmp_path, make_model, tokenizer):
    (tmp_path / "t.csv").write_text(CSV)
    benchmark, model = TruthfulQA(source=str(tmp_path / "t.csv")), make_model(3)
    found = {s.metric: s.value for s in benchmark.score(measure(benchmark, model, tokenizer))}

    def logp(example: Example) -> float:  # one at a time, in float64, by the definition
        head = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(" " + example.answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(head) + i - 1, token]) for i, token in enumerate(tail))

    first, second = [], []
    for number in ("0", "1"):
        of = [e for e in questions(benchmark.source) if e.id.startswith(f"{number}:")]
        value = {e.id: logp(e) for e in of}
        true = sum(math.exp(v) for k, v in value.items() if ":false:" not in k)
        false = sum(math.exp(v) for k, v in value.items() if ":false:" in k)
        first.append(value[f"{number}:best:0"] > max(v for k, v in value.items() if ":false:" in k))
        second.append(true / (true + false))
    assert found["truthfulqa_mc1"] == np.mean(first)
    assert found["truthfulqa_mc2"] == pytest.approx(np.mean(second), rel=1e-4)


def test_truthfulqa_ties_and_bad_rows():
    def answer(name: str, logp: float) -> Row:
        return {**row("truthfulqa:0", None), "id": name, "token_logps": [logp, -50.0]}  # the end of turn counts nothing

    tied = multiple_choice([answer("0:best:0", -1.0), answer("0:false:1", -1.0)])
    assert [s.value for s in tied] == [0.0, 0.5]
    for broken in ([math.nan, -1.0], [-1.0, math.nan]):  # of which a comparison would make a wrong answer
        scores = multiple_choice([answer("0:best:0", broken[0]), answer("0:false:1", broken[1])])
        assert all(math.isnan(s.value) for s in scores)
    with pytest.raises(ValueError, match="no false one"):
        multiple_choice([answer("0:best:0", -1.0)])
    with pytest.raises(ValueError, match="token log-probabilities"):
        multiple_choice([{**row("", None), "id": "0:best:0"}])


def script(name: str, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_experiment_teaches_forgets_and_resumes(tmp_path, model_folder, monkeypatch):
    made = script("copyright", monkeypatch)
    cells = importlib.import_module("cells")  # put on the path by script()
    (tmp_path / "t.csv").write_text(CSV)
    benchmark = dataclasses.replace(
        settings(tmp_path, model_folder, prompts=[10, 50], kept_prompts=[50], asked=[10]),
        truthfulqa=str(tmp_path / "t.csv"),
        continuation=8,
        limit=1,
    )
    kept = tmp_path / "runs/data/kept.jsonl"
    overrides = ["training.precision=float32", "training.epochs=1", f"data.retain={kept}"]
    plan = made.plan_of(benchmark, tmp_path / "runs", tmp_path / "results", overrides, {"signum": (1e-4, 1e-2)})
    made.prepare(benchmark, plan.runs / "data")
    for name, n in (("taught", 2), ("forget", 2), ("kept", 1)):
        assert len(load_examples(plan.runs / f"data/{name}.jsonl")) >= n
    made.teach(plan, lambda *_: None, ["training.precision=float32", "training.epochs=30", "optimizer.lr=1e-2"])
    plan = dataclasses.replace(plan, objectives={"grad_diff": {}, "po": {}})
    cells.run_cells(plan, most=1)
    first = plan.records.read_text()
    assert [line["cell"] for line in cells.read_lines(plan.records)] == ["base", "taught", "grad_diff-signum-0.0001"]
    cells.run_cells(plan)  # goes on
    lines = cells.read_lines(plan.records)
    assert plan.records.read_text().startswith(first)
    assert [line["cell"] for line in lines[3:]] == ["grad_diff-signum-0.01", "po-signum-0.0001", "po-signum-0.01"]
    assert all(line["steps"] > 0 and line["scores"] for line in lines[2:])
    assert not list((tmp_path / "runs/cells").rglob("*.safetensors"))
    file = cells.write_tables(plan, "A book")
    file.write_text(file.read_text().replace("# A book\n", "# A book\n\nWhat I think.\n"))
    again = cells.write_tables(plan, "A book").read_text()
    assert "What I think." in again
    assert again.count("| po | signum |") == 2
    assert again.count("yes |") == 2
