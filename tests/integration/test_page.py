"""A page about hostile words runs nothing and fetches nothing: by its text, and in Chromium where there is one."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markupsafe import Markup

from soul.report import read_run, write_report
from soul.report.contest import write_contest
from soul.report.page import content_policy, frame

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")
RUN = "document.documentElement.setAttribute('pwned', 1)"
REFRESH = "<meta http-equiv=refresh content='0;url=HOST/meta'>"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</title></style></textarea><script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'" onmouseover="{RUN}" autofocus onfocus="{RUN}',
    f"<svg onload={RUN}><style>*{{display:none}}</style></svg>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<a href='javascript:{RUN}'>x</a>",
    "<link rel=stylesheet href=HOST/css><img src=HOST/img><form action=HOST/form><object data=HOST/object></object>",
    "<base href=HOST/><style>@import url(HOST/import); body{background:url(HOST/background)}</style>",
    "<p style='background:url(HOST/attribute)'>",
    "{{ 7 * 7 }}{% raw %}&lt;script&gt;&#60;script&#62;",
    '=HYPERLINK("HOST/formula")\t+1\t@SUM(1)\t-1',
    "\x1b]8;;HOST/link\x07click\x1b]8;;\x07\u202e\u2066\x00",
]


@pytest.fixture
def host() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine that notes what it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()


def hostile_run(root: Path, evil: str) -> Path:
    """A run in which every word that somebody else may have chosen is ``evil``."""
    (root / "rows/before").mkdir(parents=True)
    (root / "rows/after").mkdir(parents=True)
    score = {
        "metric": evil,
        "split": evil,
        "value": 0.5,
        "n": 1,
        "low": 0.4,
        "high": 0.6,
        "method": evil,
        "better": evil,
    }
    row = {"id": evil, "subject": evil, "prompt": evil, "answer": evil, "generated": evil, "nll": 0.1, "tokens": 3}
    words = dict.fromkeys(("label", "asked", "objective", "optimizer", "model"), evil)
    checks = [{"name": evil, "passed": True, "value": 1.0}]
    record = {"format": 1, **words, "warnings": [evil], "checks": checks, "seconds": {evil: 1.0}}
    (root / "record.json").write_text(json.dumps(record))
    (root / "scores.json").write_text(json.dumps({"before": [score], "after": [score]}))
    (root / "environment.json").write_text(json.dumps({evil: evil, "command": evil}))
    (root / "recipe.yaml").write_text(evil.replace("\0", ""))
    (root / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, evil: 0.5, f"{evil}_loss": 1.0}) + "\n")
    for when in ("before", "after"):
        name = re.sub(r"[/\0]", "", evil)[:80]
        (root / f"rows/{when}/{name}.jsonl").write_text(json.dumps(row) + "\n")
    return root


def hostile_contest(root: Path, evil: str) -> Path:
    entry = {"label": evil, "name": "adamw", "order": "first"}
    task = {"tune": ["a"], "report": ["b"]}
    budget = {"points": 1, "settings": 1}
    tree = {"label": evil, "optimizers": [entry], "objectives": [{"label": evil, "name": "npo"}], "tasks": {evil: task}}
    root.mkdir()
    (root / "matrix.yaml").write_text(yaml.safe_dump(tree | {"budget": budget}))
    trial = {
        "key": evil,
        "kind": "tune",
        "task": evil,
        "request": "a",
        "objective": evil,
        "optimizer": evil,
        "point": 0,
    }
    trial |= {
        "state": "lost",
        "settings": {evil: 1.0},
        "measures": [],
        "seconds": {"train": 1.0, "curvature": 0.0},
        "peak_memory_bytes": 1,
    }
    (root / "trials.jsonl").write_text(json.dumps(trial) + "\n")
    return root


class _Page(HTMLParser):
    """What is markup in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]


def write_pages(folder: Path, evil: str) -> list[Path]:
    runs = [hostile_run(folder / name, evil) for name in ("one", "two")]
    pages = [write_report(runs, folder / "report.html", title=evil)]
    return [*pages, write_contest(hostile_contest(folder / "contest", evil.replace("\0", "")), folder / "contest.html")]


