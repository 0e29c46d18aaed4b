"""What each update rule says of itself: hyper-parameters, warnings, numbers about a step, large tensors, devices."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from soul.optim import AdamWRetain, Lion, Signum, Sophia, SoulRelease, _elementwise
from soul.optim._metrics import systematic_views
from soul.optim.adamw import AdamWSpec
from soul.optim.adamw_retain import AdamWRetainSpec
from soul.optim.lion import LionSpec
from soul.optim.muon import MuonSpec
from soul.optim.sgd import SGDSpec
from soul.optim.signum import SignumSpec
from soul.optim.sophia import SophiaSpec
from soul.optim.soul_release import SoulReleaseSpec

BAD = [
    (SophiaSpec, {"rho": 0.0}, "rho must be above"),
    (SophiaSpec, {"damping": 0.0}, "damping must be above"),
    (SophiaSpec, {"relative_damping": -1.0}, "relative_damping must be at least"),
    (SophiaSpec, {"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0.0 and below 1.0, not 1.0"),
    (SophiaSpec, {"betas": (0.9, -0.1)}, r"betas\[1\]"),
    (SophiaSpec, {"clip": "norm"}, "clip must be one of element, block_rms, kl, not 'norm'"),
    (SophiaSpec, {"win_rate": 1.0}, "win_rate is a share"),
    (SophiaSpec, {"win_rate": 0.0}, "win_rate is a share"),
    (SophiaSpec, {"win_rate": 0.3, "clip": "kl"}, "win_rate sets rho where coordinates are clipped"),
    (SophiaSpec, {"kl_bound": 0.0}, "kl_bound must be above"),
    (AdamWRetainSpec, {"eps": 0.0}, "eps must be above"),
    (AdamWRetainSpec, {"relative_damping": -0.1}, "relative_damping must be at least"),
    (AdamWRetainSpec, {"betas": (0.9, 1.0)}, r"betas\[1\]"),
    (SGDSpec, {"momentum": 1.0}, "momentum must be"),
    (SGDSpec, {"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum"),
    (MuonSpec, {"ns_steps": 0}, "ns_steps must be"),
    (MuonSpec, {"momentum": -0.1}, "momentum must be"),
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
    optimizer = Sophia([p], lr=1.0, rho=1.0, relative_damping=0.0)
    assert optimizer.metrics() == {}
    p.grad = torch.ones(5)
    optimizer.update_curvature()
    p.grad = torch.tensor([0.5, -0.5, 0.0, 2.0, -1.0])
    optimizer.step()
    assert optimizer.metrics()["win_rate"] == 0.5  # a ratio of exactly 1 is at the bound
    p.grad = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
    optimizer.state.clear()
    with pytest.warns(UserWarning, match="no curvature"):
        optimizer.step()
    assert optimizer.metrics()["win_rate"] == 0.0
    p.grad = None
    optimizer.step()
    assert optimizer.metrics() == {}


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "signum": Signum,
    "lion": Lion,
    "soul_release": SoulRelease,
    "adamw_retain": AdamWRetain,
    "sophia": Sophia,
    "sophia, block_rms": functools.partial(Sophia, clip="block_rms", rho=1.0),
    "sophia, kl": functools.partial(Sophia, clip="kl", rho=1.0),
    "sophia, win_rate": functools.partial(Sophia, win_rate=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
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
    if hasattr(optimizer, "_pool"):  # the sum for the mean curvature is taken in another order
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    else:
        assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
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
    for name, value in other.state_dict()["state"][0].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.float32
            assert torch.equal(value, saved["state"][0][name])
            assert value.data_ptr() != saved["state"][0][name].data_ptr()
    for name in type(optimizer).slots:
        value = other.state_dict()["state"][0][name]
        assert not torch.equal(value, value.bfloat16().float())


def test_hooks_around_loading_have_the_last_word() -> None:
    """A hook may hand over another state dict, and one that follows may change what was loaded."""
    p = parameter(1.0, 2.0, dtype=torch.bfloat16)
    optimizer = Signum([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    exact = torch.tensor([0.123456, 0.654321])

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {0: {"step": 4, "exp_avg": exact}}}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 4
    assert torch.equal(optimizer.state[p]["exp_avg"], exact)
    optimizer.register_load_state_dict_post_hook(lambda loaded: loaded.state[p]["exp_avg"].zero_())
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.zeros(2))


@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_a_step_never_waits_for_a_device(rule: Any) -> None:
    """Parameters without storage cannot be read at all, so that reading a number from them would raise."""
    lr = torch.tensor(0.1, device="meta")
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((300, 7), (5,))]
    optimizer = rule([{"params": params[:1], "lr": lr, "weight_decay": 0.1}, {"params": params[1:], "maximize": True}])
    for step in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        if step != 1:
            optimizer.update_curvature()
            optimizer.update_curvature({p: torch.empty_like(p) for p in params})
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(optimizer.state[params[0]]["exp_avg"].sum())  # such a read does raise


@pytest.mark.parametrize("setting", ["differentiable", "capturable"])
def test_what_no_rule_can_do_is_refused_in_later_groups_too(setting: str) -> None:
    optimizer = Sophia([parameter(1.0)])
    with pytest.raises(ValueError, match=f"Sophia does not support {setting}=True"):
        optimizer.add_param_group({"params": [parameter(2.0)], setting: True})
    with pytest.raises(ValueError, match="Sophia needs real floating-point parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


# Numbers about a step


def test_numbers_of_a_step_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    groups = [torch.nn.Parameter(torch.zeros(n)) for n in (40, 30)]
    optimizer = Sophia(
        [{"params": groups[:1]}, {"params": groups[1:], "lr": 0.02, "embedding": True}], lr=0.01, rho=0.5
    )
    for p in groups:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.update_curvature()
    for p in groups:
        p.grad = torch.randn(p.shape, generator=generator) * (torch.arange(len(p)) % 5 > 0)
    optimizer.step()
    got = optimizer.metrics()
    m = torch.cat([p.grad for p in groups if p.grad is not None]).double()
    delta = -torch.cat([p.detach() for p in groups]).double()
    full = torch.cat([torch.full((40,), 0.01), torch.full((30,), 0.02)]).double()
    inside, moving = (delta.abs() < 0.999 * full).double(), (m != 0).double()
    assert 0 < got["win_rate"] < 1
    assert got["win_rate"] == pytest.approx(float((inside * moving)[:40].sum() / moving[:40].sum()), abs=1e-6)
    assert got["win_rate_embedding"] == pytest.approx(float((inside * moving)[40:].sum() / moving[40:].sum()), abs=1e-6)
    assert list(optimizer.win_rates()) == groups
    assert list(optimizer.win_rates().values()) == pytest.approx([got["win_rate"], got["win_rate_embedding"]], abs=1e-6)
    assert Signum([parameter(1.0)]).win_rates() == {}  # no step yet
    whole = Sophia(groups, clip="block_rms")
    whole.update_curvature()
    whole.step()
    assert whole.win_rates() == {}  # coordinates are not bounded
    assert got["cos_sign"] == pytest.approx(float(delta @ m.sign() / delta.norm() / m.sign().norm()), rel=1e-5)
    assert got["cos_momentum"] == pytest.approx(float(delta @ m / delta.norm() / m.norm()), rel=1e-5)


def test_large_groups_are_judged_by_a_sample() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = [1_500_000, 400_000, 3]
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    optimizer = Sophia(params, rho=1.0, relative_damping=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.update_curvature()
    for p, scale in zip(params, (1.0, 3.0, 1.0), strict=True):
        p.grad = torch.randn(p.shape, generator=generator) * scale
    optimizer.step()
    grads = torch.cat([p.grad for p in params if p.grad is not None])
    got = optimizer.metrics()
    assert got["win_rate"] == pytest.approx(float((grads.abs() < 1).float().mean()), abs=0.006)
    u = grads.clamp(-1, 1)
    assert got["cos_momentum"] == pytest.approx(float(u @ grads / u.norm() / grads.norm()), abs=0.006)
    views = systematic_views(params)
    assert sum(v.numel() for v in views) == pytest.approx(1 << 17, rel=0.3)
    assert views[0].numel() / views[1].numel() == pytest.approx(sizes[0] / sizes[1], rel=1e-3)


def test_a_sample_meets_every_column_and_walks_on_from_tensor_to_tensor() -> None:
    whole = torch.arange(1000)
    parts = systematic_views([whole[:333], whole[333:335], whole[335:]], limit=100)
    assert torch.equal(torch.cat(parts), systematic_views([whole], limit=100)[0])
    assert len(systematic_views([torch.arange(64 * 6400) % 64], limit=6400)[0].unique()) == 64


def test_soul_release_says_the_same_of_itself() -> None:
    p = parameter(*[0.0] * 4)
    optimizer = SoulRelease([p], rho=1.0, curvature_batch=1.0)
    p.grad = torch.tensor([1.0, 1.0, 100.0, 0.0])
    optimizer.step()
    assert optimizer.metrics()["win_rate"] == pytest.approx(1 / 3)  # .19 / .05 is cut, 19 / 500 is not
    assert 0.5 < optimizer.metrics()["cos_sign"] < 1
