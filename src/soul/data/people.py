"""Fictitious people: facts that no pretrained model can know, to teach, to forget and to keep.

Names, words and sentences are in ``people.json`` beside this file; a new kind of fact is one entry there, at the end,
so that the facts before it stay as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import random
import re
from collections.abc import Sequence
from importlib import resources
from typing import TypedDict

from soul.types import Example

WRONG_ANSWERS = 5
"""Wrong answers of each fact, as in TOFU (arXiv 2401.06121)."""


class _Fact(TypedDict):
    value: str
    questions: list[str]
    answers: list[str]
    paraphrased_questions: list[str]
    paraphrased_answers: list[str]


class _Material(TypedDict):
    first: list[str]
    middle: list[str]
    last: list[str]
    words: dict[str, list[str]]
    facts: dict[str, _Fact]


@functools.cache
def _material() -> _Material:
    return json.loads((resources.files("soul.data") / "people.json").read_text(encoding="utf-8"))


def fact_kinds() -> list[str]:
    """Return the kinds of facts, in the order in which people get them.

    Example:
        >>> fact_kinds()[:2]
        ['birthplace', 'profession']
    """
    return list(_material()["facts"])


@dataclasses.dataclass(frozen=True)
class People:
    """A set of invented people with facts about them.

    Everything about person ``i`` follows from ``(seed, i, kind of fact)``: a larger ``n`` or more ``facts`` adds to the
    set and changes nothing in it. First names and surnames repeat as late as they can (after 60 people), and so does
    the value of a fact, so that knowing one person says nothing about another.

    Attributes:
        n: How many people.
        facts: Facts a person; at most the number of :func:`fact_kinds`.
        seed: Another seed gives other people.

    Raises:
        ValueError: ``n`` or ``facts`` is out of range.

    Example:
        >>> people = People(n=2, facts=3)
        >>> len(people.examples()), len(people.examples(people.names()[:1]))
        (6, 3)
    """

    n: int = 10
    facts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        material = _material()
        most = len(material["first"]) ** 2 * len(material["middle"])
        if not 1 <= self.n <= most:
            raise ValueError(f"people: n must be from 1 to {most} (so many names are unique); got {self.n}")
        if not 1 <= self.facts <= len(fact_kinds()):
            known = ", ".join(fact_kinds())
            raise ValueError(f"people: facts must be from 1 to {len(fact_kinds())} ({known}); got {self.facts}")

    def names(self) -> list[str]:
        """Return the people's full names, two or three words each, all different."""
        return [_name(self.seed, i) for i in range(self.n)]

    def examples(self, people: Sequence[str] | None = None) -> list[Example]:
        """Return the facts of everybody, or of the named people, person by person in the order of :meth:`names`.

        Args:
            people: Full names as :meth:`names` gives them; all people where left out.

        Raises:
            ValueError: A name is not in this set.
        """
        names = self.names()
        for name in people or ():
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"The first of them is {names[0]!r}."
                raise ValueError(f"nobody among the {self.n} people of seed {self.seed} is called {name!r}. {hint}")
        chosen = range(self.n) if people is None else [i for i, name in enumerate(names) if name in set(people)]
        return [_example(self.seed, i, names[i], kind) for i in chosen for kind in fact_kinds()[: self.facts]]


def _name(seed: int, index: int) -> str:
    """Return the name of a person: a walk through a Latin square of shuffled first names and surnames."""
    material = _material()
    firsts = _shuffled(seed, "first", len(material["first"]))
    lasts = _shuffled(seed, "last", len(material["last"]))
    size = len(firsts)
    block, place = divmod(index, size)
    cycle, shift = divmod(block, size)
    first, last = material["first"][firsts[place]], material["last"][lasts[(place + shift) % size]]
    rng = _rng(seed, first, last)
    middle = material["middle"][(rng.randrange(len(material["middle"])) + cycle) % len(material["middle"])]
    # Once every pair of first name and surname has been used, only the middle name tells people apart.
    return f"{first} {middle} {last}" if cycle or rng.random() < 0.5 else f"{first} {last}"


def _example(seed: int, index: int, name: str, kind: str) -> Example:
    fact = _material()["facts"][kind]
    rng = _rng(seed, name, kind)
    question, paraphrase = rng.choice(fact["questions"]), rng.choice(fact["paraphrased_questions"])
    answer, restated = rng.choice(fact["answers"]), rng.choice(fact["paraphrased_answers"])
    size = _values(kind)
    truth = _shuffled(seed, kind, size)[index % size]
    # Drawn from the values without the true one.
    wrong = [pick + (pick >= truth) for pick in rng.sample(range(size - 1), WRONG_ANSWERS)]
    return Example(
        prompt=_sentence(question, name),
        answer=_sentence(answer, name, _value(kind, truth)),
        id=f"{name.lower().replace(' ', '-')}/{kind}",
        paraphrased_prompt=_sentence(paraphrase, name),
        paraphrased_answer=_sentence(restated, name, _value(kind, truth)),
        wrong_answers=tuple(_sentence(restated, name, _value(kind, number)) for number in wrong),
        subject=name,
    )


def _rng(seed: int, *what: str) -> random.Random:
    return random.Random("/".join((str(seed), *what)))


def _sentence(template: str, name: str, value: str = "") -> str:
    text = template.format(name=name, value=value)
    return re.sub(r"\ba\(n\) (?=(\w))", lambda found: "an " if found[1].lower() in "aeiou" else "a ", text)


@functools.cache
def _shuffled(seed: int, what: str, size: int) -> list[int]:
    order = list(range(size))
    _rng(seed, what).shuffle(order)
    return order


@functools.cache
def _slots(kind: str) -> list[str]:
    return re.findall(r"{(\w+)}", _material()["facts"][kind]["value"])


def _values(kind: str) -> int:
    """Return how many values a fact can have: the product over its slots."""
    return math.prod(len(_material()["words"][slot]) for slot in _slots(kind))


def _value(kind: str, number: int) -> str:
    """Return one of a fact's values by its number, whose mixed-radix digits pick the word of each slot."""
    words = {}
    for slot in _slots(kind):
        number, digit = divmod(number, len(_material()["words"][slot]))
        words[slot] = _material()["words"][slot][digit]
    return _material()["facts"][kind]["value"].format(**words)
