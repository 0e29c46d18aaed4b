"""Columns to examples: every form is understood, and a bad row says where it is and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from soul.data.rows import to_examples
from soul.types import Example


def one(row: dict[str, Any]) -> Example:
    (example,) = to_examples(row, "x")
    return example


def test_question_and_answer_with_everything():
    row = {
        "question": "Q?", "answer": "A.", "paraphrased_question": "PQ?", "paraphrased_answer": "PA.",
        "perturbed_answer": "W.", "id": 7, "option1": "ignored",
    }  # fmt: skip
    expected = Example("Q?", "A.", id="7", paraphrased_prompt="PQ?", paraphrased_answer="PA.", wrong_answers=("W.",))
    assert to_examples(row, "x") == [expected]


def test_prompt_and_response_is_chat_and_completion_is_not():
    assert one({"prompt": "Hi", "response": "Hello."}) == Example("Hi", "Hello.")
    assert one({"prompt": "Once ", "completion": "upon a"}) == Example("Once ", "upon a", chat=False)
    assert one({"prompt": "", "completion": "Text"}) == Example("", "Text", chat=False)
    assert one({"text": "Prose."}) == Example("", "Prose.", chat=False)


def test_the_first_form_wins():
    row = {"text": "no", "prompt": "no", "completion": "no", "question": "Q", "answer": "yes"}
    assert one(row).answer == "yes"
    assert one(row | {"answer": None}).answer == "no"


TURNS = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who is Ada?"},
]  # fmt: skip
REPLY = {"role": "assistant", "content": "A poet."}


def test_every_answer_of_a_conversation_is_an_example():
    history = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."))
    first, last = Example("Hi", "Hello.", history=history[:1]), Example("Who is Ada?", "A poet.", history=history)
    assert to_examples({"messages": [*TURNS, REPLY]}, "x") == [first, last]
    assert to_examples({"messages": [*TURNS[1:], REPLY], "system": "Be kind."}, "x") == [first, last]
    assert [e.id for e in to_examples({"messages": [*TURNS, REPLY], "id": 7}, "x")] == ["7, answer 1", "7, answer 2"]
    assert one({"messages": [TURNS[1], TURNS[2]], "id": 7}).id == "7"
    greeted = {"messages": [TURNS[2], TURNS[2], TURNS[3], TURNS[3], REPLY, REPLY, TURNS[3], REPLY]}
    assert [len(e.history) for e in to_examples(greeted, "x")] == [3, 6]  # what answers no user is context


def test_what_a_prompt_holds_is_context():
    history = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."))
    assert one({"prompt": TURNS, "completion": [REPLY]}) == Example("Who is Ada?", "A poet.", history=history)
    assert one({"prompt": TURNS[1:], "completion": [REPLY], **SYSTEM}) == Example(
        "Who is Ada?", "A poet.", history=history
    )
    both = to_examples({"prompt": TURNS[:1], "completion": [*TURNS[1:], REPLY]}, "x")
    assert [e.answer for e in both] == ["Hello.", "A poet."]


SYSTEM = {"system": "Be kind."}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who is Ada?", "answer": "A poet."},
        {"prompt": "Who is Ada?", "response": "A poet."},
        {"messages": [TURNS[-1], REPLY]},
        {"messages": [TURNS[0], TURNS[-1], REPLY]},  # which says the same
    ],
)
def test_a_column_may_hold_the_system_turn(row: dict[str, Any]):
    assert one({**row, **SYSTEM}) == Example("Who is Ada?", "A poet.", history=(("system", "Be kind."),))
    assert one({**row, "system": None}) == one({**row, "system": ""}) == one(row)


def test_columns_beside_a_whole_text_are_not_looked_at():
    assert one({"instruction": "Add.", "input": "1 1", "text": "Add 1 1: 2"}).answer == "Add 1 1: 2"
    assert one({"text": "Be kind. Hi.", **SYSTEM}).answer == "Be kind. Hi."
    for empty in ("", " \n", None, float("nan"), []):
        row = {"question": "Q", "answer": "A", "context": empty, "input": empty, "system": empty}
        assert one(row) == Example("Q", "A")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "answer": "A", "context": "C"}, "'context' is part of what .* beside question and answer"),
        ({"prompt": "P", "response": "R", "history": [["a", "b"]]}, "'history' .* write it into the prompt"),
        ({"prompt": "P", "completion": "R", **SYSTEM}, "'system' belongs to a chat"),
        ({"messages": [*TURNS, REPLY], "system": "Be rude."}, "the system turn of the messages differ"),
        ({"q": "Q", "a": "A"}, r"columns found \(q, a\); understood are: question \+ answer; prompt \+ response"),
        ({"question": "Q", "answer": " "}, "answer is empty"),
        ({"question": "", "answer": "A"}, "question is empty"),
        ({"question": "Q", "answer": 1472}, "answer must be text, not int"),
        ({"question": "Q", "answer": None}, "answer must be text, not NoneType"),
        ({"question": "Q", "answer": "A", "perturbed_answer": {"x": 1}}, "perturbed_answer must be text or a list"),
        ({"question": "Q", "answer": "A", "perturbed_answer": ["W", ""]}, "perturbed_answer is empty"),
        ({"question": "Q", "answer": "A", "id": [1]}, "id must be text"),
        ({"text": ""}, "text is empty"),
        ({"prompt": [*TURNS, REPLY], "completion": []}, "completion is empty"),
        ({"prompt": "P", "completion": [REPLY]}, "must both be text, or both be lists"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": TURNS}, "they end with assistant and user"),
        ({"messages": []}, "they end with nothing"),
        ({"messages": [REPLY]}, "they end with assistant"),
        ({"messages": [{"role": "robot", "content": "x"}, REPLY]}, r"message 1 must have a role \(system, user"),
        ({"messages": [{"role": "user", "content": [1]}, REPLY]}, "the content of message 1 must be text"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^x.jsonl, line 2: .*{message}"):
        to_examples(row, "x.jsonl, line 2")