def test_hostile_words_are_no_markup(tmp_path: Path):
    known = _Page(write_report([hostile_run(tmp_path / "tame", "tame")], tmp_path / "t.html").read_text()).tags
    for page in write_pages(tmp_path, " ".join([*PAYLOADS, REFRESH])):
        text = page.read_text(encoding="utf-8")
        seen = _Page(text)
        assert seen.tags <= known | {"b", "h2", "ul", "li"}
        assert not seen.tags & {"script", "img", "iframe", "object", "form", "link", "base", "a", "textarea"}
        assert "style" not in seen.attributes
        assert not [name for name in seen.attributes if name.startswith("on")]
        assert all(target.startswith("#") for target in seen.targets)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        style = text[text.index("<style>") + 7 : text.index("</style>")]
        assert f'content="{content_policy(style)}"' in text
        assert text.index("Content-Security-Policy") < text.index("<title>"), "before any word of others"


def test_the_policy_names_the_style_sheet_by_its_digest():
    digest = base64.b64encode(hashlib.sha256(b"b{color:red}").digest()).decode()
    assert content_policy("b{color:red}") == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def browse(page: Path, *options: str) -> str:
    """Return what Chromium prints about a page once it has loaded."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=1500", *options)
    command = [CHROMIUM, *options, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def pwned(dom: str) -> bool:
    return bool(re.match(r"\s*(<!DOCTYPE html>)?\s*<html[^>]*\bpwned", dom))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine; the page is read by html.parser above")
def test_in_a_browser(tmp_path: Path, host: tuple[str, list[str]]):
    address, asked = host
    evil, refresh = (text.replace("HOST", address) for text in (" ".join(PAYLOADS), REFRESH))
    bare = tmp_path / "bare.html"
    bare.write_text(f"<!DOCTYPE html><html><body>{evil}</body></html>", encoding="utf-8")
    assert pwned(browse(bare, "--dump-dom")), "the words are dangerous where nobody is careful"
    assert asked
    asked.clear()
    walled = tmp_path / "walled.html"
    walled.write_text(frame("x", "b { color: rgb(1, 2, 3) }", Markup(evil + "<b>styled</b>")), encoding="utf-8")
    dom = browse(walled, "--dump-dom")
    assert "<img" in dom, "they are markup here"
    assert not pwned(dom), "and the policy alone holds them"
    assert asked == []
    for page in write_pages(tmp_path, evil + refresh):  # going elsewhere is what a policy does not forbid
        assert not pwned(browse(page, "--dump-dom"))
    assert asked == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_page_is_styled_in_a_browser(tmp_path: Path):
    """The digest is the one that a browser computes: else a page would be bare."""
    style = "html { overflow: hidden } b { display: none }"
    page, seen = tmp_path / "page.html", []
    for body in ("<b>hidden</b><i>shown</i>", "<i>shown</i>", "<i>other</i>"):
        page.write_text(frame("x", style, Markup(body)), encoding="utf-8")
        browse(page, f"--screenshot={tmp_path / 'seen.png'}")
        seen.append((tmp_path / "seen.png").read_bytes())
    assert seen[0] == seen[1], "what is not displayed is not seen"
    assert seen[1] != seen[2]


def test_a_text_of_ten_megabytes_is_cut_with_a_note(tmp_path: Path):
    evil = "<b>word</b> " * 900_000
    root = hostile_run(tmp_path / "run", "tame")
    row = {"id": "0", "prompt": evil, "answer": evil, "generated": evil, "nll": 0.1, "tokens": 3, "subject": evil}
    for when in ("before", "after"):
        (root / f"rows/{when}/tame.jsonl").write_text(json.dumps(row) + "\n")
    started = time.process_time()
    page = write_report([root], tmp_path / "x.html").read_text()
    assert time.process_time() - started < 5
    assert len(page) < 200_000
    assert "10,798,800 more characters" in page
    assert read_run(root).rows_after["tame"][0]["answer"] == evil
