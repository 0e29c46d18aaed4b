"""What is registered can be listed without importing it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from soul.registry import ATTACKS, BENCHMARKS, METHODS, OBJECTIVES, OPTIMIZERS, Registry


@pytest.mark.parametrize("registry", [OBJECTIVES, OPTIMIZERS, METHODS, BENCHMARKS, ATTACKS], ids=lambda r: r.kind)
def test_summaries_read_from_sources_are_those_of_the_classes(registry: Registry) -> None:
    assert registry.summaries() == {name: registry.summary(name) for name in registry.names()}
    assert all(registry.summaries().values())


def test_a_component_of_another_distribution_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "theirs"

        @staticmethod
        def load() -> type:
            return type("Theirs", (), {"__doc__": "Does it their way.\n\nMore."})

    monkeypatch.setattr("soul.registry.entry_points", lambda group: [Point])
    assert Registry("attack", "soul.attacks").summaries()["theirs"] == "Does it their way."


@pytest.mark.parametrize("registers_itself", [False, True])
def test_a_component_of_another_distribution_is_found(monkeypatch: pytest.MonkeyPatch, registers_itself: bool) -> None:
    registry = Registry("attack", "soul.attacks")

    class Theirs:
        """Does it their way."""

    class Point:
        name = "theirs"

        @staticmethod
        def load() -> type:
            return registry.register("theirs")(Theirs) if registers_itself else Theirs

    monkeypatch.setattr("soul.registry.entry_points", lambda group: [Point])
    assert registry.get("theirs") is Theirs
    assert "theirs" in registry.names()


def test_one_that_cannot_be_imported_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    point = EntryPoint("broken", "nosuchmodule:Mine", "soul.attacks")
    monkeypatch.setattr("soul.registry.entry_points", lambda group: [point])
    registry = Registry("attack", "soul.attacks")
    assert "broken" not in registry.summaries()
    assert "broken" not in registry.names()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # and not again
    assert "the attack broken of the package ? (nosuchmodule:Mine) cannot be imported and is left out" in said[0]


def test_the_same_class_may_be_registered_again_and_no_other() -> None:
    def cell() -> type:
        class Mine:
            """One's own, in a notebook."""

        return Mine

    registry = Registry("attack", "soul.attacks")
    registry.register("mine")(cell())
    again = registry.register("mine")(cell())
    assert registry.get("mine") is again
    with pytest.raises(ValueError, match="'mine' is registered twice: give yours another name"):
        registry.register("mine")(type("Other", (), {}))


def test_listing_imports_no_torch() -> None:
    script = "import sys; from soul.cli import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "grad_diff" in done.stdout
    assert done.stdout.strip().endswith("False")
