"""MUSE on miniature data, against plain transcriptions; real articles are counted, never shown."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from sklearn.metrics import roc_auc_score
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.benchmarks.base import digest, hashed, pick
from soul.benchmarks.muse import Muse, chunks, muse_train, overlap
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, measure
from soul.metrics.memorization import extraction_strength
from soul.types import Ask, Example, Row, Score

NEWS = Path(__file__).parents[2].parent / "shared" / "data" / "muse_news"
needs_news = pytest.mark.skipif(not NEWS.is_dir(), reason="MUSE-News is not here")
PLACES = ("harbour", "mill", "orchard", "bridge", "chapel", "market", "tower", "quarry")


def passage(kind: str, i: int) -> str:
    return f"On day {i} the {kind} council of {PLACES[i % 8].title()} voted to move the {PLACES[(i + 3) % 8]}. " * 2


def write(folder: Path, name: str, rows: list, *, lines: bool = False) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")


def corpus(folder: Path, *, n: int = 6) -> str:
    """Write a miniature of MUSE with the layout and the columns of its files."""
    asked = [{"question": f"What moved on day {i}?", "answer": f"The {PLACES[(i + 3) % 8]}."} for i in range(n)]
    shots = [{"question": f"What stayed on day {i}?", "answer": f"The {PLACES[i]}."} for i in range(2)]
    write(folder, "verbmem_forget.json", [{"prompt": passage("town", i), "gt": passage("town", i)} for i in range(n)])
    for side in ("forget", "retain2"):
        write(folder, f"knowmem_{side}_qa.json", asked)
        write(folder, f"knowmem_{side}_qa_icl.json", shots)
    for side in ("forget", "retain2", "holdout"):
        write(folder, f"privleak_{side}.json", [passage(side, i) for i in range(n)])
    write(folder, "raw_forget.json", [passage("town", i) for i in range(n)] + [""])
    for k in (2, 3, 4):
        write(folder, f"sust_forget_{k}.json", [passage(f"town{k}", i) for i in range(n)])
        write(folder, f"scal_forget_{k}.json", [passage(f"town{j}", i) for j in range(1, k + 1) for i in range(n)])
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus(tmp_path_factory.mktemp("muse"))


def by_name(scores: list[Score]) -> dict[tuple[str, str], Score]:
    named = {(score.metric, score.split): score for score in scores}
    assert len(named) == len(scores), "two scores share a name"
    return named


def test_splits_and_what_is_asked_of_them(source: str) -> None:
    muse = Muse(source=source)
    splits = muse.splits()
    assert {name: len(examples) for name, examples in splits.items()} == dict.fromkeys(
        ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout"), 6
    )
    assert muse.missing() == {}
    assert muse.asks() == {
        "verbmem": Ask(likelihood=False, max_new_tokens=128, tokens=True),
        "knowmem_forget": Ask(likelihood=False, max_new_tokens=32),
        "knowmem_retain": Ask(likelihood=False, max_new_tokens=32),
        "privleak_forget": Ask(generate=False, tokens=True),
        "privleak_holdout": Ask(generate=False, tokens=True),
    }
    assert not any(e.chat for examples in splits.values() for e in examples)
    ids = [e.id for examples in splits.values() for e in examples]
    assert len(set(ids)) == len(ids)
    assert splits["knowmem_forget"][1].prompt == (
        "Question: What stayed on day 0?\nAnswer: The harbour.\n\n"
        "Question: What stayed on day 1?\nAnswer: The mill.\n\n"
        "Question: What moved on day 1?\nAnswer:"
    )
    spaced = Muse(source=source, compat=True).splits()["knowmem_forget"][1].prompt
    assert spaced == splits["knowmem_forget"][1].prompt + " "
    assert all(e.prompt == "" for e in splits["privleak_forget"])
    assert Muse(source=source, gradient_norm=True).asks()["privleak_holdout"].gradient_norm


def test_the_layout_of_the_public_repository_and_json_lines_are_read_too(tmp_path: Path, source: str) -> None:
    for file in Path(source).glob("*.json"):
        subset, _, split = file.stem.partition("_")
        write(tmp_path, f"{subset}/{split}.jsonl", json.loads(file.read_text()), lines=True)
    assert Muse(source=str(tmp_path)).splits() == Muse(source=source).splits()
    assert Muse(source=str(tmp_path)).missing() == {}
    texts = [{"text": text} for text in json.loads((Path(source) / "privleak_forget.json").read_text())]
    write(tmp_path, "privleak/forget.jsonl", texts, lines=True)  # the hub's column
    assert Muse(source=str(tmp_path)).splits() == Muse(source=source).splits()


def test_what_is_missing_is_left_out_and_named(tmp_path: Path) -> None:
    muse = Muse(source=corpus(tmp_path))
    (tmp_path / "privleak_holdout.json").unlink()
    (tmp_path / "knowmem_retain2_qa_icl.json").unlink()
    (tmp_path / "scal_forget_3.json").unlink()
    assert set(muse.splits()) == set(muse.asks()) == {"verbmem", "knowmem_forget"}
    missing = muse.missing()
    assert missing.keys() == {"knowmem_retain", "privleak_holdout", "scal"}
    assert "privleak_holdout.json" in missing["privleak_holdout"]
    assert "knowmem_retain_qa_icl" in missing["knowmem_retain"]
    assert missing["scal"].endswith("scal_forget_3")
    write(tmp_path, "verbmem_forget.json", [{"prompt": "a"}])
    assert "row 1: needs text in prompt, gt; it has prompt" in muse.missing()["verbmem"]
    for file in tmp_path.glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="none of MUSE's sets can be loaded"):
        muse.splits()


def test_limit_is_fixed_and_nested(source: str) -> None:
    two, four = (Muse(source=source, limit=n).splits() for n in (2, 4))
    for name, chosen in two.items():
        assert len(chosen) == 2
        assert [e for e in four[name] if e in chosen] == chosen
    assert two == Muse(source=source, limit=2).splits()
    assert pick([Example("", str(i)) for i in range(3)], 5, 0) == [Example("", str(i)) for i in range(3)]


@pytest.mark.parametrize("bad", [{"corpus": "films"}, {"limit": 0}, {"min_k": 1.5}])
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Muse(**bad)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        Muse(source="/no/such/folder").splits()


def lcs_f1(generated: str, answer: str) -> float:
    """ROUGE-L F1 of the words as they are, by the textbook's recursion."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (generated, answer))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    longest = table[-1][-1]
    return 2 * longest / (len(a) + len(b)) if longest else 0.0


