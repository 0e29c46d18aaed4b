"""What a step of each elementwise rule takes, beside torch's AdamW, the released code and the least there can be.

    python benchmarks/optimizer_step.py --tofu ../shared/data/tofu --json docs/results/optimizer-step.json

On tensors shaped like SmolLM2-135M's (an embedding of 49,152 x 576 and thirty layers), or fewer of its layers
(``--parameters``). All take turns, round by round, so that a change of the machine's load meets all of them; a ratio is
the median over rounds of one time over another of the same round. Everyone works on the same weights, gradients and
states, which keeps 135M parameters within 3 GB; ``--rules`` picks fewer. ``--tofu`` measures before that what curvature
takes of a training step.

The floor of a rule is the same reads and writes in place with next to no arithmetic, by a kernel compiled like the
rule's. The bandwidth of a copy says less, since a copy writes to memory that it has not read. ``refresh``
(``update_curvature`` of squared gradients) comes every k-th step and is apart.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _machine import Now, autocast, cpu_name, table
from _paths import ReleasedSophiaG
from rule_cost import setting
from soul.curvature.passes import CurvaturePasses
from soul.data.batches import collate_rows
from soul.forward import forward_answers
from soul.optim import AdamWRetain, Lion, Signum, Sophia, SoulRelease, _fused
from soul.optim.sophia import SophiaSpec
from soul.stored import write_json

FLOORS = {"one": "floor: p g m h read, p m written", "two": "floor: p g m h read, p m h written"}
NAMES = ("refresh", "gradient", "step")
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
FULL, BASE = 134.5, "torch AdamW, fused"
Timed = dict[str, Callable[[], Any]]


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Return the shapes of at least so many parameters: the embedding (a share of its rows) and whole layers."""
    share = min(1.0, millions / FULL)
    return [(round(49152 * share), 576), *LAYER * max(1, round(30 * share)), (576,)]


def floors() -> dict[str, Callable[..., float]]:
    """Return kernels with the reads and writes of a rule: ``(p, g, m, h, scalar)``."""
    from numba import njit

    @njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    def one_written(p: Any, g: Any, m: Any, h: Any, w: Any) -> float:
        for i in range(p.size):
            m[i] += w * (g[i] - m[i])
            p[i] -= w * (m[i] + h[i])
        return 0.0

    @njit(nogil=True, fastmath={"contract"}, error_model="numpy")
    def two_written(p: Any, g: Any, m: Any, h: Any, w: Any) -> float:
        for i in range(p.size):
            m[i] += w * (g[i] - m[i])
            h[i] += w * (g[i] - h[i])
            p[i] -= w * (m[i] + h[i])
        return 0.0

    return {FLOORS["one"]: one_written, FLOORS["two"]: two_written}


