"""What a report says that it does not prove agrees with what its tables hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import make_run

from soul.report import RunRecord, read_run, render_html
from soul.report.view import limits
from soul.types import Score

NO_ATTACK = (
    "No attack is part of this report: whether relearning from a few examples, quantizing the weights, or rewording a "
    "question brings the answers back was not tried here."
)
NO_REFERENCE = "No model trained from scratch without the data is part of this report."
UNTRIED = (
    "this report: whether relearning from a few examples or quantizing the weights brings the answers back was not "
    "tried here."
)


@pytest.mark.parametrize(
    ("metric", "split", "tried", "referred"),
    [
        ("probability", "forget", "", ""),
        ("probability", "forget_reworded", "asking in other words", ""),
        ("rougeL_recall", "asked_100", "asking for the text in a chat", ""),
        ("contains_any_of_8", "forget", "sampling many answers", ""),
        ("mia_loss_auc", "forget", "membership inference", ""),
        ("mia_reference_auc", "forget", "membership inference", "the reference attack"),
        ("privleak", "forget", "membership inference", "privacy leakage"),
        ("forget_quality", "forget", "", "forget quality"),
        ("rougeL_recall_over_reference", "forget", "", "differences over a reference"),
    ],
)
def test_limits_deny_nothing_that_the_tables_hold(metric: str, split: str, tried: str, referred: str):
    said = limits([RunRecord("a", after=(Score(metric, split, 0.5, 4), Score("perplexity", "text", 9.0, 4)))])
    if not tried:
        assert said[0] == NO_ATTACK
    else:
        assert said[0].startswith(f"Tried here: {tried}. No other attack is part of this report: whether relearning")
        assert ("rewording" in said[0]) == ("other words" not in tried)
    if not referred:
        assert said[3].startswith(NO_REFERENCE)
    else:
        assert said[3].startswith(f"Measured against a reference model: {referred}. ")


def test_limits_say_in_how_many_runs(tmp_path: Path):
    reworded, plain = (Score("probability", split, 0.5, 4) for split in ("forget_reworded", "forget"))
    both = RunRecord("a", after=(reworded, Score("mia_loss_auc", "forget", 0.5, 4)))
    tried = "Tried here: asking in other words and membership inference (in 1 of 2 runs)."
    assert limits([both, RunRecord("b", after=(reworded,))])[0] == f"{tried} No other attack is part of {UNTRIED}"
    assert limits([RunRecord("c", before=(reworded,))])[0].startswith("Tried here: asking in other words.")
    assert limits([RunRecord("d", before=(reworded,), after=(plain,))])[0] == NO_ATTACK
    assert NO_ATTACK in render_html([read_run(make_run(tmp_path / "run"))])