def made(split: str, i: int, rng: random.Random, level: float = 2.0) -> Row:
    """A made-up row."""
    words = ["the", "mills", "moved", "moves", "day", "Question:", "to", "harbour"]
    logps = [-rng.random() * level for _ in range(rng.randrange(2, 12))]
    row = Row(
        id=f"{split}:{i}",
        subject="",
        prompt="" if split.startswith("privleak") else f"prompt {i}",
        answer=" ".join(rng.choices(words, k=8)),
        nll=-sum(logps) / len(logps) if split.startswith("privleak") else math.nan,
        tokens=len(logps),
    )
    if not split.startswith("privleak"):
        row["generated"] = " ".join(rng.choices([*words, "\n\n", "\nQuestion"], k=8))
    if not split.startswith("knowmem"):
        row["token_logps"], row["token_z"] = logps, [rng.gauss(0, 1) for _ in logps]
        row["token_matches"] = [int(rng.random() < 0.8) for _ in logps]
    return row


def measured(seed: int, level: float = 2.0) -> dict[str, list[Row]]:
    rng = random.Random(seed)
    names = ("verbmem", "knowmem_forget", "knowmem_retain")
    rows = {name: [made(name, i, rng) for i in range(12)] for name in names}
    rows["privleak_forget"] = [made("privleak_forget", i, rng, level) for i in range(12)]
    rows["privleak_holdout"] = [made("privleak_holdout", i, rng, 2.5) for i in range(15)]
    return rows


