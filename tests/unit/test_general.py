"""The sets the library brings along: their sizes, their form, and that they do not overlap."""

from __future__ import annotations

import itertools

from soul.data.general import general_chat, general_facts, general_text, heldout_chat, heldout_text, refusals
from soul.data.overlap import near_duplicates, text_of
from soul.data.sources import check_disjoint, load_examples


def _shared(texts: list[str]) -> int:
    """How many characters all texts begin with."""
    return len(list(itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))))


def test_general_facts_have_wrong_answers_of_the_same_form():
    facts = load_examples("general:facts")
    assert facts == general_facts()
    assert len(facts) == len({fact.prompt for fact in facts}) == len({fact.id for fact in facts}) == 40
    for fact in facts:
        assert 3 <= len(fact.wrong_answers) == len(set(fact.wrong_answers)) <= 5
        assert fact.answer not in fact.wrong_answers
        texts = [fact.answer, *fact.wrong_answers]
        around = _shared(texts) + _shared([text[::-1] for text in texts])
        assert around >= 10  # one sentence around different values


def test_general_text_is_plain_passages():
    passages = load_examples("general:text")
    assert passages == general_text()
    assert len({passage.answer for passage in passages}) == 24
    for passage in passages:
        assert not passage.chat
        assert passage.prompt == ""
        assert 50 <= len(passage.answer.split()) <= 80


def test_general_chat_is_short_and_shares_nothing_with_the_rest():
    chat = load_examples("general:chat")
    assert chat == general_chat()
    assert len({item.prompt for item in chat}) == 40
    assert all(item.chat and len(item.answer.split()) <= 30 for item in chat)
    check_disjoint(chat, [*general_facts(), *general_text()])


def test_what_is_held_out_shares_nothing_with_what_a_run_may_look_at():
    passages, chat = load_examples("general:heldout_text"), load_examples("general:heldout_chat")
    assert (passages, chat) == (heldout_text(), heldout_chat())
    assert len({e.answer for e in passages}) == 24
    assert len({e.prompt for e in chat}) == 20
    assert all(not e.chat and not e.prompt and 50 <= len(e.answer.split()) <= 80 for e in passages)
    assert all(e.chat and len(e.answer.split()) <= 30 for e in chat)
    looked_at = [*general_facts(), *general_text(), *general_chat()]
    check_disjoint([*passages, *chat], looked_at)
    assert not list(near_duplicates([text_of(e) for e in [*passages, *chat]], [text_of(e) for e in looked_at], 0.5))


def test_refusals_differ():
    assert len({text.lower() for text in refusals()}) == 60
    assert all(text == text.strip() and text.endswith(".") for text in refusals())
