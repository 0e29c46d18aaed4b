"""Estimators of a diagonal curvature against exact matrices: over all draws, and over many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from soul.curvature import estimators, hutchinson
from soul.curvature.estimators import (
    ESTIMATORS,
    backward_curvature,
    empirical_cotangent,
    ggn_cotangent,
    gnb_cotangent,
)
from soul.curvature.hutchinson import difference_product, hessian_product, hutchinson_diagonal

TOKENS, INPUTS, HIDDEN, VOCABULARY = 3, 2, 3, 3
WEIGHTS = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 1])


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

    def empirical_fisher_diagonal(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of the mean of outer products of the tokens' gradients, one backward pass a token."""
        total = torch.zeros((), dtype=torch.float64)
        for i, weight in enumerate(weights):
            loss = torch.nn.functional.cross_entropy(self.logits()[i : i + 1], LABELS[i : i + 1])
            grads = torch.autograd.grad(loss, self.params)
            total = total + weight * torch.cat([g.flatten() for g in grads]) ** 2
        return total

    def loss(self, *params: torch.Tensor) -> torch.Tensor:
        """Return the weighted loss of the labels, at other parameters if they are given."""
        return torch.nn.functional.cross_entropy(self.logits(*params), LABELS, reduction="none") @ WEIGHTS

    def hessian(self) -> torch.Tensor:
        blocks = torch.autograd.functional.hessian(self.loss, tuple(self.params))
        sizes = [p.numel() for p in self.params]
        return torch.cat(
            [
                torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
                for row, n in zip(blocks, sizes, strict=True)
            ]
        )

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
        monkeypatch.setattr(estimators, "_random_signs", lambda *_, drawn=drawn: drawn.clone())
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
        monkeypatch.setattr(estimators, "_sample", lambda *_, drawn=drawn: drawn)
        backward_curvature(model.logits(), weights, "gnb", generator())
        total = total + p[torch.arange(TOKENS), drawn].prod() * model.squared_gradient()
    torch.testing.assert_close(total, model.gauss_newton_diagonal(weights), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weights", [WEIGHTS, torch.full((3,), 1 / 3, dtype=torch.float64)])
def test_empirical_is_exact_over_all_signs(weights: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    total, draws = torch.zeros(()), 0
    for signs in itertools.product((-1.0, 1.0), repeat=TOKENS):
        drawn = torch.tensor(signs, dtype=torch.float64)
        monkeypatch.setattr(estimators, "_random_signs", lambda *_, drawn=drawn: drawn.clone())
        backward_curvature(model.logits(), weights, "empirical", generator(), LABELS)
        total, draws = total + model.squared_gradient(), draws + 1
    torch.testing.assert_close(total / draws, model.empirical_fisher_diagonal(weights), rtol=1e-12, atol=1e-15)


def test_hutchinson_is_exact_over_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all sign vectors of one layer is the diagonal of that layer's Hessian, negative entries too."""
    model = TinyModel()
    exact = model.hessian().diag()[: INPUTS * HIDDEN].view(INPUTS, HIDDEN)
    assert exact.min() < 0 < exact.max()
    fixed = [p.detach() for p in model.params[1:]]
    total, draws = torch.zeros(()), 0
    for signs in itertools.product((-1.0, 1.0), repeat=INPUTS * HIDDEN):
        drawn = torch.tensor(signs, dtype=torch.float64).view(INPUTS, HIDDEN)
        monkeypatch.setattr(hutchinson, "_signs", lambda *_, drawn=drawn: drawn)
        total = (
            total + hutchinson_diagonal(lambda: model.loss(model.params[0], *fixed), model.params[:1], generator())[0]
        )
        draws += 1
    torch.testing.assert_close(total / draws, exact, rtol=1e-12, atol=1e-15)


def test_products_with_the_hessian() -> None:
    model = TinyModel()
    vectors = [torch.randn(p.shape, generator=generator(2), dtype=torch.float64) for p in model.params]
    exact = model.hessian() @ torch.cat([v.flatten() for v in vectors])
    before = [p.detach().clone() for p in model.params]
    for product, tolerance in ((hessian_product, 1e-12), (difference_product, 1e-4)):
        found = torch.cat([part.flatten() for part in product(model.loss, model.params, vectors)])
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, model.params, strict=True))
    assert all(p.grad is None for p in model.params)


