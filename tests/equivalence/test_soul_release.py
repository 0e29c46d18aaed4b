"""SoulRelease against golden numbers made by numpy alone (tests/golden/make_soul_release.py)."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soul.optim import SoulRelease

GOLDEN = Path(__file__).parent.parent / "golden" / "soul_release.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def replay(golden: dict[str, Any], steps: int | None = None) -> list[tuple[torch.Tensor, float]]:
    settings = golden["settings"]
    p = torch.nn.Parameter(torch.tensor(golden["start"], dtype=torch.float64))
    optimizer = SoulRelease(
        [p],
        lr=settings["lr"],
        betas=(settings["beta1"], settings["beta2"]),
        rho=settings["rho"],
        curvature_batch=settings["bs"],
        weight_decay=settings["weight_decay"],
    )
    out = []
    for gradient in golden["gradients"][:steps]:
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        out.append((p.detach().clone(), optimizer.metrics()["win_rate"]))
    return out


def test_fifty_steps_match_the_golden_numbers(golden: dict[str, Any]) -> None:
    got = replay(golden)
    assert len(got) == 50
    for (p, win_rate), expected, expected_win_rate in zip(got, golden["parameters"], golden["win_rates"], strict=True):
        torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
        assert win_rate == pytest.approx(expected_win_rate, abs=1e-12)
    # far tighter than the bound asks, and it must be: one whole step is only 5e-6
    last = torch.tensor(golden["parameters"][-1], dtype=torch.float64)
    torch.testing.assert_close(got[-1][0], last, rtol=1e-14, atol=1e-16)


def test_the_golden_numbers_come_from_elsewhere(golden: dict[str, Any]) -> None:
    """The file that made them makes them again, and knows nothing of the library."""
    maker = GOLDEN.with_name("make_soul_release.py")
    text = maker.read_text()
    assert not [line for line in text.splitlines() if "import" in line and ("soul" in line or "torch" in line)]
    again = runpy.run_path(str(maker))["golden"]()
    assert again["settings"] == golden["settings"]
    np.testing.assert_allclose(again["parameters"], golden["parameters"], rtol=1e-13)
    np.testing.assert_allclose(again["gradients"], golden["gradients"], rtol=1e-13)


def test_the_golden_run_visits_both_sides_of_the_clip(golden: dict[str, Any]) -> None:
    assert min(golden["win_rates"]) > 0.1
    assert max(golden["win_rates"]) < 0.9


def test_defaults_are_those_of_the_release(golden: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.tensor(golden["start"], dtype=torch.float64))
    optimizer = SoulRelease([p])
    p.grad = torch.tensor(golden["gradients"][0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(
        p.detach(), torch.tensor(golden["parameters"][0], dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_momentum_is_updated_twice(golden: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SoulRelease([p], betas=(0.9, 0.95))
    for _ in range(3):
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(1 - 0.81**3, abs=1e-14)
