"""Columns to examples: every form is understood, and a bad row says where it is and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from soul.data.rows import to_example
from soul.types import Example


def test_question_and_answer_with_everything():
    row = {
        "question": "Q?", "answer": "A.", "paraphrased_question": "PQ?", "paraphrased_answer": "PA.",
        "perturbed_answer": "W.", "id": 7, "option1": "ignored",
    }  # fmt: skip
    expected = Example("Q?", "A.", id="7", paraphrased_prompt="PQ?", paraphrased_answer="PA.", wrong_answers=("W.",))
    assert to_example(row, "x") == expected


def test_prompt_and_response_is_chat_and_completion_is_not():
    assert to_example({"prompt": "Hi", "response": "Hello."}, "x") == Example("Hi", "Hello.")
    assert to_example({"prompt": "Once ", "completion": "upon a"}, "x") == Example("Once ", "upon a", chat=False)
    assert to_example({"prompt": "", "completion": "Text"}, "x") == Example("", "Text", chat=False)
    assert to_example({"text": "Prose."}, "x") == Example("", "Prose.", chat=False)


def test_the_first_form_wins():
    row = {"text": "no", "prompt": "no", "completion": "no", "question": "Q", "answer": "yes"}
    assert to_example(row, "x").answer == "yes"
    assert to_example(row | {"answer": None}, "x").answer == "no"


TURNS = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who is Ada?"},
]  # fmt: skip
REPLY = {"role": "assistant", "content": "A poet."}


@pytest.mark.parametrize("row", [{"messages": [*TURNS, REPLY]}, {"prompt": TURNS, "completion": [REPLY]}])
def test_messages(row: dict[str, Any]):
    history = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."))
    assert to_example(row, "x") == Example("Who is Ada?", "A poet.", history=history)


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
    assert to_example({**row, **SYSTEM}, "x") == Example("Who is Ada?", "A poet.", history=(("system", "Be kind."),))
    assert to_example({**row, "system": None}, "x") == to_example({**row, "system": ""}, "x") == to_example(row, "x")


def test_columns_beside_a_whole_text_are_not_looked_at():
    assert to_example({"instruction": "Add.", "input": "1 1", "text": "Add 1 1: 2"}, "x").answer == "Add 1 1: 2"
    assert to_example({"text": "Be kind. Hi.", **SYSTEM}, "x").answer == "Be kind. Hi."
    for empty in ("", " \n", None, float("nan"), []):
        row = {"question": "Q", "answer": "A", "context": empty, "input": empty, "system": empty}
        assert to_example(row, "x") == Example("Q", "A")


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
        to_example(row, "x.jsonl, line 2")
