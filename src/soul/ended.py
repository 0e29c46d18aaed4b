"""How training ended, in a run's folder: by its stopping rule, and whether that kept what it promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soul import processes
from soul.stopping import Stopping, StopSpec
from soul.stored import check_format, write_json
from soul.strict import json_value, plain_number, read_number, read_text

STOPPED = "stopped.json"
"""The file of a run that says why its training ended, where a rule may end it."""


def write_stopped(stopping: Stopping, out: Path) -> None:
    """Write how a rule ended training; nothing where it has not."""
    if stopping.stopped and processes.is_main():
        write_json(out / STOPPED, {"format": 1, **stopping.stopped.record()})


def read_stopped(out: Path) -> dict[str, Any]:
    """Return why a run's training ended as ``record.json`` holds it; nothing where no rule could end it."""
    file = out / STOPPED
    if not file.is_file():
        return {}
    found = json_value(read_text(file), str(file))
    check_format("stopped", found, file)
    return {"stopped": {name: value for name, value in found.items() if name != "format"}}


def checks_of(out: Path, stop: StopSpec) -> list[dict[str, Any]]:
    """Return what a run with a stopping rule promised, and whether it was kept; nothing where no rule could end it."""
    stopped = read_stopped(out).get("stopped")
    if not stopped:
        return []
    moved = max(read_number(value) for value in stopped["moved"].values())
    forgotten = (
        f"of what was known at most {stop.known:.0%} is left, and greedy answers hold at most {stop.recited:.0%}"
    )
    kept = f"behaviour elsewhere moved by a KL of at most {stop.kl_budget:g} nats a token"
    return [
        {"name": forgotten, "passed": _holds(stopped, stop), "value": stopped["known"]},
        {"name": kept, "passed": moved <= stop.kl_budget, "value": plain_number(moved)},
    ]


def _holds(stopped: dict[str, Any], stop: StopSpec) -> bool:
    """Say whether it has forgotten; of an adapter that was merged by what the merged weights say."""
    if stopped["why"] != "merged":
        return bool(stopped["why"] == "forgotten")
    said = stopped["recited"]
    return said is not None and said <= stop.recited and read_number(stopped["known"]) <= stop.known
