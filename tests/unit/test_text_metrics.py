"""Overlap and monotony of texts, and calibration, against slow plain transcriptions and other libraries."""

from __future__ import annotations

import builtins
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from soul.metrics import calibration
from soul.metrics.leakage import contains
from soul.metrics.text import bleu, corpus_bleu, repetition, rouge, rouge_l_recall, token_entropy
from soul.types import Row

PAIRS = [
    ("she painted a small boat by the river", "she painted a boat near the river bank"),
    ("one two three four five six", "one two three four five six"),
    ("six five four three two one", "one two three four five six"),
    ("the the the the the the the", "the cat is on the mat"),
    ("something else altogether", "one two three"),
    ("paris", "paris"),
    ("word", "one word of five letters"),
]


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return common(a[:-1], b[:-1]) + 1
    return max(common(a[:-1], b), common(a, b[:-1]))


@pytest.mark.parametrize(("generated", "answer"), [*PAIRS, ("", "an answer"), ("an answer", ""), ("", "")])
def test_rouge_equals_counting(generated: str, answer: str) -> None:
    # words that Porter's stemmer keeps apart
    ours, theirs = generated.split(), answer.split()
    hits = {"rouge1": sum((Counter(ours) & Counter(theirs)).values()), "rougeL": common(ours, theirs)}
    found = rouge(generated, answer)
    for kind, hit in hits.items():
        assert found[f"{kind}_recall"] == pytest.approx(hit / len(theirs) if theirs else 0)
        assert found[f"{kind}_f1"] == pytest.approx(2 * hit / (len(ours) + len(theirs)) if ours and theirs else 0)
    assert found["rougeL_recall"] == rouge_l_recall(generated, answer)


# a recital of each as it stands, within a sentence, and something else of the same script
SCRIPTS = [
    ("Она родилась в Аккре в 1958 году.", "Мать писала: она родилась в Аккре, в 1958 году!", "Ничего не знаю"),
    ("阿克拉", "她出生在加纳的阿克拉。", "我不知道。"),
    ("アクラ", "彼女はアクラで生まれた。", "それは分からない。"),
    ("อักกรา", "เธอเกิดที่อักกราในกานา", "ไม่มี"),
    ("아크라", "그녀는 아크라에서 태어났다.", "모릅니다."),
    ("ໄທ", "ຢູ່ໄທ", "ບໍ່ຮູ້"),
    ("គង្គា", "នៅគង្គា។", "ទេ"),
    ("မြန်မာ", "သူမသည်မြန်မာ၌နေသည်။", "ခဲ"),
    ("Γεννήθηκε στην Άκρα", "Ναι: γεννήθηκε στην ΆΚΡΑ.", "Δεν ξέρω"),  # noqa: RUF001
    ("नई दिल्ली", "वह नई दिल्ली में रहती है।", "दल्ला नइ"),
    ("ولدت في أكرا", "نعم، ولدت في أكرا.", "لا أعرف"),
    ("Ở đó", "Cô ấy ở đó.", "Tôi ăn"),  # Latin, and nothing that the official tokenizer knows
]


@pytest.mark.parametrize(("answer", "said", "other"), SCRIPTS)
def test_a_recital_is_one_in_any_script(answer: str, said: str, other: str) -> None:
    for text in (answer, said):
        assert rouge_l_recall(text, answer) == rouge(text, answer)["rouge1_recall"] == 1
        assert contains(text, answer)
    assert rouge_l_recall(other, answer) == 0
    assert not contains(other, answer)


def test_what_is_left_of_another_script_is_no_recital() -> None:
    answer = "Она родилась в Аккре в 1958 году."
    assert rouge_l_recall("Ничего не знаю про 1958", answer) == pytest.approx(1 / 7)
    assert rouge_l_recall("Her paintings, 李娜", "Her name is painted 李娜_2") == pytest.approx(4 / 7)
    assert rouge("Running in 李", "run 李", stem=False)["rouge1_recall"] == 0.5


@pytest.mark.parametrize("stem", [True, False])
def test_latin_answers_have_the_official_number(stem: bool) -> None:
    answers = ["She paints boats_2 daily", "Jaime Vásquez lives à la façon de Müller", "Çelik, 50 %", "naïve", "", "?!"]
    texts = [*answers, "Она paints 50 Va\u0301squez 李", "Muller VASQUEZ lived"]
    official = RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)
    for text, answer in itertools.product(texts, answers):
        theirs = official.score(answer, text)
        ours = rouge(text, answer, stem=stem)
        for kind in ("rouge1", "rougeL"):
            assert (ours[f"{kind}_recall"], ours[f"{kind}_f1"]) == (theirs[kind].recall, theirs[kind].fmeasure)


