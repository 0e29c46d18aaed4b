"""Locks, disks, lost models, determinism and old records, by whole commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from soul.cli import main
from soul.folderlock import LOCK, alone_at, alone_in
from soul.report import read_run, write_report

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {d}/model
data: {{forget: {d}/forget.jsonl, retain: {d}/retain.jsonl}}
objective: {{name: npo, retain: kl}}
optimizer: {{name: sophia, lr: 1e-3, curvature: {{interval: 2}}}}
training: {{batch_size: 2, max_steps: 12, save_steps: 2, precision: float32}}
benchmark: {{name: request, forget: {d}/forget.jsonl, kept: {d}/retain.jsonl, general: "", text: ""}}
evaluation: {{max_new_tokens: 8}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer, forget_set, retain_set):
    folder = tmp_path_factory.mktemp("durable")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No.", "Yes."]} for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(d=folder))
    return folder


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("SOUL_CACHE", str(place / "cache"))


def unlearn(place: Path, out: Path, *words: str) -> int:
    return main(["unlearn", str(place / "recipe.yaml"), "--out", str(out), *words])


def content(out: Path, *patterns: str) -> dict[str, bytes]:
    patterns = patterns or ("model/*", "rows/*/*", "scores.json")
    return {str(p.relative_to(out)): p.read_bytes() for pattern in patterns for p in sorted(out.glob(pattern))}


@pytest.fixture(scope="module")
def once(place):
    """The run, once, with one thread."""
    out = place / "once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOUL_CACHE", str(place / "cache-of-once"))
        assert unlearn(place, out) == 0
    return out


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_recipe_gives_the_same_bytes(place, once, threads):
    outs = [place / f"again-{threads}-{i}" for i in range(2)]
    torch.set_num_threads(threads)
    try:
        if threads == 1:
            outs[0] = once
            codes = [unlearn(place, outs[1])]
        else:
            codes = [unlearn(place, out) for out in outs]
    finally:
        torch.set_num_threads(1)
    assert not any(codes)
    first, second = (content(out) for out in outs)
    assert len(first) >= 8
    assert first == second
    assert json.loads((outs[1] / "environment.json").read_text())["threads"] == threads


def test_a_report_built_twice_is_the_same_file(once, tmp_path):
    files = [write_report([once], tmp_path / name) for name in ("a.html", "b.html")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() == (once / "report.html").read_bytes()


def test_a_second_process_is_refused_at_once(place, once, tmp_path, capsys):
    model = [
        "evaluate",
        str(place / "model"),
        "--benchmark",
        "request",
        f"forget={place}/forget.jsonl",
        f"kept={place}/retain.jsonl",
    ]
    with alone_in(tmp_path / "taken"):
        assert unlearn(place, tmp_path / "taken") == 2
        assert main([*model, "--out", str(tmp_path / "taken")]) == 2
        with alone_at(tmp_path / "exported"):
            assert main(["export", str(once), "--out", str(tmp_path / "exported")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("another process is at work in") == 3
        assert "choose another --out" in said
        assert [p.name for p in (tmp_path / "taken").iterdir()] == [LOCK]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_going_on_under_other_conditions_is_said(place, tmp_path, caplog):
    out = tmp_path / "run"
    assert unlearn(place, out, "--no-evaluate", "training.max_steps=2") == 0
    assert json.loads((out / "record.json").read_text())["warnings"] == []
    file = out / "environment.json"
    here = json.loads(file.read_text())
    assert here["format"] == 1
    file.write_text(json.dumps(here | {"torch": "1.13", "threads": 64, "platform": "another kernel", "command": "x"}))
    for _ in range(2):  # said once: the second time goes on under the conditions of the first
        assert unlearn(place, out, "training.max_steps=2") == 0
        (out / "scores.json").unlink()
    said = f"torch was 1.13 and is {version('torch')}, threads was 64 and is 1"
    assert caplog.text.count(said) == 1
    warnings = [warning for warning in read_run(out).warnings if "fewer tokens" not in warning]
    assert [re.sub(r"\(.*\)", "", w) for w in warnings] == [
        "it went on under other conditions : an uninterrupted run may end with other bytes"
    ]
    assert said in warnings[0]
    assert json.loads(file.read_text())["later"][0]["torch"] == version("torch")


def test_a_lost_model_ends_the_command_and_keeps_what_was_good(place, tmp_path, capsys):
    words = [
        "objective=ga",
        "objective.retain=nll",
        "objective.retain_weight=0",
        "optimizer=signum",
        "optimizer.lr=0.03",
    ]
    assert unlearn(place, tmp_path / "run", *words, "training.max_steps=40", "training.max_retain_loss=20") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"error: the retain loss was .* at step 1, is .* at step \d+ .* lower optimizer.lr \(now 0.03", said
    )
    kept = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert len(kept) == 1
    assert kept[0].startswith("checkpoint-")
    assert not (tmp_path / "run/model").exists()


def test_a_disk_that_fills_up_and_a_folder_that_turns_read_only(place, once, tmp_path):
    """The small disk is in a namespace of mounts of its own. Root may write anywhere, and gives up that capability."""
    kinds, root = ("full", "shut"), os.geteuid() == 0
    prefix = ["unshare", "--mount"] if root else ["unshare", "--user", "--map-root-user", "--mount"]
    prefix += ["setpriv", "--bounding-set=-dac_override"]
    probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("setpriv") or subprocess.run(probe, capture_output=True).returncode != 0:
        if root:
            pytest.skip("this machine lets nobody mount; test_checkpoints.py fills up by a limit on file sizes")
        prefix, kinds = [], ("shut",)
    script = [str(Path(__file__).with_name("disks.py")), str(place / "recipe.yaml"), str(tmp_path), *kinds]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOUL_CACHE": str(place / "cache-of-disks")}
    done = subprocess.run([*prefix, sys.executable, *script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    said = " ".join(done.stderr.split())
    assert list(found) == list(kinds)
    for kind, end in found.items():  # the first checkpoint stayed, and the second command ended as if nothing had been
        assert end["codes"] == [2, 0]
        assert end["last"] == str(tmp_path / kind / "checkpoints/checkpoint-2")
        assert end["logged"] in ([1, 2], [1, 2, 3], [1, 2, 3, 4])
        assert end["steps"] == list(range(1, 13))
        assert bytes.fromhex(end["weights"]) == (once / "model/model.safetensors").read_bytes()
    assert said.count("error:") == said.count("what was written before is whole") == len(kinds)
    assert said.count("the same command goes on from there") == len(kinds)
    assert "Permission denied" in said
    assert re.search("make .*shut/checkpoints writable, or choose another --out", said)
    if "full" in kinds:
        assert "No space left on device" in said
        assert "free some space (0 MiB are free there)" in said


def test_records_of_earlier_versions_open(capsys, tmp_path):
    golden = ROOT / "tests/golden/run-format-1"
    run = read_run(golden)
    assert (run.label, run.steps, run.n_forget, run.n_retain) == ("npo + sophia", 12, 8, 10)
    assert [score.metric for score in run.after]
    assert len(run.log) == 12
    assert set(run.rows_before) == set(run.rows_after) == {"forget", "kept"}
    evaluation = read_run(ROOT / "tests/golden/evaluation-format-2")
    assert evaluation.after
    assert not evaluation.before
    assert main(["report", str(golden), str(golden), "--out", str(tmp_path / "report.html")]) == 0
    results = [file.parent for file in ROOT.glob("docs/results/**/record.json")]  # of before there was a number
    assert results
    for folder in results:
        assert read_run(folder).after or read_run(folder).log


def test_records_of_later_versions_are_refused_by_name(tmp_path, capsys):
    for name in ("record.json", "scores.json", "environment.json"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(ROOT / "tests/golden/run-format-1", tmp_path / "run")
        file = tmp_path / "run" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
        assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{name}: format must be 1" in said
        assert "newer version" in said


def test_a_short_soak():
    """``benchmarks/soak.py`` in small: the figures of the long one are in docs/reliability.md."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--kills", "3", "--only", "run"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| run \| \d+ \| 3 \| \d \| \d \| 0 \| \d+ \| 0 \|", done.stdout)
