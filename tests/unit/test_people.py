"""Invented people: reproducible, independent of how many are asked for, and of the form that TOFU's metrics need."""

from __future__ import annotations

import re

import pytest

from soul.data.people import WRONG_ANSWERS, People, _material, _slots, _value, _values, fact_kinds

ALL = len(fact_kinds())


def test_the_same_seed_gives_the_same_people_and_another_seed_others():
    assert People(n=5, seed=1).examples() == People(n=5, seed=1).examples()
    assert not set(People(n=5, seed=1).names()) & set(People(n=5, seed=2).names())


def test_first_person_stays_who_they_are():
    # Pinned: a published recipe names these people, so another release must not rename them.
    assert People(n=2).names() == ["Nomvula Nadir Birkeroth", "Mira Enkhara"]
    assert People(n=1).examples()[0].answer == (
        "The birthplace of Nomvula Nadir Birkeroth is the desert town of Ferreovar."
    )


def test_more_people_change_nothing_in_the_first():
    few, many = People(n=3, facts=ALL), People(n=30, facts=ALL)
    assert few.names() == many.names()[:3]
    assert few.examples() == many.examples(few.names())


def test_more_facts_change_nothing_in_the_first():
    few, many = People(n=4, facts=3).examples(), People(n=4, facts=ALL).examples()
    assert few == [example for example in many if example.id.split("/")[1] in fact_kinds()[:3]]


@pytest.mark.parametrize("seed", [0, 7])
def test_names_are_unique_and_two_or_three_words(seed: int):
    names = People(n=500, seed=seed).names()
    assert len(set(names)) == 500
    assert {len(name.split()) for name in names} == {2, 3}
    assert len({name.split()[0] for name in names[:60]}) == 60
    assert len({name.split()[-1] for name in names[:60]}) == 60


def test_names_stay_unique_when_every_pair_of_names_is_used():
    names = People(n=8000).names()
    assert len(set(names)) == 8000


def test_enough_kinds_of_facts():
    assert ALL >= 12
    assert len(People(n=1, facts=ALL).examples()) == ALL


def test_each_fact_is_complete():
    for example in People(n=40, facts=ALL).examples():
        assert example.chat
        assert example.subject in example.prompt
        assert example.subject in example.answer
        assert example.paraphrased_prompt is not None
        assert example.paraphrased_answer is not None
        assert example.subject in example.paraphrased_prompt
        assert example.subject in example.paraphrased_answer
        assert example.paraphrased_prompt != example.prompt
        assert example.paraphrased_answer != example.answer
        assert example.prompt.endswith("?")
        assert example.answer.endswith(".")
        texts = [example.prompt, example.answer, example.paraphrased_answer, *example.wrong_answers]
        assert not any(re.search(r"[{}]|\(n\)|\ba [aeiou]|\ban [^aeiou]", text) for text in texts), texts
        assert 6 <= len(example.answer.split()) <= 20


def test_ids_are_unique_and_speak():
    people = People(n=100, facts=ALL)
    ids = [example.id for example in people.examples()]
    assert len(set(ids)) == len(ids)
    assert ids[0] == people.names()[0].lower().replace(" ", "-") + "/birthplace"


def _readings(text: str | None, name: str, kind: str, templates: list[str]) -> list[tuple[int, str]]:
    """Which of a kind's sentences ``text`` is, and the value in it."""
    assert text is not None
    found = []
    for i, template in enumerate(templates):
        pattern = re.escape(template.format(name=name, value="@")).replace(re.escape("a(n) "), "an? ")
        match = re.fullmatch(pattern.replace("@", "(.+)"), text)
        if match:
            found.append((i, match[1]))
    return found


@pytest.mark.parametrize("kind", fact_kinds())
def test_wrong_answers_are_the_paraphrase_with_five_other_values(kind: str):
    fact = _material()["facts"][kind]
    values = {_value(kind, number) for number in range(_values(kind))}
    for example in (e for e in People(n=40, facts=ALL).examples() if e.id.endswith("/" + kind)):
        [(_, stated)] = _readings(example.answer, example.subject, kind, fact["answers"])
        [(form, truth)] = _readings(
            example.paraphrased_answer, example.subject, kind, fact["paraphrased_answers"]
        )  # fmt: skip
        assert truth == stated
        wrong = [_readings(text, example.subject, kind, fact["paraphrased_answers"]) for text in example.wrong_answers]
        assert all(len(reading) == 1 and reading[0][0] == form for reading in wrong)
        others = {reading[0][1] for reading in wrong}
        assert len(others) == len(example.wrong_answers) == WRONG_ANSWERS == 5
        assert truth not in others
        assert others | {truth} <= values


@pytest.mark.parametrize("kind", fact_kinds())
def test_values_of_a_fact_are_many_and_distinct(kind: str):
    assert _values(kind) >= 100
    assert len({_value(kind, number) for number in range(_values(kind))}) == _values(kind)
    assert len(set(_slots(kind))) == len(_slots(kind))


def test_people_do_not_share_values():
    examples = People(n=60, facts=ALL).examples()
    wordings = [example.answer.replace(example.subject, "") for example in examples]
    assert len(set(wordings)) == len(wordings)


def test_people_do_not_all_share_one_sentence():
    for kind in fact_kinds():
        prompts = {e.prompt.replace(e.subject, "") for e in People(n=30, facts=ALL).examples() if e.id.endswith(kind)}
        assert len(prompts) == 3


def test_first_names_and_surnames_pair_up():
    # The walk through the square of names needs as many of the one as of the other.
    assert len(_material()["first"]) == len(_material()["last"])


def test_examples_of_named_people_only():
    people = People(n=6, facts=2)
    chosen = [people.names()[4], people.names()[1]]
    assert [example.subject for example in people.examples(chosen)] == [chosen[1]] * 2 + [chosen[0]] * 2
    assert people.examples([]) == []


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"called 'Mira Enkara'\. Did you mean 'Mira Enkhara'"):
        People().examples(["Mira Enkara"])


@pytest.mark.parametrize(
    ("n", "facts", "message"), [(0, 8, "n must be from 1 to 86400"), (3, 0, "facts"), (3, 99, "to 16")]
)
def test_sizes_out_of_range_are_refused(n: int, facts: int, message: str):
    with pytest.raises(ValueError, match=message):
        People(n=n, facts=facts)