def retrained(rows: dict[str, list[Row]], other: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return rows of the same texts with the likelihoods of others."""
    taken = ("token_logps", "token_z", "nll")
    return {
        name: [cast("Row", {**row, **{k: v for k, v in found.items() if k in taken}})
               for row, found in zip(rows[name], other[name], strict=True)]
        for name in rows
    }  # fmt: skip


def test_scores_are_those_of_plain_loops() -> None:
    ours = measured(0)
    theirs = retrained(ours, measured(1, level=3.0))
    scores = by_name(Muse().score(ours, theirs))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    verbatim = [lcs_f1(row.get("generated", ""), row["answer"]) for row in ours["verbmem"]]
    assert scores["verbmem", "forget"].value == pytest.approx(mean(verbatim))
    for side, better in (("forget", "lower"), ("retain", "higher")):
        values = []
        for row in ours[f"knowmem_{side}"]:
            text = row.get("generated", "")
            for stop in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(stop)[0]
            values.append(lcs_f1(text, row["answer"]))
        assert scores["knowmem", side].value == pytest.approx(mean(values))
        assert scores["knowmem", side].better == better

    def published_auc(rows: dict[str, list[Row]]) -> float:
        """MUSE's ``forget_holdout_Min-40%``: holdout on the positive side, a low surprise counting for it."""
        surprise = {}
        for side in ("forget", "holdout"):
            surprise[side] = []
            for row in rows[f"privleak_{side}"]:
                logps = sorted(row.get("token_logps", []))
                take = max(1, int(len(logps) * 0.4))
                surprise[side].append(-mean(logps[:take]))
        labels = [0] * len(surprise["forget"]) + [1] * len(surprise["holdout"])
        return float(roc_auc_score(labels, [-value for value in surprise["forget"] + surprise["holdout"]]))

    auc, without = published_auc(ours), published_auc(theirs)
    assert scores["mia_min_k_auc", "forget"].value == pytest.approx(1 - auc)
    assert scores["privleak", "forget"].value == pytest.approx(100 * (auc - without) / without)
    beside, alone = (
        scores["mia_min_k_auc_of_reference", "forget"],
        by_name(Muse().score(theirs))["mia_min_k_auc", "forget"],
    )
    assert (beside.value, beside.low, beside.better) == (alone.value, alone.low, "")
    strength = [extraction_strength(row.get("token_matches", [])) for row in ours["verbmem"]]  # no end of turn
    assert scores["extraction_strength", "forget"].value == pytest.approx(mean(strength))
    assert {"mia_loss_auc", "mia_zlib_auc", "mia_min_k_plus_auc", "mia_reference_auc"} <= {m for m, _ in scores}


def test_scores_where_rows_allow() -> None:
    rows = measured(2)
    alone = by_name(Muse().score(rows))
    assert ("privleak", "forget") not in alone
    assert ("mia_min_k_auc_of_reference", "forget") not in alone
    assert not any(m.startswith("mia") for m, _ in by_name(Muse().score({"verbmem": rows["verbmem"]})))
    bare = {k: v for k, v in rows["verbmem"][0].items() if k != "generated"}
    with pytest.raises(ValueError, match="got none"):
        Muse(memorization=False).score({"verbmem": [bare]})  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got none"):
        Muse().score({})
    with pytest.raises(ValueError, match="generation switched on"):
        overlap("verbmem", bare)  # type: ignore[arg-type]
    other = measured(2)
    other["privleak_forget"][0]["answer"] = "another passage"
    with pytest.raises(ValueError, match="same examples"):
        Muse().score(rows, other)


def test_a_question_that_goes_on_is_cut_and_a_passage_is_not() -> None:
    row = made("verbmem", 0, random.Random(0))
    row["answer"], row["generated"] = "The mill.", "The mill.\n\nQuestion: What else? Answer: The bridge."
    assert overlap("knowmem_forget", row) == 1.0
    assert overlap("verbmem", row) < 0.5
    row["generated"] = ""
    assert overlap("knowmem_forget", row) == overlap("verbmem", row) == 0.0
    row["generated"], row["answer"] = "mills", "mill"
    assert overlap("verbmem", row) == 0.0  # words as they are, no stems


def test_public_rows_hold_no_text_and_their_parts_of_the_scores() -> None:
    muse, rows = Muse(), measured(3)
    public = muse.public_rows(rows)
    written = json.dumps(public)
    for found in rows.values():
        for row in found:
            assert row["id"] in written
            assert digest(row["answer"]) in written
            for text in (row["prompt"], row["answer"], row.get("generated", "")):
                assert len(text) < 3 or json.dumps(text) not in written
    assert "token_" not in written
    scores = by_name(muse.score(rows))
    for split, metric, name in (
        ("verbmem", "verbmem", "rougeL_f1"),
        ("verbmem", "extraction_strength", "extraction_strength"),
        ("verbmem", "exact_memorization", "exact_memorization"),
        ("knowmem_forget", "knowmem", "rougeL_f1"),
    ):
        values = [row["values"][name] for row in public[split]]  # type: ignore[typeddict-item]
        assert sum(values) / len(values) == pytest.approx(scores[metric, "forget"].value)
    sides = [[row["values"]["mia_min_k"] for row in public[f"privleak_{s}"]] for s in ("forget", "holdout")]  # type: ignore[typeddict-item]
    auc = roc_auc_score([1] * 12 + [0] * 15, sides[0] + sides[1])
    assert scores["mia_min_k_auc", "forget"].value == pytest.approx(auc)
    with pytest.raises(ValueError, match="published record"):
        muse.score(public)


def test_digests() -> None:
    assert digest("Ada") == "sha256:99a563ab2f6e21e96998f9fddd2a2bab82b70ac019579502b8d7fc0032ff62bb"
    row = Row(id="a", subject="", prompt="", answer="Ada", nll=1.0, tokens=1, samples=["Ada"], token_logps=[-1.0])
    kept = hashed(row)
    assert kept["prompt"] == ""
    assert kept.get("samples") == [digest("Ada")]
    assert "token_logps" not in kept


def test_a_corpus_is_cut_without_loss(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = muse_train(source, "forget")
    assert len(documents) == 6  # the empty one is left out
    pieces = muse_train(source, "forget", tokenizer, tokens=33)
    assert "".join(e.answer for e in pieces) == "\n\n".join(e.answer for e in documents)
    counts = [len(tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in pieces]
    assert set(counts[:-1]) == {32}
    assert 0 < counts[-1] <= 32
    assert all(not e.prompt and not e.chat for e in pieces)
    assert len({e.id for e in pieces}) == len(pieces)
    accents = ["Zoë's café, naïve", "日本語の新聞 " * 9]
    assert "".join(chunks(accents, tokenizer, 8)) == "\n\n".join(accents)
    with pytest.raises(ValueError, match="2 or more"):
        chunks(accents, tokenizer, 1)


def test_corpora_of_scaling_and_sustainability(source: str, tmp_path: Path) -> None:
    texts = {name: {e.answer for e in muse_train(source, name)} for name in ("forget", "scal_1", "sust_1", "sust_2")}
    assert texts["forget"] == texts["scal_1"] == texts["sust_1"]
    assert not texts["sust_1"] & texts["sust_2"]
    assert len(muse_train(source, "scal_3")) == 18
    assert len(muse_train(source, "privleak_retain")) == 6
    with pytest.raises(ValueError, match="unknown MUSE corpus"):
        muse_train(source, "train")
    with pytest.raises(ValueError, match="raw_retain1"):
        muse_train(source, "retain1")
    write(tmp_path, "sust_forget_1.json", ["its own"])
    assert [e.answer for e in muse_train(str(tmp_path), "sust_1")] == ["its own"]


def test_measured_on_a_model(
    source: str,
    tmp_path: Path,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """All of it on a tiny model: continuations have their own length, passages are scored from their second token."""
    muse, model = Muse(source=source, limit=2), make_model()
    spec = EvaluationSpec(max_new_tokens=3, max_length=240)
    rows = measure(muse, model, tokenizer, spec=spec, folder=tmp_path / "rows")
    again = measure(muse, model, tokenizer, spec=spec, folder=tmp_path / "rows")
    assert json.dumps(rows) == json.dumps(again)  # likelihoods that are not asked for are nan
    names = {metric for metric, _ in by_name(muse.score(rows, rows))}
    assert {"verbmem", "knowmem", "privleak", "extraction_strength", "mia_min_k_auc"} <= names
    assert by_name(muse.score(rows, rows))["privleak", "forget"].value == 0.0
    longest = max(len(tokenizer(r.get("generated", ""))["input_ids"]) for r in rows["verbmem"])
    assert longest > 40  # not the evaluation's 3
    for row in rows["privleak_forget"]:
        ids = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        assert len(row.get("token_logps", [])) == len(ids) - 1
    passages = ChatTemplate(tokenizer, 240)
    assert passages.encode(muse.splits()["privleak_forget"][0]).input_ids[-1] != passages.end_of_turn


@needs_news
def test_the_real_news_set_is_read_whole() -> None:
    """Numbers only are compared, so that not even a failure shows an article."""
    muse = Muse(source=str(NEWS))
    splits = muse.splits()
    assert {len(examples) for examples in splits.values()} == {100}
    assert muse.missing().keys() == {"scal"}
    requests = [{e.answer for e in muse_train(str(NEWS), f"sust_{k}")} for k in (1, 2, 3, 4)]
    assert [len(texts) for texts in requests] == [857, 857, 855, 851]
    # said to be disjoint, and not quite: articles were crawled more than once
    shared = [len(texts & set.union(*requests[:k])) for k, texts in enumerate(requests) if k]
    assert shared == [62, 98, 141]
    assert len(requests[0] ^ {e.answer for e in muse_train(str(NEWS), "forget")}) == 0
    assert splits["knowmem_forget"][0].prompt.count("Question: ") == 11
    assert len({e.answer for e in splits["privleak_holdout"]} & {e.answer for e in splits["privleak_forget"]}) == 0
