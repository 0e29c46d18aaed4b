"""Curvature passes against the exact Gauss-Newton diagonal, and Sophia against its formula."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from soul.optim import Sophia, curvature
from soul.optim.curvature import Estimator, backward_curvature, ggn_cotangent, gnb_cotangent

TOKENS, INPUTS, HIDDEN, VOCABULARY = 3, 2, 3, 3
WEIGHTS = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


class TinyModel:
    """Two layers from features to logits, in float64, with parameters as a list."""

    def __init__(self, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = [(INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, VOCABULARY)]
        self.params = [
            torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64) * sharpness) for s in shapes
        ]
        self.inputs = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)

    def logits(self, *params: torch.Tensor) -> torch.Tensor:
        first, bias, second = params or self.params
        return torch.tanh(self.inputs @ first + bias) @ second

    def gauss_newton_diagonal(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of ``sum_i w_i J_i^T (diag p_i - p_i p_i^T) J_i`` from explicit Jacobians."""
        jacobians = torch.autograd.functional.jacobian(self.logits, tuple(self.params))
        assert isinstance(jacobians, tuple)
        jacobian = torch.cat([j.reshape(TOKENS, VOCABULARY, -1) for j in jacobians], dim=-1)
        p = self.logits().softmax(-1).detach()
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("n,nvd,nvw,nwd->d", weights, jacobian, middle, jacobian)

    def squared_gradient(self) -> torch.Tensor:
        """Return all ``p.grad ** 2`` as a vector, and clear them."""
        grads = [p.grad for p in self.params if p.grad is not None]
        assert len(grads) == len(self.params)
        for p in self.params:
            p.grad = None
        return torch.cat([g.flatten() for g in grads]) ** 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("weights", [WEIGHTS, torch.full((3,), 1 / 3, dtype=torch.float64)])
def test_ggn_is_exact_over_all_signs(weights: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    total, draws = torch.zeros(()), 0
    for signs in itertools.product((-1.0, 1.0), repeat=TOKENS * VOCABULARY):
        drawn = torch.tensor(signs, dtype=torch.float64).view(TOKENS, VOCABULARY)
        monkeypatch.setattr(curvature, "_random_signs", lambda *_, drawn=drawn: drawn.clone())
        backward_curvature(model.logits(), weights, "ggn", generator())
        total, draws = total + model.squared_gradient(), draws + 1
    torch.testing.assert_close(total / draws, model.gauss_newton_diagonal(weights), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weights", [WEIGHTS, torch.full((3,), 1 / 3, dtype=torch.float64)])
def test_gnb_is_exact_over_all_labels(weights: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    p = model.logits().softmax(-1).detach()
    total = torch.zeros(())
    for labels in itertools.product(range(VOCABULARY), repeat=TOKENS):
        drawn = torch.tensor(labels)
        monkeypatch.setattr(curvature, "_sample", lambda *_, drawn=drawn: drawn)
        backward_curvature(model.logits(), weights, "gnb", generator())
        total = total + p[torch.arange(TOKENS), drawn].prod() * model.squared_gradient()
    torch.testing.assert_close(total, model.gauss_newton_diagonal(weights), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimator", ["ggn", "gnb"])
@pytest.mark.parametrize("sharpness", [0.3, 1.5])
def test_real_draws_are_unbiased(estimator: Estimator, sharpness: float) -> None:
    model = TinyModel(sharpness)
    source = generator(11)
    draws = []
    for _ in range(3000):
        backward_curvature(model.logits(), WEIGHTS, estimator, source)
        draws.append(model.squared_gradient())
    sample = torch.stack(draws)
    errors = (sample.mean(0) - model.gauss_newton_diagonal(WEIGHTS)) / (sample.std(0) / len(sample) ** 0.5)
    assert errors.abs().max() < 4.5  # standard errors, over 18 parameters


def test_ggn_keeps_its_accuracy_where_the_model_is_sure() -> None:
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 0] = 12.0  # p is about .99996
    p = logits.softmax(-1)
    truth = (p * (1 - p))[0, 0]
    spread = {}
    for name, cotangent in (("ggn", ggn_cotangent), ("gnb", gnb_cotangent)):
        source = generator(3)
        squares = torch.stack([cotangent(logits, torch.ones(1), source)[0, 0] ** 2 for _ in range(4000)])
        spread[name] = float(squares.std() / truth)
    assert spread["ggn"] < 2
    assert spread["gnb"] > 10 or spread["gnb"] == 0  # nearly always almost 0, rarely huge


def test_signs_are_fair_and_labels_follow_the_probabilities() -> None:
    like = torch.empty(200, 1000)
    signs = curvature._random_signs(like, generator(1)).sign()
    assert abs(float(signs.mean())) < 4.5 / like.numel() ** 0.5
    p = torch.tensor([0.7, 0.25, 0.05]).expand(20_000, 3)
    shares = torch.bincount(curvature._sample(p, generator(2)), minlength=3) / len(p)
    assert torch.allclose(shares, p[0], atol=0.015)


@pytest.mark.parametrize("estimator", ["ggn", "gnb"])
def test_tokens_without_weight_or_left_out_do_not_count(estimator: Estimator) -> None:
    model = TinyModel()
    masked = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    backward_curvature(model.logits(), masked, estimator, generator(4))
    alone = TinyModel()
    alone.inputs = model.inputs.clone()
    alone.inputs[[0, 2]] = 100.0  # what stands at masked places must not matter
    backward_curvature(alone.logits(), masked, estimator, generator(4))
    first = model.squared_gradient()
    torch.testing.assert_close(first, alone.squared_gradient(), rtol=1e-12, atol=1e-15)

    source, total = generator(6), torch.zeros(())
    for _ in range(3000):
        backward_curvature(model.logits()[1:2], torch.ones(1), estimator, source)  # the answer's row alone
        total = total + model.squared_gradient() / 3000
    truth = model.gauss_newton_diagonal(masked)
    torch.testing.assert_close(total, truth, rtol=0.25, atol=float(truth.max()) * 0.05)


@pytest.mark.parametrize("cotangent", [ggn_cotangent, gnb_cotangent])
def test_dtypes_and_determinism(cotangent: Any) -> None:
    logits = torch.randn(4, 7, generator=generator(8))
    weights = torch.full((4,), 0.25)
    exact = cotangent(logits, weights, generator(9))
    assert exact.dtype == torch.float32
    assert torch.equal(exact, cotangent(logits, weights, generator(9)))
    assert not torch.equal(exact, cotangent(logits, weights, generator(10)))
    rough = logits.bfloat16()
    half = cotangent(rough, weights, generator(9))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, cotangent(rough.float(), weights, generator(9)).bfloat16())  # rounded at the end only
    torch.testing.assert_close(exact.sum(-1), torch.zeros(4), atol=1e-6, rtol=0)  # softmax ignores a common shift


def test_wrong_input_is_refused() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="unknown curvature estimator"):
        backward_curvature(logits, torch.ones(2), "hutchinson", generator())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"logits \[N, V\] and weights \[N\]"):
        backward_curvature(logits, torch.ones(3), "ggn", generator())
    with pytest.raises(ValueError, match="weights of 0 or more"):
        backward_curvature(logits, torch.tensor([1.0, -1.0]), "ggn", generator())


