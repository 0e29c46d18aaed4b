"""What is kept in 16 bits: averages between steps, weights rounded by noise, and updates that rounding loses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soul.optim import AdamWRetain, Lion, Signum, Sophia, SoulRelease, _fused
from soul.optim._storage import noise_key, round_by_noise
from soul.optim.sophia import SophiaSpec

RULES = [Sophia, AdamWRetain, SoulRelease, Lion, Signum]


def rounded(values: torch.Tensor, key: int, start: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_by_noise(values, out, key, start)
    return out


def some(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(4).exp()


def test_noise_chooses_between_neighbours_and_is_right_on_average() -> None:
    values = some(500)
    towards_zero = (values.view(torch.int32) & -65536).view(torch.float32)
    beyond = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    draws = torch.stack([rounded(values, noise_key(step, 0)).float() for step in range(2000)])
    assert bool(((draws == towards_zero) | (draws == beyond)).all())
    share = (draws == beyond).float().mean(0)
    wanted = (values - towards_zero) / (beyond - towards_zero)
    error = (share - wanted) / (wanted * (1 - wanted) / 2000).sqrt().clamp(min=1e-9)
    assert float(error.square().mean().sqrt()) == pytest.approx(1.0, abs=0.15)  # no more than chance
    assert float(error.abs().max()) < 5


def test_noise_differs_between_steps_tensors_and_coordinates() -> None:
    middle = torch.full((20000,), 1 + 2**-8)  # half-way between two numbers
    draws = [rounded(middle, noise_key(step, index)) == 1 for step, index in ((1, 0), (2, 0), (1, 1))]
    draws.append(draws[0].roll(1))
    for i, one in enumerate(draws):
        assert float(one.float().mean()) == pytest.approx(0.5, abs=0.015)
        for other in draws[:i]:
            assert float((one == other).float().mean()) == pytest.approx(0.5, abs=0.015)


def test_noise_depends_on_the_place_alone_and_leaves_what_is_exact() -> None:
    values = some(300)
    whole = rounded(values, 7)
    pieces = [rounded(values[at : at + 70], 7, at) for at in range(0, 300, 70)]
    assert torch.equal(torch.cat(pieces), whole)
    exact = torch.cat([values.bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    assert torch.equal(rounded(exact, 7)[:-1], exact.bfloat16()[:-1])
    assert rounded(exact, 7)[-1].isnan()


@pytest.mark.parametrize("key", [0, 7, 0xFFFFFFFF])
def test_kernels_round_as_torch_does(key: int) -> None:
    """A step of nothing writes the weight as it is; with ``keep`` it has digits to lose."""
    p = torch.cat([some(4000), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 3.39e38])]).bfloat16()
    keep, zeros = 0.9 + 1e-3, torch.zeros(len(p))
    exact = p.float() * float(np.float32(keep))
    expected = rounded(exact, key) if key else exact.bfloat16()
    _fused.run([_fused.Call("signum", (p, zeros, zeros.clone()), (0.1, 1.0, keep, 0.0), key=key)])
    torch.testing.assert_close(p, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["reference", "foreach", "fused"])
def test_small_updates_add_up_where_they_are_rounded_by_noise(path: str) -> None:
    lr, steps, moves = 1e-6, 200, {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.full((5000,), 0.02, dtype=torch.bfloat16))
        start = p.detach().clone()
        optimizer = Signum([p], lr=lr, rounding=rounding)  # pyright: ignore[reportArgumentType]
        optimizer.path = path
        p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                optimizer.step()
        moves[rounding] = float((start.float() - p.detach().float()).mean())
    assert moves["nearest"] == 0
    assert moves["stochastic"] == pytest.approx(lr * steps, rel=0.1)


def test_other_narrow_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rounding=stochastic is for bf16 weights .* not for torch.float16"):
        Signum([nn.Parameter(torch.ones(2, dtype=torch.float16))], rounding="stochastic")


@pytest.mark.parametrize("rule", RULES)
def test_narrow_states_stay_near_and_survive_a_checkpoint(rule: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    pair = [nn.Parameter(torch.zeros(400)) for _ in range(2)]
    wide, narrow = rule([pair[0]], lr=1e-3), rule([pair[1]], lr=1e-3, state_dtype="bfloat16")
    for step in range(30):
        g = torch.randn(400, generator=generator)
        for p, optimizer in zip(pair, (wide, narrow), strict=True):
            p.grad = g.clone()
            if step % 5 == 0:
                optimizer.update_curvature()
            optimizer.step()
    for name in rule.slots:
        one, other = wide.state[pair[0]][name], narrow.state[pair[1]][name]
        assert other.dtype == torch.bfloat16
        assert float((one - other).norm() / one.norm()) < 0.01
    saved = copy.deepcopy(narrow.state_dict())
    again = rule([nn.Parameter(torch.zeros(400))], lr=1e-3, state_dtype="bfloat16")
    again.load_state_dict(saved)
    for name, value in saved["state"][0].items():
        if isinstance(value, torch.Tensor):
            loaded = again.state_dict()["state"][0][name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)


def test_states_of_before_there_was_a_choice_are_read() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Sophia([p])
    p.grad = torch.ones(3)
    optimizer.update_curvature()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("state_dtype", "rounding"):
        del saved["param_groups"][0][name]
    other = Sophia([p])
    other.load_state_dict(saved)
    other.step()
    assert other.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(("name", "value"), [("state_dtype", "float8"), ("rounding", "up")])
def test_what_does_not_exist_is_refused(name: str, value: str) -> None:
    makers: list[Any] = [SophiaSpec, lambda **settings: Sophia([nn.Parameter(torch.ones(1))], **settings)]
    for make in makers:
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not '{value}'"):
            make(**{name: value})


def steps_at(rates: list[float], lr: float, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Signum:
    """Make steps of weights as large as a language model's, with a scheduler's rates."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter((torch.randn(20000, generator=generator) * 0.02).to(dtype))
    optimizer = Signum([p], lr=lr, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    p.grad = torch.randn(20000, generator=generator).to(dtype)
    for _ in rates:
        optimizer.step()
        schedule.step()
    return optimizer


def test_lost_updates_are_measured_and_told_at_the_full_rate() -> None:
    """At 5e-6, a weight of more than about .0026 has its next number more than twice as far away."""
    with pytest.warns(UserWarning, match=r"bfloat16 weights: only \d\.\d% of them moved in a step .* 5e-06") as told:
        optimizer = steps_at([0.0, 0.5, 1.0], 5e-6)
    assert len(told) == 1
    moved = optimizer.metrics()["moved"]
    p = optimizer.param_groups[0]["params"][0].detach().float()
    exponent = torch.frexp(p).exponent
    half_way = torch.ldexp(torch.ones_like(p), exponent - 9)  # 8 bits: a spacing of 2^-8 of the power of two above
    assert moved == pytest.approx(float((half_way <= 5e-6).float().mean()), abs=0.02)
    assert moved < 0.15
    optimizer.step()
    assert "moved" not in optimizer.metrics()  # it is measured once


def test_nothing_is_told_where_nothing_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_at([1.0], 1e-3).metrics()["moved"] > 0.9
        assert steps_at([0.0, 0.5], 5e-6).metrics() == {}  # not the full rate yet
        assert steps_at([1.0], 5e-6, dtype=torch.float32).metrics() == {}
        assert steps_at([1.0], 5e-6, rounding="stochastic").metrics() == {}