def prepared(rule: Any, states: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return a rule that works on the tensors that all work on, as after a step and a refresh."""
    names = getattr(rule, "slots", None) or ("exp_avg", "hessian" if "bs" in rule.defaults else "exp_avg_sq")
    for p, pair in zip(rule.param_groups[0]["params"], states, strict=True):
        state = rule.state[p]
        state.update(zip(names, pair, strict=False))
        if "exp_avg_sq" in names:
            state["step"] = torch.tensor(1.0)
        elif "curvature" in names:
            state |= {"step": 1, "refreshes": 1, "signed": False, "curvature_sum": pair[1].float().sum()}
        else:
            state["step"] = 1
    return rule


def tiles_of(kernel: Callable[..., float], tensors: list[tuple[torch.Tensor, ...]]) -> list[_fused.Tile]:
    """Return a kernel on pieces of the size that rules work on."""
    found: list[_fused.Tile] = []
    for members in tensors:
        arrays = [_fused.array(t) for t in members]
        for start in range(0, arrays[0].size, _fused.TILE):
            found.append((kernel, (*(a[start : start + _fused.TILE] for a in arrays), np.float32(1e-6))))
    return found


def by_path(rule: Any, path: str, verb: str) -> None:
    """Make a step, or take in curvature, in one of the ways there are."""
    rule.path = path
    getattr(rule, verb)()


def contenders(params: list[torch.nn.Parameter], wanted: list[str]) -> Timed:
    """Return what is timed, by name."""
    states = [(torch.zeros_like(p).detach(), torch.full_like(p, 1e-8).detach()) for p in params]
    out: Timed = {}

    def add(name: str, make: Callable[[], Any], *paths: str, narrow: bool = False) -> None:
        if wanted and name != BASE and not any(name.startswith(start) for start in wanted):
            return
        rule = prepared(make(), [(m.bfloat16(), h.bfloat16()) for m, h in states] if narrow else states)
        if not paths:
            out[name] = rule.step
        for path in paths:
            if path != "fused" or _fused.available():
                out[f"{name}, {path}"] = functools.partial(by_path, rule, path, "step")
                if name == "sophia" and path != "foreach":
                    out[f"{name}, {path}, refresh"] = functools.partial(by_path, rule, path, "update_curvature")

    def build(cls: Any, **settings: Any) -> Callable[[], Any]:
        return functools.partial(cls, params, lr=1e-6, **settings)

    add(BASE, build(torch.optim.AdamW, fused=True))
    add("torch AdamW, foreach", build(torch.optim.AdamW, foreach=True))
    add("released SophiaG", functools.partial(ReleasedSophiaG, params))
    add("sophia", build(Sophia), "fused", "foreach", "reference")
    add("sophia weight decay", build(Sophia, weight_decay=0.1), "fused")
    add("sophia bf16 states", build(Sophia, state_dtype="bfloat16"), "fused", "reference", narrow=True)
    add("sophia block_rms", build(Sophia, clip="block_rms", rho=1.0), "fused", "reference")
    add("sophia kl", build(Sophia, clip="kl", rho=1.0), "fused", "reference")
    for name, cls in {"adamw_retain": AdamWRetain, "soul_release": SoulRelease, "lion": Lion, "signum": Signum}.items():
        add(name, build(cls), "fused", "reference")
    if _fused.available():
        tensors = [(p.detach(), p.grad, *pair) for p, pair in zip(params, states, strict=True) if p.grad is not None]
        for name, kernel in floors().items():
            out[name] = functools.partial(_fused.run_tiles, tiles_of(kernel, tensors))
    return out


def measured(actions: Timed, rounds: int, now: Now) -> dict[str, list[float]]:
    """Return the seconds of each action in each round; one round more makes everything ready.

    The order changes from round to round, so that nobody always finds in the cache what the same other one left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order, names = random.Random(0), list(actions)
    for i in range(rounds + 1):
        for name in names:
            started = now()
            actions[name]()
            if i:
                seconds[name].append(now() - started)
        order.shuffle(names)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """Return the quartiles over rounds of how many times as long ``name`` takes."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[name], seconds[other], strict=True)], n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def lines_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a line for each action."""
    lines: list[dict[str, Any]] = []
    for name, found in seconds.items():
        line: dict[str, Any] = {"name": name, "milliseconds": round(statistics.median(found) * 1e3, 1)}
        line["to_adamw_fused"] = ratio(seconds, name, BASE)
        floor = FLOORS["two" if name.startswith(("torch", "released", "soul_release")) else "one"]
        other_traffic = name.startswith(("lion", "signum", "sophia bf16")) or name.endswith("refresh")
        if floor in seconds and not other_traffic:
            line["to_floor"] = ratio(seconds, name, floor)
        lines.append(line)
    return lines


def of_training(tofu: Path, rounds: int, now: Now) -> dict[str, Any]:
    """Return what curvature at every tenth step takes of a training step on as many rows, on the real model.

    A training step is a forward and backward pass of ``rule_cost``'s eight rows, and ``sophia``'s step; a refresh is a
    ``ggn`` pass of one micro-batch of eight and what the rule makes of it.
    """
    model, rows = setting(tofu, "smollm2-135m")
    batch, spec = collate_rows(rows), SophiaSpec()
    rule = spec.build(model.parameters())
    passes = CurvaturePasses(spec.curvature, rows, autocast=autocast)
    found: list[tuple[float, float, float]] = []
    for i in range(rounds + 1):
        begun = now()
        model.zero_grad()
        rule.update_curvature(passes.estimate(model, rule, passes.plan(i)[:1], explicit=False))
        model.zero_grad()
        refreshed = now()
        with autocast():
            loss = -forward_answers(model, batch).token_logps().mean()
        loss.backward()
        ready = now()
        rule.step()
        if i:
            found.append((refreshed - begun, ready - refreshed, now() - ready))
    low, middle, high = statistics.quantiles([r / 10 / (g + s) for r, g, s in found], n=4)
    seconds = {name: round(statistics.median(x), 3) for name, x in zip(NAMES, zip(*found, strict=True), strict=True)}
    share = {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
    return {"interval": 10, "rows": len(rows), "seconds": seconds, "share_of_a_step": share}


def shown(value: dict[str, float] | None) -> str:
    """Return a ratio and its quartiles."""
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})" if value else ""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parameters", type=float, default=FULL, metavar="MILLIONS")
    parser.add_argument("--rules", nargs="*", default=[], help="beginnings of names; all by default")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and its processor seconds in place of the clock's: for machines that others keep busy",
    )
    parser.add_argument("--tofu", type=Path, help="TOFU's files: measure curvature in training, on the real model")
    parser.add_argument("--json", type=Path, help="where to record what was found")
    args = parser.parse_args()
    threads = 1 if args.processor_time else args.threads
    torch.set_num_threads(threads)
    now = time.process_time if args.processor_time else time.perf_counter
    share: dict[str, Any] = {}
    if args.tofu:
        share = of_training(args.tofu, args.rounds, now)
        print(f"curvature at every tenth step, of a training step: {share}")
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes(args.parameters)]
    for p in params:
        p.grad = torch.randn(p.shape) * 1e-4
    seconds = measured(contenders(params, args.rules), args.rounds, now)
    record = {
        "parameters": sum(p.numel() for p in params),
        "threads": threads,
        "clock": "processor time" if args.processor_time else "wall clock",
        "rounds": args.rounds,
        "processor": cpu_name(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "lines": lines_of(seconds),
        **({"curvature": share} if share else {}),
    }
    head = ["", "ms", "of torch's fused AdamW", "of the floor"]
    rows = [
        [line["name"], f"{line['milliseconds']:.0f}", shown(line["to_adamw_fused"]), shown(line.get("to_floor"))]
        for line in record["lines"]
    ]
    about = f"{record['parameters'] / 1e6:.1f}M parameters, {threads} threads, {record['clock']}, {record['processor']}"
    print(f"{about}, torch {torch.__version__}, load at the end {record['load']}.\n\n{table(head, rows)}")
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
