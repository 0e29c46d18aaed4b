"""Probes made from documents, and what the audit of a request counts as a leak."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from soul.benchmarks.custom import Custom
from soul.data.documents import read_documents
from soul.data.probes import BLANK, cloze, continuations, sentences
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, measure
from soul.likelihood import extraction_strength
from soul.metrics.leakage import best_rouge, contains
from soul.types import Example, Row

LIFE = (
    "Mira Vale was born in Accra. She moved to Lisbon on 3 May 1987 with Dr. J. Ruhl. The composer kept 45% of her "
    "royalties for the school.\n\nHer teacher wrote harmonious quartets there. It was so."
)
DOCUMENTS = [
    ("life", LIFE),
    ("other", "The baker Tomas Ruhl moved to Graz in 1990. He wrote nothing but harmonious letters."),
]
SPEC = EvaluationSpec(max_new_tokens=6)


def test_sentences_end_where_a_reader_ends_them():
    assert sentences(LIFE) == [
        "Mira Vale was born in Accra.",
        "She moved to Lisbon on 3 May 1987 with Dr. J. Ruhl.",
        "The composer kept 45% of her royalties for the school.",
        "Her teacher wrote harmonious quartets there.",
        "It was so.",
    ]
    assert sentences('He said "No." Then he left.') == ['He said "No."', "Then he left."]


def test_cloze_asks_for_names_dates_numbers_and_rare_words():
    found = cloze(DOCUMENTS)
    by_document = {name: [e.answer for e in found if e.subject == name] for name, _ in DOCUMENTS}
    # "harmonious" is in both documents, "quartets" in one alone; "It was so." has nothing to ask for
    assert by_document == {"life": ["Mira Vale", "3 May 1987", "45%", "quartets"], "other": ["1990", "nothing"]}
    for e in found:
        assert e.chat
        assert e.prompt.split("\n\n", 1)[1].count(BLANK) == 1


def test_a_request_may_have_several_sources(tmp_path):
    for folder, text in (("one", LIFE), ("two", f"{LIFE} She left for Ghent in 1999.")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "life.md").write_text(text)
    (tmp_path / "a.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n{"text": "Mira Vale left."}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "Where?", "answer": "In Accra."}\n')
    sources = [str(tmp_path / name) for name in ("one", "two", "a.jsonl", "b.jsonl")]
    splits = Custom(forget=sources, general="", text="", probes="cloze").splits()
    assert [e.answer for e in splits["forget"]] == ["Ada.", "In Accra."]
    assert {e.subject for e in splits["forget_cloze"]} >= {"life", "life (2)"}
    for found in splits.values():
        assert len({e.id for e in found}) == len(found)


def test_a_word_that_is_written_small_elsewhere_is_no_name():
    text = (
        "Then came NOT one but two of us, not three, to The Quill House. If so, he said that The Hague fell to the US."
    )
    answers = [e.answer for e in cloze([("a", text)], per_document=9)]
    assert answers == ["Quill House", "Hague"]
    plain = [e.answer for e in cloze([("b", "Then came NOT one man.")])]
    assert plain == ["NOT"]  # nothing says that it is a word


@pytest.mark.parametrize("form", ["question", "continuation"])
def test_no_prompt_gives_its_answer_away_and_each_is_of_the_text(form):
    text = (
        "Ada Orchard won the Lumen Prize. Ada Orchard was glad of the prize in Ghent in 1999. "
        "So 1999 was for Ada Orchard."
    )
    flat = " ".join(text.split())
    found = cloze([("a", text), *DOCUMENTS], form=form)
    assert found
    for e in found:
        body = e.prompt.split("\n\n", 1)[-1] if form == "question" else e.prompt
        assert not re.search(rf"(?<!\w){re.escape(e.answer)}(?!\w)", body)
        if e.subject == "a":
            whole = body.replace(BLANK, e.answer) if form == "question" else f"{body} {e.answer}"
            assert whole in flat
    assert {e.chat for e in found} == {form == "question"}


def test_probes_are_a_function_of_seed_and_document_alone():
    text = " ".join(f"The clerk number {i} of Ghent counted {i * 17} barrels that day." for i in range(40))
    first = cloze([("a", text)], per_document=5)
    assert first == cloze([("a", text), ("b", LIFE)], per_document=5)[:5], "another document changes nothing"
    assert first != cloze([("a", text)], per_document=5, seed=1)
    assert {e.id for e in first} <= {e.id for e in cloze([("a", text)], per_document=9)}, "fewer are some of more"


def test_continuations_are_halves_of_passages_that_do_not_overlap():
    words = [f"w{i}" for i in range(100)]
    found = continuations([("a", " ".join(words))], per_document=9, words=40)
    assert [(e.prompt.split(), e.answer.split()) for e in found] == [
        (words[0:20], words[20:40]),
        (words[40:60], words[60:80]),
        (words[80:90], words[90:100]),
    ]
    assert all(e.answer.startswith(" ") and not e.chat for e in found)
    with pytest.raises(ValueError, match="eight words"):
        continuations([("a", "too short")])


def test_documents_are_read_without_markup(tmp_path):
    (tmp_path / "b.md").write_text(
        "# Title\n\nMira *Vale* lived in\n[Accra](http://x).\n\n```\ncode\n```\n\nsnake_case"
    )
    (tmp_path / "a.txt").write_text("One line\nof text.\n")
    assert read_documents(str(tmp_path)) == [
        ("a", "One line of text."),
        ("b", "Title\n\nMira Vale lived in Accra.\n\ncode\n\nsnake_case"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no documents"):
        read_documents(str(tmp_path / "empty"))


def test_contains_reads_words_not_letters():
    assert contains("So it was in ACCRA, Ghana!", "in Accra")
    assert contains("3 May, 1987", "3 May 1987")
    assert not contains("Accraville", "Accra")
    assert not contains("in the town of Accra", "in Accra")
    assert not contains("anything", "...")
    assert contains("Cafe\u0301 Uno", "caf\u00e9")
    assert best_rouge(["No.", "in Accra"], "in Accra, Ghana") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no samples"):
        best_rouge([], "x")


@pytest.mark.parametrize(
    ("text", "answer", "there"),
    [
        ("It cost 1.50 in all.", "50", False),
        ("It cost 1.50 in all.", "1", False),
        ("It cost 1.50 in all.", "1.50", True),
        ("It cost 50.", "50", True),
        ("It cost $50, or so", "50", True),
        ("1,500 or 1.500.000", "500", False),
        ("1 500 of them", "1,500", True),
        ("1500 of them", "1,500", True),
        ("1,500 of them", "1500", True),
        ("11,500 of them", "1500", False),
        ("Call 555-12 34.", "5551234", True),
        ("Call 1 555 12 34.", "5551234", True),
        ("Call 15551234.", "5551234", False),
        ("Call 555-12 345.", "5551234", False),
        ("+44 20 7946-0958", "+442079460958", True),
        ("1,234,567 in all", "1234567", True),
        ("born on 3.5.1987.", "1987", True),
        ("born May 3,1987", "1987", True),
        ("1,2,3", "2", True),
        ("1.50元", "50", False),
        ("她50岁", "50", True),
        ("a_b", "b", True),
    ],
)
def test_a_number_ends_where_it_ends(text, answer, there):
    assert contains(text, answer) is there


def row(generated: str, samples: list[str], matches: list[int], subject: str = "") -> Row:
    return Row(
        id=generated,
        subject=subject,
        prompt=f"Where? {generated}",
        answer="in Accra",
        nll=math.log(2),
        tokens=len(matches),
        generated=generated,
        rougeL_recall=best_rouge([generated], "in Accra"),
        samples=samples,
        token_matches=matches,
    )


def test_scores_are_the_means_they_say(tmp_path):
    rows = {
        "forget": [
            row("In Accra.", ["No.", "No."], [1, 1, 1, 1], "a"),
            row("No.", ["He was in Accra", "No."], [0, 1, 1, 1], "a"),
            row("No", ["No.", "Accra"], [1, 0, 1, 0], "b"),
        ]
    }
    scores = {s.metric: s for s in Custom(forget="x").score(rows)}
    expected = {
        "probability": 0.5,
        "rougeL_recall": 1 / 3,
        "contains": 1 / 3,
        "exact_memorization": (1 + 0.75 + 0.5) / 3,
        "extraction_strength": (1 + 0.75 + 0) / 3,
        "rougeL_recall_best_of_2": (0 + 1 + 0.5) / 3,
        "contains_any_of_2": 1 / 3,
        "leaked": 2 / 3,
    }
    assert {metric: score.value for metric, score in scores.items()} == pytest.approx(expected)
    assert all(score.better == "lower" and score.n == 3 for score in scores.values())
    assert scores["leaked"].method == "bootstrap(2000, 2 groups, widened)"
    reference = {"forget": [row(text, [], [1]) for text in ("In Accra.", "No.", "No")]}
    for theirs in reference["forget"]:
        theirs["rougeL_recall"] = 0.25
    scores = {s.metric: s.value for s in Custom(forget="x").score(rows, reference)}
    over = {name.removesuffix("_over_reference"): value for name, value in scores.items() if "_over_" in name}
    assert over == pytest.approx({"rougeL_recall": 1 / 3 - 0.25, "contains": 0.0})
    for theirs in reference["forget"]:
        theirs["samples"] = ["In Accra.", "nothing"]
    scores = {s.metric: s.value for s in Custom(forget="x").score(rows, reference)}
    assert scores["leaked_over_reference"] == pytest.approx(2 / 3 - 1)
    assert scores["contains_any_of_2_over_reference"] == pytest.approx(1 / 3 - 1)
    others: list[list[Row]] = [[], reference["forget"][:2], reference["forget"][::-1]]
    for other in others:
        with pytest.raises(ValueError, match="rows of forget are not of the same questions"):
            Custom(forget="x").score(rows, {"forget": other})


def test_rows_that_share_their_last_turn_are_paired_one_by_one():
    """The same question after other turns, or about someone else, is another row."""
    rows = {"forget": [row(text, [], [1]) for text in ("In Accra.", "Accra", "No.")]}
    for found in rows["forget"]:
        found["prompt"], found["wrong_nll"] = "And where was she born?", [1.0, 2.0]
    scores = {s.metric: s.value for s in Custom(forget="x").score(rows, rows)}
    assert scores["rougeL_recall_over_reference"] == 0
    assert scores["forget_quality"] == 1


def test_an_audit_of_questions_measures_all_ways_of_asking(tmp_path, make_model, tokenizer, forget_set, retain_set):
    lines = [
        {"question": e.prompt, "answer": e.answer, "subject": e.prompt[:9], "paraphrased_question": f"Say: {e.prompt}"}
        for e in forget_set
    ]
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({"question": e.prompt, "answer": e.answer}) for e in retain_set)
    )
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"question": "And Mira Vale's place of birth?", "answer": "In Accra."})
    )
    audit = Custom(
        forget=str(tmp_path / "f.jsonl"),
        retain=str(tmp_path / "r.jsonl"),
        paraphrases=str(tmp_path / "p.jsonl"),
        general="",
        text="",
        samples=3,
    )
    model = make_model()
    rows = measure(audit, model, tokenizer, spec=SPEC)
    assert {split: len(found) for split, found in rows.items()} == {"forget": 8, "forget_reworded": 9, "retain": 10}
    assert [len(r.get("samples", [])) for r in rows["forget"] + rows["retain"]] == [3] * 8 + [0] * 10
    splits = {score.split for score in audit.score(rows) if score.metric == "leaked"}
    assert splits == {"forget", "forget_reworded"}
    again = measure(audit, model, tokenizer, spec=SPEC)
    assert again == rows, "samples come from the seed"
    encoded = [ChatTemplate(tokenizer).encode(e) for e in audit.splits()["forget"]]
    _, strength = extraction_strength(model, encoded, pad_id=1)
    mean = {s.metric: s.value for s in audit.score(rows) if s.split == "forget"}["extraction_strength"]
    assert mean == pytest.approx(sum(strength) / len(strength)), "the same as from the model itself"


def test_an_audit_of_documents_makes_its_probes(tmp_path, make_model, tokenizer):
    (tmp_path / "letters").mkdir()
    for name, text in DOCUMENTS:
        (tmp_path / f"letters/{name}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "id": name}) for name, text in DOCUMENTS))
    audit = Custom(forget=str(tmp_path / "letters"), general="", text="", samples=2)
    same = Custom(forget=str(tmp_path / "rows.jsonl"), general="", text="", samples=2)
    assert audit.splits()["forget_cloze"] == same.splits()["forget_cloze"]
    rows = measure(audit, make_model(), tokenizer, spec=SPEC)
    assert list(rows) == ["forget_cloze", "forget_continuation"]
    leaked = [score for score in audit.score(rows) if score.metric == "leaked"]
    assert [(score.split, score.n) for score in leaked] == [("forget_cloze", 6), ("forget_continuation", 2)]
    assert leaked[0].method in ("bootstrap(2000, 2 groups, widened)", "clopper-pearson(2)")


def reciting(model: Any, template: ChatTemplate, examples: Sequence[Example]) -> Any:
    """Let a model answer each prompt with the tokens of its true answer, and go on with the first of them."""
    answers = {tuple(template.prompt_ids(e)): template.answer_ids(e) for e in examples}

    def generate(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **_: Any):
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        new = [(answers[p] + answers[p][:1] * max_new_tokens)[:max_new_tokens] for p in prompts]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)

    model.generate = generate
    return model


def test_a_recital_of_a_long_passage_is_one(tmp_path, make_model, make_tokenizer):
    (tmp_path / "a.txt").write_text(" ".join(f"w{i * 7919 % 1000}" for i in range(110)))
    audit = Custom(
        forget=str(tmp_path / "a.txt"), general="", text="", probes="continuation", passage_words=110, samples=1
    )
    tokenizer = make_tokenizer()
    template = ChatTemplate(tokenizer)
    examples = audit.splits()["forget_continuation"]
    prompt, tokens = len(template.prompt_ids(examples[0])), len(template.answer_ids(examples[0]))
    assert tokens > EvaluationSpec().max_new_tokens
    model = reciting(make_model(), template, examples)
    rows = measure(audit, model, tokenizer)
    scores = {s.metric: s.value for s in audit.score(rows)}
    assert scores["rougeL_recall"] == scores["contains"] == scores["contains_any_of_1"] == 1
    assert all("truncated" not in found for found in rows["forget_continuation"])
    tokenizer.model_max_length = prompt + tokens - 1  # what the model has no positions for cannot be recited
    [found] = measure(audit, model, tokenizer)["forget_continuation"]
    assert found.get("truncated") == ["generated", "likelihood", "samples"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"probes": "quiz"}, "probes must be"),
        ({"form": "essay"}, "form must be"),
        ({"samples": -1}, "samples must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"per_document": 0}, "per_document must be"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Custom(forget="x", **settings)


def test_without_a_request_there_is_nothing_to_audit():
    assert "forget" in Custom().missing()
    with pytest.raises(ValueError, match="forget=FILE"):
        Custom().splits()


def test_a_passage_recited_to_its_last_word_is_extracted(tokenizer, tmp_path):
    """What follows a passage of a document is no part of it: an end there would hide that all of it is known."""
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten eleven twelve")
    template = ChatTemplate(tokenizer)
    plain = [
        e for split in Custom(forget=str(tmp_path / "a.txt"), general="", text="").splits().values() for e in split
        if not e.chat and e.prompt
    ]  # fmt: skip
    assert plain
    assert all(template.end_of_turn not in template.encode(e).input_ids for e in plain)


def test_names_of_other_languages_begin_with_their_capitals():
    text = (
        "Le docteur était arrivé à Lyon avec Camille Roux. Elle étudiait à Genève. Él vivía con últimos ecos en Ávila."
    )
    asked = [e.answer for e in cloze([("a", text)], per_document=8)]
    assert {"Lyon", "Genève"} <= set(asked)
    assert not [answer for answer in asked if answer[0].islower()]
