"""Kill runs for good at random moments, give the same command again, and compare with what nobody killed.

    python benchmarks/soak.py --kills 100

Each scenario is a command of the command line on a tiny random model: a run (measured, trained with a second-order
rule, saved, measured), an evaluation, an export, and a contest. A sitting is a process that is killed by SIGKILL after
a random share of the time that the whole takes, or as soon as something is being written (a name that ends in
``.part`` appears in its folder), or that ends by itself. Sittings follow one another in one folder until the command
has come to its end. Then weights, rows, scores and losses are compared byte for byte with those of an uninterrupted
one, and so is every checkpoint that any sitting wrote: weights, optimizer, scheduler, random states. Times and memory
differ and are left out; so is ``training_args.bin``, which names the folder.

Sittings are forked from one process that has imported everything, which saves seconds each and changes nothing else
(Linux or macOS). Exits with 1 where a run was lost or differed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from _tiny import make_place

TIMED = ("seconds", "curvature_seconds", "peak_memory_bytes")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command that may be killed.

    Attributes:
        name: What the table calls it.
        command: Returns its words for an output folder.
        matters: Returns, by name, all bytes of that folder that a kill must not change.
        shared: Others may be at work in the folder, so that what is half-written may only be removed an hour later.
    """

    name: str
    command: Callable[[Path], list[str]]
    matters: Callable[[Path], dict[str, bytes]]
    shared: bool = False


@dataclasses.dataclass
class Found:
    """What came of a scenario.

    Attributes:
        commands: Commands that came to their end.
        kills: Sittings that were killed, by what they were at.
        lost: What went wrong in a command that did not come to its end.
        different: What differed from the uninterrupted one.
        compared: Files compared, those of checkpoints included.
        longest: Most kills in one command.
    """

    commands: int = 0
    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)
    different: list[str] = dataclasses.field(default_factory=list)
    compared: int = 0
    longest: int = 0


def scenarios(place: Path) -> dict[str, Scenario]:
    """Return what can be killed; ``export`` needs the run that ``place/run-whole`` holds."""
    request = [f"{name}={place}/{file}.jsonl" for name, file in (("forget", "forget"), ("kept", "retain"))]
    evaluate = [str(place / "base"), "--benchmark", "request", *request, "general=", "text="]
    found = [
        Scenario("run", lambda out: ["unlearn", str(place / "recipe.yaml"), "--out", str(out)], of_run),
        Scenario(
            "evaluation",
            lambda out: ["evaluate", *evaluate, "evaluation.max_new_tokens=32", "--out", str(out)],
            of_evaluation,
        ),
        Scenario("export", lambda out: ["export", str(place / "run-whole"), "--out", str(out)], of_export),
        Scenario("contest", lambda out: ["bench", str(place / "matrix.yaml"), "--out", str(out)], of_contest, True),
    ]
    return {scenario.name: scenario for scenario in found}


def _files(out: Path, *patterns: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for pattern in patterns
        for p in sorted(out.glob(pattern))
        if p.is_file()
    }


def _untimed(line: Mapping[str, Any]) -> bytes:
    return json.dumps({k: v for k, v in line.items() if k not in TIMED}).encode()


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of_run(out: Path) -> dict[str, bytes]:
    """Return weights, tokenizer, rows, scores and losses."""
    log = {f"log.jsonl step {line['step']}": _untimed(line) for line in _lines(out / "log.jsonl")}
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    return _files(out, "model/*", "rows/*/*", "scores.json", "recipe.yaml") | log | {"record.json": _untimed(record)}


def of_evaluation(out: Path) -> dict[str, bytes]:
    """Return rows and the score table."""
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    return _files(out, "rows/*/*", "record.json") | {"scores.json": json.dumps(scores["after"]).encode()}


def of_export(out: Path) -> dict[str, bytes]:
    """Return all files; the card's title is the folder's name."""
    files = _files(out, "*")
    card = files.pop("README.md").replace(out.name.encode(), b"NAME")
    marker = json.loads(files.pop("soul_export.json"))
    del marker["files"]["README.md"]
    return files | {"README.md": card, "soul_export.json": json.dumps(marker).encode()}


