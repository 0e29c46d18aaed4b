from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from soul.cli import main
from soul.explain import REGISTRIES, documented, explain, parts, settings

EVERYTHING = {**parts(), **{f"{r.kind}.{name}": r.get(name) for r in REGISTRIES.values() for name in r.names()}}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_setting_is_explained(name):
    cls = EVERYTHING[name]
    assert not [s.name for s in settings(cls) if not s.text]
    text = "\n".join(explain([name]))
    assert all(f"  {f.name}: " in text for f in dataclasses.fields(cls) if f.init)
    assert "``" not in text
    assert ":class:" not in text


def test_the_nearest_docstring_counts():
    class Base:
        """Base.

        Attributes:
            a: Of the base,
                on two lines.
            b: Of both.

        Example:
            c: no setting
        """

    class Own(Base):
        """Own.

        Attributes:
            b: Of its own.
        """

    assert documented(Own) == {"a": "Of the base, on two lines.", "b": "Of its own."}


def test_defaults_and_types_are_said_as_yaml_has_them():
    found = {s.name: s for s in settings(parts()["training"])}
    assert found["compile"].takes == "true | false"
    assert found["compile"].default == "false"
    assert found["schedule"].takes == "linear | cosine | constant"
    curvature = next(s for s in settings(REGISTRIES["optimizer"].get("kfac")) if s.name == "curvature")
    assert curvature.default == "interval 0, warm_start 8, general_text 2"  # what it has other than a curvature's own
    assert "`soul explain curvature`" in curvature.takes
    assert next(s for s in settings(parts()["task"]) if s.name == "model").default == ""  # must be given


def test_a_single_setting_is_explained_alone(capsys):
    assert main(["explain", "kfac.damping"]) == 0
    said = capsys.readouterr().out
    assert "mean eigenvalue" in said
    assert "momentum" not in said
    assert main(["explain", "optimizer.kfac.damping"]) == 0
    assert capsys.readouterr().out == said


def test_a_reader_that_leaves_ends_it_in_silence():
    command = [sys.executable, "-m", "soul", "explain", *parts()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "recipe\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        (
            "optimizer.max_dim",
            ["optimizer ekfac", "optimizer kfac", "optimizer whiten"],
        ),  # as plans and warnings say it
        ("kfac.curvature.interval", ["optimizer kfac curvature"]),
        ("influence.solver.damping", ["method influence solver"]),
        ("recipe.training.seed", ["recipe training"]),
    ],
)
def test_settings_are_found_by_what_messages_call_them(word, kinds):
    found = list(explain([word]))
    assert [line for line in found if line and not line.startswith(" ")] == kinds
    assert sum(line.startswith(f"  {word.rpartition('.')[2]}: ") for line in found) == len(kinds)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kfca", "nothing is called 'kfca'. Did you mean 'kfac'?"),
        ("optimizer.kfca", "unknown optimizer 'kfca'. Did you mean 'kfac'?"),
        ("optimizer", "unknown optimizer 'optimizer'. Known: adamw, "),
        ("kfac.damping.x", "optimizer kfac damping has no settings of its own"),
        ("kfac.dampng", "optimizer kfac has no setting 'dampng'. It has: lr, "),
        ("\x1b[31m", "nothing is called"),
    ],
)
def test_what_is_not_there_is_told(word, message, capsys):
    assert main(["explain", word]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "\x1b[31m" not in said
