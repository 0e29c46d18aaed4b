"""A card shows hostile words as words, by the Markdown reader that the terminal library brings along."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import yaml
from markdown_it import MarkdownIt

from soul.report.card import CardFacts, Checked, escaped, model_card
from soul.report.record import Check, RunRecord
from soul.types import Score

EVIL = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> [link](javascript:alert(1)) ![i](http://evil.example/x) "
    "https://evil.example www.evil.example a@evil.example **b** `c` | d\n\n"
    "# head\n- item\n---\n\x1b[31m\u202e\x00 ```\n</details>"
)
FOR = {"title": EVIL, "base": EVIL, "licence": EVIL, "checked": [Checked(EVIL, 1, 0.1, 0.1, 0.0)]}


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_words_in_a_card_are_words():
    score = Score(metric=EVIL, split=EVIL, value=0.5, n=1, low=0.4, high=0.6, method=EVIL, better=EVIL)
    record = RunRecord(
        **dict.fromkeys(("label", "asked", "objective", "optimizer", "model"), EVIL),
        warnings=(EVIL,),
        checks=(Check(EVIL, False, 0.1),),
        n_forget=1,
        n_retain=1,
        recipe=yaml.safe_dump({"label": EVIL, "data": {"forget": EVIL}}),
        environment={"soul": EVIL, "device": EVIL},
        before=(score,),
        after=(score,),
    )
    for show in (False, True):
        card = model_card(record, CardFacts(**FOR, show_data=show))
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
        _, head, body = card.split("---\n", 2)
        assert yaml.safe_load(head)["base_model"] == EVIL
        page = Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
        tags = page.found
        assert tags <= {
            "h1",
            "h2",
            "p",
            "ul",
            "li",
            "strong",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "pre",
            "code",
        }
        assert "<script>alert(1)</script> <img src=x onerror=alert(1)>" in page.text
        assert "⟨U+202E⟩␀" in page.text


def test_a_card_names_no_source_unless_asked():
    reasons = {
        "not measured: membership": " ('/tmp/secret-jane' holds no holdout10.json (see --data); give holdout=)",
        "not measured: forget": " (secret-jane)\nsecret-jane",
        "not measured as the first run was": " (forget secret-jane, there b): numbers in one column do not compare",
    }
    plain = "forget: 1 of 1 items have likelihoods of a text that lost its end (evaluation.max_length, or ...)"
    tree = {
        "model": {"path": "/tmp/secret-jane", "system": "You are secret-jane", "dtype": "float32"},
        "method": {"name": "retrain", "base": "/tmp/secret-jane", "prompt": "not secret-jane", "lr": 0.5},
    }
    record = RunRecord(
        "a",
        warnings=(
            *(said + reason for said, reason in reasons.items()),
            plain,
        ),
        recipe=yaml.safe_dump(tree),
    )
    card = model_card(record, CardFacts("b"))
    assert "secret" not in card
    for said in (*reasons, plain):
        assert f"- {escaped(said)}\n" in card
    for said in ("dtype: float32", "name: retrain", "lr: 0.5"):
        assert said in card
    shown = model_card(record, CardFacts("b", show_data=True))
    assert shown.count("secret") == 8
    assert "path: owner/name" in model_card(record, CardFacts("b", base="owner/name"))


def test_a_long_text_is_cut():
    assert "more characters" in escaped("word " * 2_000_000)
    assert len(escaped("*" * 10_000_000)) < 5000


def test_a_destroyed_model_is_no_gap_in_a_card():
    before = Score("perplexity", "text", 24.53, 32, low=21.76, high=27.66)
    cells = {
        "infinite": Score("perplexity", "text", math.inf, 32, low=1e300, high=math.inf),
        "not a number (the model is broken)": Score("perplexity", "text", math.nan, 32),
        "not measured": None,
        "31.2 [27, infinite]": Score("perplexity", "text", 31.2, 32, low=27.0, high=math.inf),
    }
    kept = Score("probability", "kept", 0.5, 8)
    for cell, after in cells.items():
        record = RunRecord("a", before=(before,), after=(kept, *([after] if after else [])))
        card = model_card(record, CardFacts("b"))
        assert f"| text | perplexity | 24.53 [21.76, 27.66] | {cell} | 32 |" in card
        assert "| kept | probability | not measured | 0.5 | 8 |" in card


def test_a_failed_check_shows_what_is_no_finite_number():
    checks = tuple(Check(name, False, value) for name, value in (("a", math.inf), ("b", math.nan), ("c", None)))
    card = model_card(RunRecord("a", checks=checks), CardFacts("b"))
    for said in ("a (infinite)", "b (not a number (the model is broken))", "c (not measured)"):
        assert f"- Not met: {said}\n" in card