def of_contest(out: Path) -> dict[str, bytes]:
    """Return what every job found."""
    lines = _lines(out / "trials.jsonl")
    assert len({line["key"] for line in lines}) == len(lines), "a job is recorded twice"
    return {line["key"]: _untimed(line) for line in lines}


def sit(argv: list[str], notes: Path, cache: Path) -> int:
    """Begin a process that gives the command; it notes the digest of every checkpoint file that it publishes."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.environ["SOUL_CACHE"] = str(cache)
        out = os.open(notes.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from soul import checkpoints
        from soul.cli import main

        publish = checkpoints.publish

        def noted(part: Path, place: Path) -> None:
            publish(part, place)
            with notes.open("ab") as stream:
                for file in sorted(place.iterdir()):
                    if file.name not in ("training_args.bin", checkpoints.MANIFEST):
                        digest = hashlib.sha256(file.read_bytes()).hexdigest()
                        stream.write(json.dumps([f"{place.name}/{file.name}", digest]).encode() + b"\n")

        checkpoints.publish = noted
        code = main(argv)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int, until: float, watched: Callable[[], bool] | None = None) -> int | None:
    """Wait for a process's end and return its code; None where time is up, or what is watched for comes, before."""
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until or (watched is not None and watched()):
            return None
        time.sleep(0.0005)


def parts(out: Path) -> list[str]:
    """Return what is being written in the folder, or beside it."""
    folders = [out, out / "checkpoints", out / "rows/before", out / "rows/after"]
    found: list[str] = []
    for folder in folders:
        try:
            found += [name for name in os.listdir(folder) if name.endswith(".part")]  # noqa: PTH208 - the fastest way
        except OSError:
            continue
    beside = out.with_name(f"{out.name}.part")
    return found + ([beside.name] if beside.exists() else [])


def at_work_on(out: Path, before: Collection[str]) -> str:
    """Say what a killed sitting was at, from what it left; ``before`` is what was half-written when it began."""
    writing = [name for name in parts(out) if name not in before]
    if writing:
        what = "a checkpoint" if any(name.startswith("saving-") for name in writing) else "something else"
        return f"writing {'a model' if any(n.startswith(('model.part', out.name)) for n in writing) else what}"
    stages = {"model": "after training", "log.jsonl": "training", "rows": "measuring", "trials.jsonl": "trials"}
    return next((said for name, said in stages.items() if (out / name).exists()), "loading")


def digests(notes: Path) -> Iterable[tuple[str, str]]:
    """Yield what was noted of checkpoints; a kill may have cut the last line of a sitting short."""
    for line in notes.read_bytes().split(b"\n") if notes.is_file() else ():
        if line.startswith(b"[") and line.endswith(b"]"):
            name, digest = json.loads(line)
            yield name, digest


