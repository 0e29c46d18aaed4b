"""Writes soul_release.json: fifty steps of the optimizer that SOUL released, in numpy float64.

Nothing here comes from the library under test. Run it from anywhere: ``python tests/golden/make_soul_release.py``.
The gradients are scaled so that some coordinates are clipped, some are not, and one gets no gradient at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: dict[str, float] = {
    "lr": 5e-6,
    "beta1": 0.9,
    "beta2": 0.95,
    "rho": 0.04,
    "bs": 5120,
    "weight_decay": 0.1,
}
STEPS = 50
SIZE = 12
SEED = 20240930


def gradients() -> np.ndarray:
    """Return ``[STEPS, SIZE]`` gradients with scales from 1e-4 to 1, clipped to norm 1 a step, the last column zero."""
    rng = np.random.default_rng(SEED)
    scales = np.logspace(-4, 0, SIZE)
    drift = rng.standard_normal(SIZE)
    grads = (rng.standard_normal((STEPS, SIZE)) + drift) * scales
    grads[:, -1] = 0.0
    norms = np.linalg.norm(grads, axis=1, keepdims=True)
    return grads / np.maximum(norms, 1.0)


def run(start: np.ndarray, grads: np.ndarray) -> tuple[list[list[float]], list[float]]:
    """Return the parameters after each step and the share of moving coordinates that were not clipped."""
    p, m, h = start.copy(), np.zeros(SIZE), np.zeros(SIZE)
    lr, b1, b2 = SETTINGS["lr"], SETTINGS["beta1"], SETTINGS["beta2"]
    trajectory, win_rates = [], []
    for g in grads:
        h = b2 * h + (1 - b2) * g * g  # update_hessian(), called from step()
        m = b1 * m + (1 - b1) * g  # update_exp_avg(), called from step()
        p = p * (1 - lr * SETTINGS["weight_decay"])
        m = b1 * m + (1 - b1) * g  # the second time, inside the update itself
        ratio = np.abs(m) / (SETTINGS["rho"] * SETTINGS["bs"] * h + 1e-15)
        p = p - lr * np.sign(m) * np.minimum(ratio, 1.0)
        trajectory.append(p.tolist())
        win_rates.append(float(np.mean(ratio[m != 0] < 1)))
    return trajectory, win_rates


def golden() -> dict[str, Any]:
    """Return everything a test needs to replay the run."""
    start = np.random.default_rng(SEED + 1).standard_normal(SIZE) * 0.02
    grads = gradients()
    trajectory, win_rates = run(start, grads)
    return {
        "seed": SEED,
        "settings": SETTINGS,
        "start": start.tolist(),
        "gradients": grads.tolist(),
        "parameters": trajectory,
        "win_rates": win_rates,
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("soul_release.json")
    target.write_text(json.dumps(golden(), indent=1) + "\n")
    print(f"{target}: {STEPS} steps of {SIZE} parameters")
