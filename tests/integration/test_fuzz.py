"""Valid files and command lines, changed at random: each is taken, or refused by one message and exit code 2.

No traceback, no half-written file, no waiting. ``SOUL_FUZZ_SEED`` and ``SOUL_FUZZ_COUNT`` choose others and more:

    SOUL_FUZZ_SEED=7 SOUL_FUZZ_COUNT=1000 pytest tests/integration/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from gguf import GGUFWriter
from test_page import hostile_contest, hostile_run

from soul import models
from soul.cli import main
from soul.contest.matrix import read_matrix
from soul.data import hub
from soul.data.sources import load_examples

SEED = os.environ.get("SOUL_FUZZ_SEED", "0")
COUNT = int(os.environ.get("SOUL_FUZZ_COUNT", "200"))
PARTS = 8
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
ROWS = [{"question": f"Who is {name}?", "answer": f"{name} is a baker."} for name in ("Mira", "Bo", "Ada", "Zoë")]
RECIPE = {
    "label": "fuzz",
    "model": {"path": "./nomodel", "dtype": "float32"},
    "data": {"forget": "forget.jsonl", "retain": ["keep.jsonl"], "overlap": "ignore"},
    "objective": {"name": "npo", "beta": 0.1, "retain": "kl", "retain_weight": 1.0},
    "optimizer": {"name": "sophia", "lr": 1e-4, "betas": [0.9, 0.95], "curvature": {"interval": 2}},
    "training": {"epochs": 2, "batch_size": 2, "seed": 0},
    "benchmark": {"name": "request", "forget": "forget.jsonl", "kept": "keep.jsonl"},
    "evaluation": {"max_new_tokens": 8},
}
MATRIX = {
    "label": "fuzz",
    "tasks": {"t": dict.fromkeys(("model", "gold", "forget", "retain", "seen", "unseen", "text"), "x")},
    "objectives": ["npo"],
    "optimizers": [
        {"name": "adamw"},
        {"name": "kfac", "order": "second", "knob": {"setting": "damping", "low": 0.1, "high": 1.0}},
    ],
    "training": {"max_steps": 6},
    "attacks": [{"name": "quantize"}],
}
MATRIX["tasks"]["t"] |= {"tune": ["a"], "report": ["b"]}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 10**9, 10**30, -(10**20), 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "npo", "1e5", "nan", "../../../etc/passwd", "/dev/zero", "/dev/null", ".", "~", "a" * 5000,
    "x" * 300 + ".jsonl", "people:n=3", "people:n=-1", "people:n=99999999999", "general:facts", "general:no",
    "owner/name", "keep.jsonl,limit=0", "keep.jsonl,split=x", "\x1b[2J\x1b]0;x\x07", "\u202egnp.exe",
    "<script>alert(1)</script>", "[bold]x[/]", "{request}", "{0.x}", "%s%n", "=1+1", "\x00", "\ud800", "\ufeff",
    "é" * 100, [], {}, [[]], [None], [1, "a"], {"name": None}, {"name": "npo"}, {"a": {"b": {"c": []}}},
    {"name": "sophia", "lr": "fast"}, [[[[[[[[1]]]]]]]], {"": ""}, {"name": ["npo"]},
]  # fmt: skip
LINES = [
    b"\xff\xfe\x00", b"\x00" * 8, b"a: &a [*a]", b"? [a]: b", b"a: !!python/object/apply:os.system ['touch ran']",
    b"---\n---", b"*x", b"<<: 7", b"\t- x", b"[" * 3000, b"{" * 3000, b"- " * 3000, b"a: 1\na: 2",
    b'{"question": "a", "question": "b"}', b'{"question": NaN, "answer": "x"}',
    b'{"question": "\\ud800", "answer": "x"}', b"9" * 6000, b'"' + b"x" * 200_000 + b'"', b"null", b"[]", b"true",
    b"{}", b"{", b"\r", b"\xef\xbb\xbf", "\u2028\u202e\x1b[31m".encode(), b"question,answer,question",
    b"a: 2024-99-99", b"a: 0x", b"a: 1:60:99", b"%YAML 9.9", b"a: |\n  x\n y", b"a: 'x", b"b: !!int x", b"&a " * 100,
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- changes ---------------------------------------------------------------------------------------------------------


def nodes(tree: Any, path: tuple = ()) -> list[tuple]:
    """The places in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in nodes(value, (*path, key)))]


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Put something odd somewhere, or leave something out, or call it otherwise."""
    tree = json.loads(json.dumps(tree))
    place = rng.choice(nodes(tree))
    if not place:
        return rng.choice(ODD)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[place[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(place[-1]) + rng.choice(["s", "", " ", "\n", "é", "x" * 3000])] = parent.pop(place[-1])
    else:
        parent[place[-1]] = rng.choice(ODD)
    return tree


def change_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert, repeat, or encode otherwise."""
    at, kind = rng.randrange(len(raw) + 1), rng.randrange(12)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return b""
    if kind == 2:
        flipped = bytearray(raw)
        for _ in range(rng.randrange(1, 9)):
            flipped[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(flipped)
    if kind == 3:
        return raw[:at] + rng.randbytes(rng.randrange(1, 40)) + raw[at:]
    if kind == 4:
        text = raw.decode("utf-8", "replace")
        return text.encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "latin-1", "cp037"]), "replace")
    if kind == 5:
        return b"\xef\xbb\xbf" * rng.randrange(1, 3) + raw
    if kind == 6:
        return raw.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8"]))
    if kind == 7:
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", raw))
        if numbers:
            found = rng.choice(numbers)
            odd = rng.choice(
                [b"NaN", b"-1", b"1e999", b"9" * 5000, b".nan", b"0x7f", b"1_0", b"Infinity", b"18446744073709551616"]
            )
            return raw[: found.start()] + odd + raw[found.end() :]
    if kind == 8:
        return raw + raw
    lines = raw.split(b"\n")
    place = rng.randrange(len(lines))
    if kind == 9:
        return b"\n".join([*lines[:place], *lines[place + 1 :]])
    return b"\n".join([*lines[:place], rng.choice(LINES), *lines[place:]])