def plain_bleu(pairs: Sequence[tuple[str, str]], *, drop: bool) -> float:
    """Transcribe BLEU-4 with exponential smoothing; ``drop`` leaves out orders that the generations do not reach."""
    logs, halved = [], 1.0
    ours, theirs = ([pair[i].split() for pair in pairs] for i in (0, 1))
    for n in range(1, 5):
        hits = every = 0
        for a, b in zip(ours, theirs, strict=True):
            grams, known = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (a, b))
            hits += sum((grams & known).values())
            every += sum(grams.values())
        if every == 0:
            if not drop:
                return 0.0
            break
        if n == 1 and hits == 0:
            return 0.0
        if hits == 0:
            halved /= 2
        logs.append(math.log((hits or halved) / every))
    a, b = sum(map(len, ours)), sum(map(len, theirs))
    return 100 * min(1.0, math.exp(1 - b / a)) * math.exp(sum(logs) / len(logs))


def test_bleu_equals_its_formula() -> None:
    pytest.importorskip("sacrebleu")
    for generated, answer in PAIRS:
        assert bleu(generated, answer) == pytest.approx(plain_bleu([(generated, answer)], drop=True), rel=1e-9)
        assert corpus_bleu([generated], [answer]) == pytest.approx(plain_bleu([(generated, answer)], drop=False))
    texts, answers = zip(*PAIRS, strict=True)
    assert corpus_bleu(texts, answers) == pytest.approx(plain_bleu(PAIRS, drop=False), rel=1e-9)
    assert bleu("paris", "paris") == pytest.approx(100)
    assert bleu("", "paris") == bleu("paris", " ") == bleu("", "") == 0
    assert corpus_bleu(["", ""], ["one", "two"]) == 0
    for wrong in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="a generation for each answer"):
            corpus_bleu(*wrong)


def test_bleu_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "sacrebleu":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install"):
        bleu("a", "a")


@pytest.mark.parametrize("n", [2, 5, 40])
def test_entropy_and_repetition_equal_plain_loops(n: int) -> None:
    tokens = np.random.default_rng(n).integers(6, size=n).tolist()
    shares = [tokens.count(v) / n for v in set(tokens)]
    assert token_entropy(tokens) == pytest.approx(-sum(p * math.log2(p) for p in shares) / math.log2(n))
    for size in (1, 2, 4):
        seen: set[str] = set()
        again = 0
        for i in range(n - size + 1):
            gram = str(tokens[i : i + size])
            again += gram in seen
            seen.add(gram)
        assert repetition(tokens, size) == pytest.approx(again / max(1, n - size + 1))


def test_entropy_and_repetition_of_next_to_nothing() -> None:
    assert [token_entropy(x) for x in ([], ["a"], ["a", "a"], ["a", "b"])] == [0, 1, 0, 1]
    assert math.copysign(1, token_entropy(["a", "a"])) == 1
    assert repetition([], 2) == repetition(["a"], 2) == 0
    with pytest.raises(ValueError, match="n must be 1"):
        repetition(["a"], 0)


def question(nll: float, *wrong: float) -> Row:
    return {"id": "q", "subject": "", "prompt": "", "answer": "", "nll": nll, "tokens": 1, "wrong_nll": list(wrong)}


def test_calibration_equals_plain_loops() -> None:
    rng = np.random.default_rng(0)
    rows = [question(*rng.exponential(size=4)) for _ in range(200)]
    columns = calibration.calibration_columns(rows)
    for row, (confidence, correct, score) in zip(rows, columns.tolist(), strict=True):
        weights = [math.exp(-x) for x in (row["nll"], *row.get("wrong_nll", ()))]
        shares = [w / sum(weights) for w in weights]
        assert confidence == pytest.approx(max(shares))
        assert correct == (shares[0] == max(shares))
        assert score == pytest.approx((shares[0] - 1) ** 2 + sum(p**2 for p in shares[1:]))
    total = 0.0
    for b in range(15):
        picked = [(c, r) for c, r, _ in columns.tolist() if b / 15 < c <= (b + 1) / 15]
        if picked:
            total += abs(sum(r for _, r in picked) / len(picked) - sum(c for c, _ in picked) / len(picked)) * len(
                picked
            )
    assert calibration.expected_calibration_error(columns[:, 0], columns[:, 1]) == pytest.approx(total / 200)


def test_calibration_of_degenerate_answers() -> None:
    error = calibration.expected_calibration_error
    assert error([0.7], [1]) == pytest.approx(0.3)  # one item
    assert error([0.0, 1.0], [0, 1]) == 0
    assert error([0.2 + 1e-12, 0.2], [1, 0], bins=5) == pytest.approx(0.3)  # rounding is no border between bins
    assert calibration.correctness([0.25] * 4) == 0.25
    assert calibration.correctness([0.2, 0.5, 0.3]) == 0
    assert calibration.brier([0.0, 1.0]) == 2
    sure = calibration.option_probabilities(question(1000.0, 2000.0, 2000.0))  # far below the smallest exp
    assert sure.tolist() == [1, 0, 0]
    for wrong in (([], []), ([0.5], [1, 0])):
        with pytest.raises(ValueError, match="as many answers as confidences"):
            error(*wrong)
    with pytest.raises(ValueError, match="no wrong answers"):
        calibration.option_probabilities(question(1.0))
