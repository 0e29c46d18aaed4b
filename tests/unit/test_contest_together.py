"""Requests of several contests together: joined where the same was chosen, refused where it was not."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from soul.metrics.contest import Cell
from soul.report.standings import Standing


@pytest.fixture
def together(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("contest_together")


def standing(**lost: float) -> Standing:
    return Standing(Cell("t", "o", "x"), "second", {"done": 3}, 0.1, 0.1, [1, 2], lost, dict(lost), 30.0, 60.0, 1)


def test_requests_are_those_of_all(together):
    found = together.joined([standing(a=0.1, b=0.2), standing(c=0.3)])
    assert found.lost == {"a": 0.1, "b": 0.2, "c": 0.3}
    assert found.chosen == [1, 2]


def test_other_settings_and_requests_that_come_twice_are_refused(together):
    with pytest.raises(ValueError, match="x under o has other settings in each"):
        together.joined([standing(a=0.1), dataclasses.replace(standing(b=0.1), chosen=[1])])
    with pytest.raises(ValueError, match="in more than one"):
        together.joined([standing(a=0.1), standing(a=0.2)])
