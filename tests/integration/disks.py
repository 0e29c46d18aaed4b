"""A process of its own for test_durable.py: the disk under a run fills up, or turns read-only, after a checkpoint.

    python disks.py RECIPE FOLDER full shut

For each kind it gives the same command twice, the disk as it should be the second time, and prints what came of it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from soul import checkpoints
from soul.cli import main
from soul.stored import read_lines


def fill(out: Path) -> None:
    """Take all the space there is."""
    with (out / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def turn(out: Path, mode: int) -> None:
    for folder in (out, out / "checkpoints"):
        folder.chmod(mode)


def steps(out: Path) -> list[int]:
    return [line["step"] for line in read_lines(out / "log.jsonl")]


def try_it(recipe: str, out: Path, kind: str) -> dict[str, Any]:
    out.mkdir()
    if kind == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(out)], check=True)
    publish = checkpoints.publish

    def then(part: Path, place: Path) -> None:
        publish(part, place)
        checkpoints.publish = publish
        fill(out) if kind == "full" else turn(out, 0o555)

    checkpoints.publish = then
    command = ["unlearn", recipe, "--out", str(out)]
    codes = [main(command)]
    print("---", file=sys.stderr, flush=True)
    found = {"last": checkpoints.last_checkpoint(out / "checkpoints"), "logged": steps(out)}
    if kind == "full":
        (out / "filler").unlink()
    else:
        turn(out, 0o755)
    codes.append(main(command))
    weights = (out / "model/model.safetensors").read_bytes().hex()
    return {**found, "codes": codes, "steps": steps(out), "weights": weights}


if __name__ == "__main__":
    recipe, folder, *kinds = sys.argv[1:]
    print(json.dumps({kind: try_it(recipe, Path(folder) / kind, kind) for kind in kinds}))
