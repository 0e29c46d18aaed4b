"""Seconds of one step of each elementwise rule, beside torch's fused AdamW, on tensors shaped like a 135M model's.

    python benchmarks/optimizer_step.py --threads 2

Steps are interleaved, round by round, so that a change of the machine's load meets all rules; medians and minima over
the rounds. ``metrics``, ``refresh`` (``update_curvature``) and ``kl`` (``predicted_kl``) are no part of a step and are
timed apart. The shapes are those of SmolLM2-135M: an embedding of 49,152 x 576 and thirty layers.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from soul.optim import SGD, AdamWRetain, Lion, Signum, Sophia, SoulRelease

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
RULES: dict[str, Callable[..., Any]] = {
    "torch AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "sophia": Sophia,
    "sophia, weight decay": functools.partial(Sophia, weight_decay=0.1),
    "sophia, block_rms": functools.partial(Sophia, clip="block_rms", rho=1.0),
    "sophia, kl": functools.partial(Sophia, clip="kl", rho=1.0),
    "adamw_retain": AdamWRetain,
    "soul_release": functools.partial(SoulRelease, weight_decay=0.0),
    "lion": Lion,
    "signum": Signum,
    "sgd": SGD,
}


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds of ``action``."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in [(49152, 576), *LAYER * 30, (576,)]]
    for p in params:
        p.grad = torch.randn(p.shape) * 1e-4
    print(
        f"{sum(p.numel() for p in params) / 1e6:.1f}M parameters, {args.threads} threads, milliseconds: median (least)"
    )
    rules = {name: RULES[name](params, lr=1e-6) for name in args.rules}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in rules}
    for i in range(args.rounds + 1):
        for name, rule in rules.items():
            actions = {"refresh": "update_curvature", "step": "step", "metrics": "metrics", "kl": "predicted_kl"}
            for label, verb in actions.items():
                if hasattr(rule, verb) and (label == "step" or i % 3 == 0):
                    seconds = timed(getattr(rule, verb))
                    if i:  # the first round makes the state
                        times[name].setdefault(label, []).append(seconds)
    base = times[args.rules[0]]["step"]
    for name, found in times.items():
        shown = [f"{label} {statistics.median(t) * 1e3:.0f} ({min(t) * 1e3:.0f})" for label, t in found.items()]
        ratio = statistics.median(found["step"]) / statistics.median(base)
        print(
            f"{name:22} {ratio:.2f} ({min(found['step']) / min(base):.2f}) of the first; {', '.join(shown)}", flush=True
        )


if __name__ == "__main__":
    main()
