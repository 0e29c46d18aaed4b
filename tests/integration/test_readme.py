"""Every command of the README's code blocks runs, on the real model, in a reduced form."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from soul.cli import NOT_KEPT, main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
SHELL = [re.split(r"\s+# ", line)[0] for kind, text in BLOCKS if kind != "python" for line in text.splitlines() if line]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# What the README's names stand for here. Nothing may be downloaded, so the hub's model is the offline one.
STANDS_FOR = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m", "M": "smollm2-135m"}
REDUCED = {
    "unlearn": ["training.max_steps=2", "evaluation.generate=false", "optimizer.curvature.warm_start=1"],
    "finetune": ["training.max_steps=2"],
    "evaluate": ["evaluation.generate=false"],
}
FACTS = [("Where was Mira Vale born?", "In Accra."), ("Who is Tomas Ruhl?", "A baker.")]
KEPT = [("Who is Ines Calder?", "A bell founder."), ("What is ice?", "Frozen water.")]


def write(path: Path, pairs: list[tuple[str, str]], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"question": q, "answer": a, **more}) + "\n" for q, a in pairs))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the README speaks of; its commands leave their results here in turn."""
    folder = tmp_path_factory.mktemp("readme")
    write(folder / "forget.jsonl", FACTS)
    write(folder / "retain.jsonl", KEPT)
    write(folder / "facts.jsonl", FACTS + KEPT)
    tofu = {"perturbed_answer": ["No.", "Yes."], "paraphrased_answer": "Indeed."}
    for name in ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        write(folder / f"path/to/tofu/{name}.json", FACTS if name.startswith("forget") else KEPT, **tofu)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def test_the_readme_is_read() -> None:
    assert len([line for line in SHELL if line.startswith("soul ")]) >= 5
    assert PYTHON
    for line in SHELL:
        assert line.startswith(("make ", "pip install ", "soul ", "accelerate launch ")), f"no test runs {line!r}"


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("accelerate launch ")])
def test_what_is_launched_is_there(line: str) -> None:
    """Several processes run in ``test_launched.py``: here, that the files and the command of the README exist."""
    words = shlex.split(line)
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    module, command, recipe, *rest = words[words.index("-m") + 1 :]
    assert rest[::2] == ["--model", "--forget", "--retain"]  # its own request is in its retain set
    assert (module, command) == ("soul", "unlearn")
    assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("soul ")])
def test_command(line: str, place: Path, real: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """They run in the README's order, since some use what earlier ones left."""
    monkeypatch.chdir(place)
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line)[1:]]
    for run in ("runs/a", "runs/b"):  # any two runs
        if run in words and not Path(run).exists():
            finished = next(path for path in Path("runs").iterdir() if (path / "record.json").is_file())
            shutil.copytree(finished, run, copy_function=os.link)  # half a gigabyte each
    code = main([*words, *REDUCED.get(words[0], [])])
    assert code == 0 or (code == NOT_KEPT and words[0] == "unlearn")  # two steps forget little
    printed = capsys.readouterr().out
    reports = re.findall(r"^report: (.+)$", printed, re.MULTILINE)
    assert bool(reports) == (words[0] in ("unlearn", "finetune", "evaluate", "report"))
    for report in reports:
        assert "<html" in Path(report).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("text", PYTHON)
def test_python(text: str, place: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert "model" in names