def change_file(file: Path, rng: random.Random) -> None:
    """Put something else in a file's place, or change what it holds."""
    kind = rng.randrange(20)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.unlink()
        file.mkdir()
    elif kind == 2:
        file.unlink()
        os.mkfifo(file)
    elif kind == 3:
        file.unlink()
        file.symlink_to(rng.choice([file.name, "/dev/null", "nowhere"]))
    else:
        raw = file.read_bytes()
        for _ in range(rng.choice([1, 1, 1, 2])):
            raw = change_bytes(raw, rng) if raw else raw
        file.write_bytes(raw)


# ---- the world -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "world"
    (place / "tame").mkdir(parents=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    for name in ("forget.jsonl", "keep.jsonl"):
        (place / name).write_text(lines.replace("baker", "cook") if name == "keep.jsonl" else lines, encoding="utf-8")
    (place / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (place / "rows.csv").write_text("question,answer\n" + "".join(f'{r["question"]},"{r["answer"]}"\n' for r in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), place / "rows.parquet")
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (place / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    hostile_run(place / "run", "tame")
    hostile_contest(place / "contest", "tame")
    make_model().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    writer = GGUFWriter(place / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_tensor("token_embd.weight", make_model().model.embed_tokens.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


Command = tuple[list[str], str]
"""Words, and what a message about them must name (a pattern)."""
SECTIONS = "|".join(
    [*RECIPE, "adapter", "method", "setting", "recipe", "keep.jsonl", "forget.jsonl", "general:", "people:", "source"]
)


def recipe_case(place: Path, rng: random.Random) -> Command:
    file = place / "recipe.yaml"
    if rng.random() < 0.6:
        text = yaml.safe_dump(change_tree(RECIPE, rng), allow_unicode=rng.random() < 0.5)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        change_file(file, rng)
    words = ["show", "recipe.yaml"] if rng.random() < 0.5 else ["unlearn", "recipe.yaml", "--out", "out"]
    return words, rf"(?i)recipe\.yaml|\b({SECTIONS})|nomodel|cannot load|no file|file name|/dev/"


def data_case(place: Path, rng: random.Random) -> Command:
    name = rng.choice(["forget.jsonl", "forget.jsonl", "rows.json", "rows.csv", "rows.parquet"])
    if name.endswith(("jsonl", "json")) and rng.random() < 0.5:
        tree = change_tree(ROWS, rng)
        lines = tree if isinstance(tree, list) and name.endswith("jsonl") else None
        text = json.dumps(tree) if lines is None else "\n".join(json.dumps(row) for row in lines)
        (place / name).write_text(text)
    else:
        change_file(place / name, rng)
    sets = ["--retain", name] if rng.random() < 0.5 else ["--forget", name, "--retain", "keep.jsonl"]
    words = ["finetune" if sets[0] == "--retain" else "unlearn", "--model", "./nomodel", *sets, "--out", "out"]
    with contextlib.suppress(ValueError):
        load_examples(place / name)
        return words, "nomodel|retain set"
    return words, re.escape(name)


def model_case(place: Path, rng: random.Random) -> Command:
    """A model that loads is refused afterwards: no prompt fits into two tokens."""
    if rng.random() < 0.2:
        change_file(place / "m.gguf", rng)
        target, named = "m.gguf", r"m\.gguf|max_length=2"
    else:
        file = rng.choice(sorted((place / "model").glob("*.*")))
        if file.suffix == ".json" and rng.random() < 0.6:
            text = json.dumps(change_tree(json.loads(file.read_text()), rng))
            file.write_text(text)
        else:
            change_file(file, rng)
        target, named = "model", "model|max_length=2"
    settings = ["training.max_length=2", "data.overlap=ignore"]
    return ["finetune", "--model", target, "--retain", "keep.jsonl", "--out", "out", *settings], named


def report_case(place: Path, rng: random.Random) -> Command:
    target = rng.choice(["run", "run", "contest"])
    file = rng.choice(sorted(p for p in (place / target).rglob("*.*") if p.is_file()))
    if file.suffix == ".json" and rng.random() < 0.6:
        file.write_text(json.dumps(change_tree(json.loads(file.read_text()), rng)))
    else:
        change_file(file, rng)
    return ["report", target, "--out", "page.html"], target


def command_case(place: Path, rng: random.Random) -> Command:
    keys = [
        "training.epochs",
        "optimizer.lr",
        "optimizer",
        "objective.retain",
        "data.forget",
        "model.path",
        "label",
        "adapter.r",
    ]
    keys += [
        "a.b.c",
        "",
        ".",
        "training..x",
        "=",
        "--",
        "evaluation",
        "benchmark.forget",
        "method",
        "method.name",
        "training",
    ]
    odd = [str(value) for value in ODD if "\0" not in str(value)]
    pool = [
        "recipe.yaml",
        "--out",
        "out",
        "--forget",
        "forget.jsonl",
        "--retain",
        "keep.jsonl",
        "--model",
        "./nomodel",
        "run",
    ]
    pool += [
        "--no-evaluate",
        "--gpus",
        "--phase",
        "tune",
        "--benchmark",
        "tofu",
        "--precision",
        "-h",
        "--bogus",
        "-",
        "nowhere",
    ]
    words = [
        rng.choice(
            ["unlearn", "finetune", "evaluate", "report", "export", "show", "list", "plan", "bogus", "show", "show"]
        )
    ]
    for _ in range(rng.randrange(6)):
        kind = rng.randrange(3)
        made = rng.choice(odd) if kind == 1 else f"{rng.choice(keys)}={rng.choice(odd)}"
        words.append(rng.choice(pool) if kind == 0 else made)
    return words, "."


CASES: list[tuple[Callable[[Path, random.Random], Command], int]] = [
    (recipe_case, 5), (data_case, 5), (model_case, 4), (report_case, 4), (command_case, 5),
]  # fmt: skip


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every file but those of the output, with its size and time."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if name.split("/")[0] not in ("out", "cache", "runs"):
            state = path.lstat()
            found[name] = (state.st_size, state.st_mtime_ns) if not path.is_dir() else (0, 0)
    return found


def attempt(words: list[str]) -> tuple[int, str, str, float]:
    """Run a command line in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as left:
            code = int(left.code or 0)
    took = time.process_time() - started
    for stream in (out, err):
        stream.flush()
    said, complained = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))  # type: ignore[attr-defined]  # a BytesIO
    return code, said, complained, took


def check(place: Path, words: list[str], named: str, budget: float) -> str:
    """Run and return what is wrong with how it ended; nothing where it is right."""
    before = snapshot(place)
    try:
        code, out, err, took = attempt(words)
    except Exception as error:  # noqa: BLE001 - this is what the test is about
        return f"{type(error).__name__}: {error!s:.300}"
    err = re.sub(r"\rConverting[^\r\n]*", "", err)  # transformers' own bar
    after = snapshot(place)
    for page in ("page.html", "report.html") if code == 0 else ():
        after.pop(page, None)
    messages = [line for line in err.splitlines() if "error:" in line]
    last = messages[-1] if messages else ""
    left = (
        sorted(p.name for p in (place / "out").rglob("*") if not p.name.endswith("lock"))
        if (place / "out").is_dir()
        else []
    )
    faults = {
        f"exit code {code}": code not in (0, 2),
        f"{took:.1f} seconds": took > budget,
        f"the terminal is steered: {STEERS.findall(out + err)[:3]!r}": bool(STEERS.search(out + err)),
        f"{len(messages)} messages: {err[-600:]!r}": code == 2 and len(messages) != 1,
        f"the message is not last: {err[-600:]!r}": code == 2 and not err.rstrip().endswith(last),
        f"the message names nothing: {last!r}": code == 2 and not re.search(named, last),
        f"the message is endless: {len(last)}": len(last) > 2500,
        f"changed: {sorted(set(before.items()) ^ set(after.items()))[:4]}": before != after,
        f"half-written: {left}": code == 2 and bool(left),
        "something ran": (place / "ran").exists(),
    }
    return "; ".join(fault for fault, found in faults.items() if found)


@pytest.mark.parametrize("part", range(PARTS))
def test_taken_or_refused_in_one_sentence(world: Path, tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setitem(models.OFFLINE, "smollm2-135m", ("no_such_package", "./nomodel"))
    wrong = []
    for number in range(part, COUNT, PARTS):
        rng = random.Random(f"{SEED}:{number}")
        place = tmp_path / str(number)
        shutil.copytree(world, place, symlinks=True)
        monkeypatch.chdir(place)
        make = rng.choices([case for case, _ in CASES], [weight for _, weight in CASES])[0]
        words, named = make(place, rng)
        fault = check(place, words, named, budget=10.0 if make is model_case else 2.0)
        if fault:
            wrong.append(f"{number} {make.__name__} {' '.join(words)!r:.200}: {fault}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
    assert not wrong, "\n".join(wrong)


def test_matrices_raise_nothing_but_value_errors(tmp_path: Path):
    file, taken, refused = tmp_path / "matrix.yaml", 0, 0
    for number in range(COUNT // 2):
        rng = random.Random(f"{SEED}:matrix:{number}")
        text = yaml.safe_dump(change_tree(MATRIX, rng))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read_matrix(file).tree()
            taken += 1
        except ValueError as error:
            refused += bool(str(error))
    assert taken
    assert refused > taken


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        ([b"show", b"label=\xff\xfe"], {}, 2, "is not UTF-8 text"),
        ([b"report", b"run", b"--out", b"\x1b[2J.html"], {"PYTHONIOENCODING": "ascii"}, 0, "report:"),
        ([b"list", b"attacks"], {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, 0, "relearn"),
        ([b"report", b"\x1b]0;x\x07\xe2\x80\xae"], {}, 2, "not a run directory"),
    ],
    ids=["bytes", "ascii", "list", "names"],
)
def test_as_a_process(
    world: Path, tmp_path: Path, words: list[bytes], environment: dict[str, str], code: int, said: str
):
    place = Path(shutil.copytree(world, tmp_path / "world"))
    hostile_run(place / "evil", "\x1b[2J\u202e é 日本")
    shutil.rmtree(place / "run")
    (place / "evil").rename(place / "run")
    command: list[str | bytes] = [sys.executable, "-m", "soul.cli", *words]
    done = subprocess.run(command, cwd=place, env={**os.environ, **environment}, capture_output=True, timeout=300)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, err
    assert "Traceback" not in err
    assert said in out + err
    assert not STEERS.search(out + err)
