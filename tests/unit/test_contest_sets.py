"""What a contest's request is measured on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soul.contest.matrix import Task
from soul.contest.measure import load_sets


@pytest.fixture
def task(tmp_path):
    """A request of three questions, two of which are measured."""
    rows = [{"question": f"Where is {i}?", "answer": f"At {i}.", "paraphrased_question": f"{i}?"} for i in range(6)]
    for name, part in (("forget", rows[:3]), ("forgotten", rows[:3:2]), ("retain", rows[3:5]), ("unseen", rows[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "text.jsonl").write_text('{"text": "The river runs by the house."}\n')
    (tmp_path / "one").mkdir()
    names = ("forget", "forgotten", "retain", "unseen")
    sources: dict[str, Any] = {name: str(tmp_path / "{request}" / ".." / f"{name}.jsonl") for name in names}
    sources |= {"seen": sources["retain"], "text": str(tmp_path / "text.jsonl")}
    return Task(model="m", gold="g", tune=["one"], report=["two"], **sources)


def test_what_is_measured_of_the_forget_set_may_be_a_part(task, tmp_path):
    sets = load_sets(task, "one")
    assert [e.prompt for e in sets.forget] == ["Where is 0?", "Where is 2?"]
    assert len(sets.whole) == 3  # what attackers have a share of
    assert sets.places == [0, 2]
    (tmp_path / "forgotten.jsonl").write_text("")
    with pytest.raises(ValueError, match="forgotten"):
        load_sets(task, "one")


def test_what_is_measured_as_forgotten_is_to_be_forgotten(task, tmp_path):
    text = (tmp_path / "forgotten.jsonl").read_text() + (tmp_path / "unseen.jsonl").read_text()
    (tmp_path / "forgotten.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"1 of 3 items are not in .*forget\.jsonl.*'Where is 5\?'"):
        load_sets(task, "one")