def test_differences_step_in_where_nothing_can_be_differentiated_twice() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grads[0] * 3 * ctx.saved_tensors[0] ** 2

    def loss(x: torch.Tensor) -> torch.Tensor:
        y: Any = Once.apply(x)
        return (y**2 * torch.tensor([1.0, -1.0])).sum()  # x^6

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        hessian_product(lambda: loss(x), [x], [torch.ones(2)])
    found = hutchinson_diagonal(lambda: loss(x), [x], generator())[0]
    torch.testing.assert_close(found, torch.tensor([30.0, -480.0]), rtol=2e-3, atol=0)  # fp32
    coarse = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ValueError, match=r"too\s+coarse.*model.dtype=float32"):
        hutchinson_diagonal(lambda: loss(coarse), [coarse], generator())

    def broken() -> torch.Tensor:
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):  # not taken for a missing derivative
        hutchinson_diagonal(broken, [x], generator())


def test_hutchinson_of_linear_and_absent_parameters_is_zero() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    for loss in (lambda: x.sum(), lambda: (x**2).sum()):
        found = hutchinson_diagonal(loss, [x, unused], generator())
        assert torch.equal(found[1], torch.zeros(3))
    assert torch.equal(found[0], torch.full((2,), 2.0))


@pytest.mark.parametrize("estimator", ["ggn", "gnb"])
@pytest.mark.parametrize("sharpness", [0.3, 1.5])
def test_real_draws_are_unbiased(estimator: str, sharpness: float) -> None:
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
    signs = estimators._random_signs(like, generator(1)).sign()
    assert abs(float(signs.mean())) < 4.5 / like.numel() ** 0.5
    p = torch.tensor([0.7, 0.25, 0.05]).expand(20_000, 3)
    shares = torch.bincount(estimators._sample(p, generator(2)), minlength=3) / len(p)
    assert torch.allclose(shares, p[0], atol=0.015)


@pytest.mark.parametrize("estimator", ["ggn", "gnb"])
def test_tokens_without_weight_or_left_out_do_not_count(estimator: str) -> None:
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


@pytest.mark.parametrize("cotangent", [ggn_cotangent, gnb_cotangent, empirical_cotangent])
def test_dtypes_and_determinism(cotangent: Any) -> None:
    logits = torch.randn(4, 7, generator=generator(8))
    weights, labels = torch.full((4,), 0.25), torch.arange(4)
    exact = cotangent(logits, weights, generator(9), labels)
    assert exact.dtype == torch.float32
    assert torch.equal(exact, cotangent(logits, weights, generator(9), labels))
    assert not torch.equal(exact, cotangent(logits, weights, generator(10), labels))
    rough = logits.bfloat16()
    half = cotangent(rough, weights, generator(9), labels)
    assert half.dtype == torch.bfloat16
    assert torch.equal(
        half, cotangent(rough.float(), weights, generator(9), labels).bfloat16()
    )  # rounded at the end only
    torch.testing.assert_close(exact.sum(-1), torch.zeros(4), atol=1e-6, rtol=0)  # softmax ignores a common shift


@pytest.mark.parametrize("weights", [WEIGHTS, torch.full((3,), 1 / 3, dtype=torch.float64)])
def test_squared_gradients_of_micro_batches_add_up_to_their_mean(weights: torch.Tensor) -> None:
    model = TinyModel()
    total = torch.zeros(())
    for part in ([0], [1, 2]):  # two micro-batches of one refresh
        backward_curvature(model.logits()[part], weights[part], "squared_gradient", generator(), LABELS[part])
        total = total + model.squared_gradient()
    expected = torch.zeros(())
    for part in ([0], [1, 2]):
        share = weights[part].sum()
        nll = -(model.logits()[part].log_softmax(-1)[range(len(part)), LABELS[part]])
        ((weights[part] / share) * nll).sum().backward()
        expected = expected + share * model.squared_gradient()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-15)


def test_wrong_input_is_refused() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(
        ValueError, match="unknown curvature estimator 'fisher'; give one of: ggn, gnb, empirical, squared_gradient"
    ):
        backward_curvature(logits, torch.ones(2), "fisher", generator())
    with pytest.raises(ValueError, match="no single backward pass gives the estimator 'hutchinson'"):
        backward_curvature(logits, torch.ones(2), "hutchinson", generator())
    with pytest.raises(ValueError, match=r"needs the labels \[N\] of 2 tokens, not none"):
        backward_curvature(logits, torch.ones(2), "empirical", generator())
    with pytest.raises(ValueError, match=r"logits \[N, V\] and weights \[N\]"):
        backward_curvature(logits, torch.ones(3), "ggn", generator())
    with pytest.raises(ValueError, match="weights of 0 or more"):
        backward_curvature(logits, torch.tensor([1.0, -1.0]), "ggn", generator())


def test_the_table_says_what_estimators_need() -> None:
    assert {name for name, kind in ESTIMATORS.items() if kind.cotangent} == {
        "ggn",
        "gnb",
        "empirical",
        "squared_gradient",
    }
    assert {name for name, kind in ESTIMATORS.items() if not kind.needs_pass} == {"objective_squared"}