def soak(scenario: Scenario, place: Path, kills: int, draw: random.Random, tell: Callable[[str], None]) -> Found:
    """Kill a scenario's command this many times, over as many commands as that takes, and compare each."""
    whole, notes = place / f"{scenario.name}-whole", place / f"{scenario.name}-whole.notes"
    started = time.monotonic()
    code = wait(sit(scenario.command(whole), notes, place / f"{scenario.name}-whole.cache"), started + 600)
    took = time.monotonic() - started
    if code != 0:
        raise SystemExit(f"{scenario.name} fails by itself: {notes.with_suffix('.out').read_text(encoding='utf-8')}")
    expected, known = scenario.matters(whole), dict(digests(notes))
    found = Found()
    tell(f"{scenario.name}: uninterrupted in {took:.1f} s, {len(expected)} parts, {len(known)} files of checkpoints")
    while sum(found.kills.values()) < kills and not found.lost:
        found.commands += 1
        out = place / f"{scenario.name}-{found.commands:05d}"
        notes = out.with_suffix(".notes")
        mine = 0
        while True:
            before = parts(out)
            process = sit(scenario.command(out), notes, place / f"{scenario.name}.cache")
            code = _one_sitting(process, out, took, draw, last=sum(found.kills.values()) >= kills)
            if code is not None:
                break
            mine += 1
            found.kills[at_work_on(out, before)] += 1
        found.longest = max(found.longest, mine)
        if code != 0:
            said = notes.with_suffix(".out").read_text(encoding="utf-8")[-2000:]
            found.lost.append(f"{out.name} ended with {code} after {mine} kills: {said}")
            continue
        _compare(found, out.name, expected, scenario.matters(out))
        for name, digest in digests(notes):
            found.compared += 1
            if known.get(name) != digest:
                found.different.append(f"{out.name}: {name}")
        if not scenario.shared:
            found.different += [f"{out.name}: {name} was left behind" for name in parts(out)]
        tell(f"{scenario.name}: {out.name} ended after {mine} kills, {sum(found.kills.values())} of {kills} in all")
    return found


def _one_sitting(process: int, out: Path, took: float, draw: random.Random, *, last: bool) -> int | None:
    """Let a sitting go on for a while, and kill it; return its code where it came to its end before."""
    now = time.monotonic()
    if last:
        return wait(process, now + 600)
    inside, skip = draw.random() < 0.4, draw.randrange(12)
    seen: set[str] = set()

    def watched() -> bool:  # one of the next names to come is that of a save to be killed inside of
        seen.update(parts(out))
        return len(seen) > skip

    code = wait(process, now + took * 2, watched) if inside else wait(process, now + draw.uniform(0, took))
    if code is None:
        time.sleep(draw.uniform(0, 0.004) if inside else 0)
        os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return None if status == -signal.SIGKILL else status
    return code


def _compare(found: Found, name: str, expected: Mapping[str, bytes], got: Mapping[str, bytes]) -> None:
    found.compared += len(expected)
    found.different += [f"{name}: {part}" for part in {**expected, **got} if expected.get(part) != got.get(part)]


def table(found: Mapping[str, Found]) -> str:
    """Return a Markdown table of what was found."""
    lines = [
        "| | commands | kills | most in one | while writing | lost | compared | different |",
        "|---|" + "---:|" * 7,
    ]
    for name, f in found.items():
        writing = sum(count for what, count in f.kills.items() if what.startswith("writing"))
        cells = (f.commands, sum(f.kills.values()), f.longest, writing, len(f.lost), f.compared, len(f.different))
        lines.append(f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Soak, print the table, and return 1 where anything was lost or differed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=100, help="kills in all")
    parser.add_argument("--only", nargs="*", default=["run", "evaluation", "export", "contest"], help="scenarios")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    import soul.assess
    import soul.cli
    import soul.contest.jobs
    import soul.export  # noqa: F401 - whatever a sitting would import

    draw, found, started = random.Random(args.seed), {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        place = Path(name)
        make_place(place)
        known = scenarios(place)
        shares = {"run": 0.6, "evaluation": 0.15, "export": 0.1, "contest": 0.15}
        total = sum(shares[name] for name in args.only)
        tell = functools.partial(print, file=sys.stderr, flush=True)
        if "export" in args.only and "run" not in args.only:
            soak(known["run"], place, 0, draw, tell)  # what is exported
        for name in args.only:
            kills = max(1, round(args.kills * shares[name] / total))
            found[name] = soak(known[name], place, kills, draw, tell)
    print(table(found))
    kinds = sum((f.kills for f in found.values()), collections.Counter[str]())
    print(f"\nKilled while: {', '.join(f'{what} {count}' for what, count in kinds.most_common())}.")
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}.")
    for trouble in (line for f in found.values() for line in (*f.lost, *f.different)):
        print(f"WRONG: {trouble}")
    return int(any(f.lost or f.different for f in found.values()))


if __name__ == "__main__":
    sys.exit(main())
