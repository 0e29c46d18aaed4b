"""What each update rule says of itself: hyper-parameters, warnings, win rate, large tensors."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

from soul.optim import AdamW, Lion, Signum, Sophia, SoulRelease, _elementwise
from soul.optim.adamw import AdamWSpec
from soul.optim.lion import LionSpec
from soul.optim.signum import SignumSpec
from soul.optim.sophia import SophiaSpec
from soul.optim.soul_release import SoulReleaseSpec

BAD = [
    (SophiaSpec, {"rho": 0.0}, "rho must be above"),
    (SophiaSpec, {"damping": 0.0}, "damping must be above"),
    (SophiaSpec, {"relative_damping": -1.0}, "relative_damping must be at least"),
    (SophiaSpec, {"interval": 0}, "interval must be 1"),
    (SophiaSpec, {"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0.0 and below 1.0, not 1.0"),
    (SophiaSpec, {"betas": (0.9, -0.1)}, r"betas\[1\]"),
    (SoulReleaseSpec, {"rho": -1.0}, "rho must be above"),
    (SoulReleaseSpec, {"curvature_batch": 0}, "curvature_batch must be above"),
    (SoulReleaseSpec, {"betas": (0.9, 1.5)}, r"betas\[1\]"),
    (SignumSpec, {"momentum": 1.0}, "momentum must be"),
    (LionSpec, {"betas": (2.0, 0.9)}, r"betas\[0\]"),
    (AdamWSpec, {"betas": (0.9, 1.0)}, r"betas\[1\]"),
    (AdamWSpec, {"eps": 0.0}, "eps must be above"),
]


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize(("spec", "settings", "message"), BAD)
def test_bad_settings_are_refused(spec: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**settings)
    with pytest.raises(ValueError, match=message):
        type(spec().build([parameter(1.0)]))([parameter(1.0)], **settings)


def test_signum_and_lion_follow_their_formulas() -> None:
    for rule in ("signum", "lion"):
        p, m = 1.0, 0.0
        tensor = parameter(p, dtype=torch.float64)
        settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2}
        optimizer = Signum([tensor], **settings) if rule == "signum" else Lion([tensor], **settings)
        for g in (1.0, -0.2, -3.0, 0.5, 0.1):
            direction = 0.9 * m + 0.1 * g
            p = p * (1 - 0.1 * 0.2) - 0.1 * (1 if direction > 0 else -1)
            m = direction if rule == "signum" else 0.99 * m + 0.01 * g
            tensor.grad = torch.tensor([g], dtype=torch.float64)
            optimizer.step()
            assert tensor.item() == pytest.approx(p, abs=1e-14)


def test_adamw_is_torchs_and_fused() -> None:
    mine, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    ours = AdamW([mine], lr=0.1, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, fused=False)
    assert ours.param_groups[0]["fused"] is True
    for step in range(5):
        for p, optimizer in ((mine, ours), (theirs, reference)):
            p.grad = torch.tensor([0.3 * step, 1.0 - step])
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


def test_sophia_without_curvature_warns_once_and_steps_by_sign() -> None:
    p = parameter(0.0, 0.0, 0.0)
    optimizer = Sophia([p], lr=0.5)
    p.grad = torch.tensor([3.0, -1e-6, 0.0])
    with pytest.warns(UserWarning, match="no curvature estimate"):
        optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_sophia_damping_is_a_floor_in_units_of_the_gradient() -> None:
    p = parameter(0.0, 0.0, 0.0)
    optimizer = Sophia([p], lr=1.0, damping=0.1)
    p.grad = torch.zeros(3)
    optimizer.update_curvature()  # no curvature anywhere
    p.grad = torch.tensor([0.01, 0.05, 7.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, -0.5, -1.0]))


def test_sophia_relative_damping_knows_the_scale() -> None:
    steps = []
    for scale in (1.0, 1e-4):  # loss and so gradient and curvature scaled alike
        p = parameter(0.0, 0.0)
        optimizer = Sophia([p], lr=1.0, rho=1.0, damping=1e-30, relative_damping=0.5)
        p.grad = torch.tensor([0.0, 2.0]) * scale**0.5
        optimizer.update_curvature()  # h is [0, 4], its mean 2, so the floor 1
        p.grad = torch.tensor([0.25, 2.5]) * scale
        optimizer.step()
        steps.append(p.detach().clone())
    torch.testing.assert_close(steps[0], torch.tensor([-0.25, -0.5]))
    torch.testing.assert_close(steps[1], steps[0])


def test_win_rate_counts_moving_coordinates_that_are_not_clipped() -> None:
    p = parameter(*[0.0] * 5)
    optimizer = Sophia([p], lr=1.0, rho=1.0)
    assert optimizer.metrics() == {}
    p.grad = torch.ones(5)
    optimizer.update_curvature()
    p.grad = torch.tensor([0.5, -0.5, 0.0, 2.0, -1.0])
    optimizer.step()
    assert optimizer.metrics() == {"win_rate": 0.5}  # a ratio of exactly 1 is at the bound
    p.grad = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
    optimizer.state.clear()
    with pytest.warns(UserWarning, match="no curvature"):
        optimizer.step()
    assert optimizer.metrics() == {"win_rate": 0.0}
    p.grad = None
    optimizer.step()
    assert optimizer.metrics() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [Sophia, SoulRelease, Signum, Lion])
def test_pieces_do_not_show(rule: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (7, 1 << 20):
        monkeypatch.setattr(_elementwise, "CPU_CHUNK_PER_THREAD", chunk)
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(31, 13, generator=generator).to(dtype))
        optimizer = rule([p], lr=0.01, weight_decay=0.1)
        for _ in range(4):
            p.grad = torch.randn(31, 13, generator=generator).to(dtype)
            optimizer.update_curvature()
            optimizer.step()
        results.append((p.detach().clone(), optimizer.metrics()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("rule", [Sophia, SoulRelease, Signum, Lion])
def test_state_is_fp32_for_bf16_parameters_and_stays_so(rule: Any) -> None:
    p = parameter(1.0, 2.0, dtype=torch.bfloat16)
    optimizer = rule([p])
    p.grad = torch.tensor([0.1, 1.0], dtype=torch.bfloat16)
    optimizer.update_curvature()
    for _ in range(3):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = rule([parameter(1.0, 2.0, dtype=torch.bfloat16)])
    other.load_state_dict(saved)
    for name in rule.slots:
        value = other.state_dict()["state"][0][name]
        assert value.dtype == torch.float32
        assert torch.equal(value, saved["state"][0][name])
        assert not torch.equal(value, value.bfloat16().float())
        assert value.data_ptr() != saved["state"][0][name].data_ptr()


def test_rules_can_be_copied_and_pickled() -> None:
    p = parameter(1.0, 2.0)
    optimizer = Sophia([p], lr=0.1)
    p.grad = torch.tensor([1.0, 1.0])
    optimizer.update_curvature()
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.curvature_due(10)
        assert not twin.curvature_due(11)
        (tensor,) = twin.param_groups[0]["params"]
        tensor.grad = torch.tensor([1.0, 1.0])
        before = tensor.detach().clone()
        twin.step()
        assert bool((tensor < before).all())
        assert twin.metrics() == {"win_rate": 0.0}


def test_complex_parameters_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="real floating-point"):
        Signum([p]).step()
