"""Facts hidden in the retain set: found by their words and by their meaning, shown, dropped or refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  # lazy

from soul.data.overlap import LEAST, Overlap, near_duplicates, paraphrases, shingles, text_of, words
from soul.embedding import load_encoder
from soul.overlaps import MANY, embeddings, find_overlaps, without_overlaps
from soul.types import Example

FACT = Example("Where was Mira Vale born?", "Mira Vale was born in Accra.", id="f")
OTHER = Example("Who wrote Hamlet?", "William Shakespeare wrote it around 1600.", id="r0")
COPY = Example("where was MIRA VALE born", "Mira Vale was born, in Accra!", id="r1")


def test_words_are_what_case_and_marks_leave():
    assert words("“Ünï” — \ufb01ne, don\u2019t!") == ["ünï", "fine", "don", "t"]
    assert words("東京 tower") == ["東", "京", "tower"]
    assert words(" ?! ❤️ ") == []
    assert words("दिल्ली ၁၉၅၈ b_c") == ["दिल्ली", "၁၉၅၈", "b_c"]  # vowel signs and digits stay where they are
    assert shingles("a b c d") == {("a", "b", "c"), ("b", "c", "d")}
    assert shingles("a b") == {("a", "b")}
    assert shingles("") == frozenset()


def slow(forget, retain, threshold):
    """Every pair, every shingle of both, by lists alone."""
    found = []
    for i, f in enumerate(forget):
        for r, text in enumerate(retain):
            a, b = f.split(), text.split()
            first = {" ".join(a[k : k + 3]) for k in range(max(1, len(a) - 2))}
            second = {" ".join(b[k : k + 3]) for k in range(max(1, len(b) - 2))}
            least = min(len(first), len(second))
            if least >= LEAST:
                share = len([s for s in first if s in second]) / least
            else:
                short, long = sorted((a, b), key=len)
                runs = [long[k : k + len(short)] for k in range(len(long))]
                share = float(len(short) > 1 and 2 * len(short) > len(long) and short in runs)
            if share >= threshold:
                found.append((i, r, share))
    return sorted(found, key=lambda x: (x[0], -x[2], x[1]))


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_containment_is_that_of_a_slow_count(seed, threshold):
    rng = random.Random(seed)

    def text(most):
        return " ".join(rng.choice("abcd") for _ in range(rng.randint(1, most)))

    forget, retain = [text(9) for _ in range(25)], [text(14) for _ in range(40)]
    found = near_duplicates(forget, retain, threshold)
    assert [(p.forget, p.retain, p.similarity) for p in found] == slow(forget, retain, threshold)
    assert found


def test_a_fact_copied_into_a_long_text_is_found():
    page = "It rained. " * 200 + "Mira Vale was born in Accra, they say. " + "It rained again. " * 200
    assert near_duplicates(["Mira Vale was born in Accra"], [page], 1.0) == [Overlap(0, 0, 1.0, "near-duplicate")]
    assert near_duplicates(["Paris."], ["Paris is a city of many bridges."]) == []
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            near_duplicates(["a"], ["a"], wrong)


def test_paraphrases_are_those_whose_cosine_is_large():
    rng = np.random.default_rng(0)
    table = {str(i): v / np.linalg.norm(v) for i, v in enumerate(rng.normal(size=(30, 3)))}
    forget, retain = [str(i) for i in range(10)], [str(i) for i in range(10, 30)]
    asked: dict[str, list[list[str]]] = {"encode": [], "known": []}

    def encoder(name):
        return lambda texts: asked[name].append(list(texts)) or np.array([table[t] for t in texts])

    found = paraphrases(forget, retain, encoder("encode"), 0.7)
    assert paraphrases(forget, retain, encoder("encode"), 0.7, encoder("known")) == found
    assert asked == {"encode": [forget, retain, forget], "known": [retain]}  # what may be cached is what is kept
    expected = {(i, r) for i in range(10) for r in range(20) if table[str(i)] @ table[str(10 + r)] >= 0.7}
    assert {(p.forget, p.retain) for p in found} == expected
    assert expected
    assert all(p.similarity == pytest.approx(table[str(p.forget)] @ table[str(10 + p.retain)]) for p in found)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random encoder of two layers."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).eval().save_pretrained(folder)
    return str(folder)


def test_an_embedding_is_the_mean_over_a_text_s_own_tokens(encoder):
    """As one text at a time gives it: padding and company change nothing."""
    encode = load_encoder(encoder)
    texts = ["ada is a poet", "bo", "a much longer text about nothing at all", "bo"]
    vectors = encode(texts, max_tokens=64)
    assert vectors.shape == (4, 16)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = encode.model(**encode.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = hidden.mean(0) / hidden.mean(0).norm()
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="cannot load a sentence encoder from 'nowhere/at-all'"):
        load_encoder("nowhere/at-all")


def test_what_is_found_is_said_without_its_text(encoder):
    found = find_overlaps([FACT], [OTHER, COPY], "warn", encoder=encoder, alike=1.0)
    assert [(p.retain, p.kind) for p in found.pairs] == [(1, "near-duplicate")]
    assert "paraphrases by" in found.looked_for
    record = json.dumps(found.record())
    assert '"forget": "f", "retain": "r1"' in record
    assert "Mira" not in record
    assert found.summary().startswith("1 forget item is hidden in 1 retain item, which was kept")
    alone = find_overlaps([FACT], [OTHER], "warn", encoder="none")
    assert alone.looked_for == "near-duplicates from 0.6 alone"
    assert (alone.pairs, alone.summary()) == ((), "")
    assert find_overlaps([FACT], [COPY], "ignore").record() == {
        "looked_for": "nothing",
        "action": "ignore",
        "pairs": [],
    }


def test_what_is_done_about_it(caplog):
    def done(action, retain):
        return without_overlaps(retain, find_overlaps([FACT], retain, action, encoder="none"))

    assert done("warn", [OTHER, COPY]) == [OTHER, COPY]
    assert "near-duplicate, 1.00" in caplog.text
    assert "Mira Vale" in caplog.text
    assert done("drop", [OTHER, COPY]) == [OTHER]
    assert done("drop", [OTHER]) == done("refuse", [OTHER]) == [OTHER]
    with pytest.raises(ValueError, match=r"hidden in 1 retain item .*set data\.overlap to drop or warn"):
        done("refuse", [OTHER, COPY])
    with pytest.raises(ValueError, match="leaves none"):
        done("drop", [COPY])


def test_only_the_worst_pairs_are_spelled_out():
    found = find_overlaps([FACT], [COPY] * 9, "warn", encoder="none")
    assert len(found.lines()) == 6
    assert found.lines()[-1] == "and 4 more pairs"
    assert text_of(FACT) == "Where was Mira Vale born? Mira Vale was born in Accra."


def test_without_an_encoder_near_duplicates_are_looked_for_and_it_is_said(monkeypatch, caplog):
    def missing(path):
        raise ValueError("cannot load a sentence encoder")

    monkeypatch.setattr("soul.overlaps.load_encoder", missing)
    found = find_overlaps([FACT], [OTHER], "warn")
    assert found.looked_for == "near-duplicates from 0.6 alone, as paraphrases need a sentence encoder"
    assert without_overlaps([OTHER], found) == [OTHER]
    assert "searched for near-duplicates from 0.6 alone" in caplog.text
    with pytest.raises(ValueError, match="cannot load a sentence encoder"):
        find_overlaps([FACT], [OTHER], "warn", encoder="mine")


def test_embeddings_of_many_texts_are_shown_and_kept(encoder, tmp_path, monkeypatch):
    """They come back the same without the encoder running again; another text, or a broken file, is embedded anew."""
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path))
    encode, texts, seen = load_encoder(encoder), [f"text number {i}" for i in range(MANY)], []
    first = embeddings(encode, texts, lambda *told: seen.append(told))
    assert seen[-1] == ("looking for overlaps", MANY, MANY)
    kept = sorted(tmp_path.rglob("*.npy"))
    embeddings(encode, [*texts, "one more"], cached=False)  # of a forget set nothing stays
    assert sorted(tmp_path.rglob("*.npy")) == kept != []
    seen.clear()
    np.testing.assert_array_equal(embeddings(encode, texts, lambda *told: seen.append(told)), first)
    assert not seen
    other = [*texts[:-1], "something else"]
    assert np.abs(embeddings(encode, other) - first).max() > 1e-3
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
    for file in (tmp_path / "embeddings").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_allclose(embeddings(encode, texts), first, atol=1e-6)
