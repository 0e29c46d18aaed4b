"""What the C library's allocator costs a run on CPUs: seconds of early and late steps, and peak memory, by allocator.

    python benchmarks/allocator.py --steps 120 --json docs/results/allocator.json

Each allocator is a fresh process that teaches SmolLM2-135M the same 400 answers about invented people, with AdamW,
batches of eight, one thread. What is compared is how long a step takes among the first and among the last of a run:
glibc's heap is cut into ever more pieces by tensors of ever other lengths. Allocators that are not installed are left
out (Debian: ``libtcmalloc-minimal4``, ``libjemalloc2``). They run one after the other, so mind what else the machine
does; ``--rounds`` repeats all.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _machine import cpu_name, table
from soul.stored import write_json

WINDOW = 20  # steps at either end
PRELOADED = {"tcmalloc": "tcmalloc_minimal", "jemalloc": "jemalloc"}
TUNED = {
    "glibc": {},
    "glibc, mmap from 64 KB": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "glibc, mmap from 64 MB": {"MALLOC_MMAP_THRESHOLD_": "67108864", "MALLOC_TRIM_THRESHOLD_": "1000000000"},
}


def allocators() -> dict[str, dict[str, str]]:
    """Return the environment of each allocator that is here."""
    found = dict(TUNED)
    for name, library in PRELOADED.items():
        file = ctypes.util.find_library(library)
        if file:
            found[name] = {"LD_PRELOAD": file}
    return found


def teach(name: str, environment: dict[str, str], steps: int, folder: Path) -> dict[str, float | str]:
    """Run one process and return what its steps took."""
    out = folder / "run"
    words = [sys.executable, "-m", "soul", "finetune", "--model", "smollm2-135m", "--retain", "people:n=50,facts=8"]
    words += ["--no-evaluate", "--out", str(out), "training.batch_size=8", f"training.max_steps={steps}"]
    words += ["training.epochs=50", "training.save_steps=0", "optimizer.lr=2e-4"]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)  # noqa: S603 - this interpreter
    if done.returncode:
        raise ValueError(f"{name}: soul finetune ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    took = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    early, late = statistics.median(took[2 : 2 + WINDOW]), statistics.median(took[-WINDOW:])
    return {"allocator": name, "early_s": early, "late_s": late, "peak_gb": record["peak_memory_bytes"] / 1e9}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these allocators only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known = allocators()
    names = args.only or list(known)
    if args.steps < 2 * WINDOW + 2 or not set(names) <= set(known):
        parser.error(f"--steps must be {2 * WINDOW + 2} or more, and --only of: {', '.join(known)}")
    found = []
    for _ in range(args.rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                found.append(teach(name, known[name], args.steps, Path(folder)))
                print(found[-1], flush=True)
    rows = []
    for name in names:
        mine = [x for x in found if x["allocator"] == name]
        cells = (statistics.median(float(x[key]) for x in mine) for key in ("early_s", "late_s", "peak_gb"))
        rows.append([name, *(f"{value:.2f}" for value in cells)])
    print(table([f"{args.steps} steps", "s a step, early", "s a step, late", "peak GB"], rows))
    if args.json:
        write_json(args.json, {"cpu": cpu_name(), "steps": args.steps, "rounds": args.rounds, "runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