@pytest.mark.parametrize("relative", [0.0, 0.3])
def test_sophia_follows_its_formula(relative: float) -> None:
    rng = np.random.default_rng(2)
    size, lr, b1, b2, rho, decay, damping = 40, 0.01, 0.9, 0.8, 0.5, 0.1, 0.02
    p = rng.standard_normal(size)
    tensor = torch.nn.Parameter(torch.tensor(p).view(5, 8))
    optimizer = Sophia(
        [tensor],
        lr=lr,
        betas=(b1, b2),
        rho=rho,
        weight_decay=decay,
        damping=damping,
        relative_damping=relative,
        interval=3,
    )
    m, h, refreshes, win_rates = np.zeros(size), np.zeros(size), 0, []
    for step in range(20):
        assert optimizer.curvature_due(step) == (step % 3 == 0)
        if step % 3 == 0:
            noise = rng.standard_normal(size) * np.logspace(-2, 0.5, size)
            h, refreshes = b2 * h + (1 - b2) * noise**2, refreshes + 1
            tensor.grad = torch.tensor(noise).view(5, 8)
            optimizer.update_curvature()
        g = rng.standard_normal(size) * 0.3
        m = b1 * m + (1 - b1) * g
        m_hat, h_hat = m / (1 - b1 ** (step + 1)), h / (1 - b2**refreshes)
        ratio = m_hat / (rho * h_hat + damping + relative * rho * h_hat.mean())
        p = p * (1 - lr * decay) - lr * np.clip(ratio, -1, 1)
        tensor.grad = torch.tensor(g).view(5, 8)
        optimizer.step()
        np.testing.assert_allclose(tensor.detach().numpy().ravel(), p, rtol=0, atol=1e-13)
        assert optimizer.metrics()["win_rate"] == pytest.approx(np.mean(np.abs(ratio) < 1), abs=1e-12)
        win_rates.append(optimizer.metrics()["win_rate"])
    assert 0 < min(win_rates) < 1  # else the clip was never in play, and the test shows half of the rule
