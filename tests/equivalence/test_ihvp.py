"""Inverses against explicit damped solves in float64."""

from __future__ import annotations

import itertools
import types
from typing import Any

import exact
import pytest
import torch
from torch import nn

from soul.curvature import estimators
from soul.curvature.ihvp import INVERSES, InverseSpec, make_inverse
from soul.curvature.ihvp.base import curvature_gradients
from soul.curvature.ihvp.cg import ConjugateGradient
from soul.curvature.ihvp.diagonal import Diagonal
from soul.curvature.ihvp.woodfisher import WoodFisher
from soul.curvature.kronecker import linear_layers
from soul.curvature.products import loss_gradient, single_rows, trainable
from soul.curvature.vectors import Vector
from soul.data.batches import Batch, collate_rows
from soul.data.templates import Encoded

BATCHES = exact.batches(1, 6)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def spread(model: nn.Module, values: dict[str, float]) -> torch.Tensor:
    """Return one number a parameter tensor, repeated for each of its entries."""
    return torch.cat([torch.full((p.numel(),), values[n], dtype=torch.float64) for n, p in trainable(model).items()])


def block_means(model: nn.Module, diagonal: torch.Tensor) -> dict[str, float]:
    return {n: float(x.mean()) for n, x in exact.unflat(model, diagonal).items()}


def only_linear(model: nn.Module) -> Any:
    layers = linear_layers(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name.rpartition(".")[0] in layers)
    return model


@pytest.fixture(scope="module")
def model():
    return exact.opt()


@pytest.fixture(scope="module")
def small():
    """Only linear layers are trainable: a thousand parameters, and the matrix is quick to factor."""
    return only_linear(exact.opt(3, bias=False, layers=1))


@pytest.mark.parametrize("name", sorted(INVERSES))
def test_every_inverse_is_positive_deterministic_and_leaves_the_model_alone(model, name):
    before = {n: p.clone() for n, p in model.named_parameters()}
    v = loss_gradient(model, BATCHES)[1]
    kept = {n: x.clone() for n, x in v.items()}
    spec = InverseSpec(draws=2, rank=5, iterations=3)
    first, again, other = (make_inverse(name, model, BATCHES, spec, seed)(v) for seed in (0, 0, 1))
    assert all(torch.equal(x, again[n]) for n, x in first.items())
    if name not in ("identity", "whiten"):
        assert any(not torch.equal(x, other[n]) for n, x in first.items())
    assert set(first) <= set(v)
    assert all(x.shape == v[n].shape for n, x in first.items())
    assert sum(float((x * v[n]).sum()) for n, x in first.items()) > 0  # so that a step along it goes uphill
    assert all(torch.equal(x, kept[n]) for n, x in v.items())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["diagonal", "woodfisher", "cg", "kfac", "ekfac"])
def test_inverses_are_linear(small, name):
    inverse = make_inverse(name, small, BATCHES, InverseSpec(draws=2, rank=6))
    v = exact.random_vector(small, 1)
    u = exact.flat(small, inverse(v))
    torch.testing.assert_close(exact.flat(small, inverse({n: 2 * x for n, x in v.items()})), 2 * u, rtol=1e-6, atol=0)


def test_the_diagonal_is_unbiased_and_damped_by_its_mean(model):
    truth = exact.gauss_newton(model, BATCHES).diagonal()
    draws = [exact.flat(model, Diagonal(model, BATCHES, InverseSpec(draws=1), s).diagonal) for s in range(300)]
    sample = torch.stack(draws)
    mean, scale = sample.mean(0), sample.std(0) / len(sample) ** 0.5
    live = truth > 1e-3 * truth.mean()
    assert int(live.sum()) > 500
    errors = ((mean - truth) / scale)[live]
    assert errors.abs().max() < 5.5  # standard errors, over more than 500 skewed numbers
    assert float(mean[live].sum() / truth[live].sum()) == pytest.approx(1, abs=0.05)

    inverse = Diagonal(model, BATCHES, InverseSpec(draws=3, damping=0.2), 7)
    found = exact.flat(model, inverse.diagonal)
    v = exact.random_vector(model, 2)
    floor = 1e-6 * float(found.mean())
    damping = spread(model, {n: 0.2 * max(m, floor) for n, m in block_means(model, found).items()})
    torch.testing.assert_close(exact.flat(model, inverse(v)), exact.flat(model, v) / (found + damping))


def explicit_fisher(model: nn.Module, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients that woodfisher keeps, and ``1/m sum g g^T``."""
    many = BATCHES if rank <= len(BATCHES) else single_rows(BATCHES)
    rows = torch.stack([exact.flat(model, g) for g in curvature_gradients(model, many, rank, seed)])
    return rows, rows.T @ rows / len(rows)


@pytest.mark.parametrize("rank", [2, 3, 10])
@pytest.mark.parametrize("buffers", [100.0, 0.05])
def test_woodfisher_is_the_inverse_of_its_matrix(small, rank, buffers):
    """For all parameters together and for each tensor, whether gradients fit into memory at once or not."""
    rows, fisher = explicit_fisher(small, rank)
    assert len(rows) == {2: 2, 3: 3, 10: 12}[rank]  # three micro-batches of two rows: as many of each
    v = exact.random_vector(small, 3)
    right, n = exact.flat(small, v), len(fisher)
    spec = InverseSpec(damping=0.05, rank=rank, blocks=False, buffers=buffers)
    eye = torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.solve(fisher + 0.05 * fisher.trace() / n * eye, right)
    assert error(exact.flat(small, WoodFisher(small, BATCHES, spec)(v)), expected) < 1e-9

    names = [n for n, p in trainable(small).items() for _ in range(p.numel())]
    same_block = torch.tensor([[a == b for b in names] for a in names])
    damping = spread(small, {k: 0.05 * m for k, m in block_means(small, fisher.diagonal()).items()})
    expected = torch.linalg.solve(fisher * same_block + torch.diag(damping), right)
    spec = InverseSpec(damping=0.05, rank=rank, buffers=buffers)
    assert error(exact.flat(small, WoodFisher(small, BATCHES, spec)(v)), expected) < 1e-9


def test_woodfisher_in_single_precision():
    single = only_linear(exact.opt(3, bias=False, layers=1).float())
    rows, _ = explicit_fisher(single, 8)
    rows = rows.double()
    v = exact.random_vector(single, 3)
    right = exact.flat(single, v).double()
    for damping in (1e-6, 1e-2):
        eye = torch.eye(len(right), dtype=torch.float64)
        lam = damping * float(rows.square().sum()) / rows.numel()
        expected = torch.linalg.solve(rows.T @ rows / len(rows) + lam * eye, right)
        found = WoodFisher(single, BATCHES, InverseSpec(damping=damping, rank=8, blocks=False))(v)
        assert error(exact.flat(single, found).double(), expected) < 1e-6


def rescaling_recursion(rows: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The recursion that only ever rescales its first gradient, as it is in circulation."""
    k, o, m = v.clone(), rows[0].clone(), len(rows)
    for g in rows[1:]:
        bottom = m + g @ o
        k = k - (g @ k) / bottom * o
        o = o - (g @ o) / bottom * o
    return k


def test_woodfisher_does_not_have_the_flaw_of_the_common_recursion(small):
    rows, fisher = explicit_fisher(small, 30)
    v = exact.unflat(small, rows.mean(0) + 0.1 * rows.std() * exact.flat(small, exact.random_vector(small, 5)))
    right = exact.flat(small, v)
    flawed = right - rescaling_recursion(rows, right)
    assert abs(cosine(flawed, rows[0])) > 1 - 1e-12  # all it takes away is a multiple of the first gradient
    damping = 0.1 * float(fisher.diagonal().mean())
    ours = exact.flat(small, WoodFisher(small, BATCHES, InverseSpec(damping=0.1, rank=30, blocks=False))(v))
    taken = right - damping * ours
    assert abs(cosine(taken, rows[0])) < 0.9
    inside = torch.linalg.lstsq(rows.T, taken[:, None]).solution[:, 0]
    assert error(rows.T @ inside, taken) < 1e-8  # a combination of the gradients ...
    assert int((inside.abs() > 1e-3 * inside.abs().max()).sum()) > 25  # ... of nearly all of them


def test_cg_solves_the_damped_system(small):
    spec = InverseSpec(damping=0.1, draws=4, iterations=2000)
    matrix = exact.gauss_newton(small, BATCHES)
    v = exact.random_vector(small, 6)
    inverse = ConjugateGradient(small, BATCHES, spec, seed=2)
    found = exact.flat(small, inverse(v))
    damped = matrix + torch.diag(spread(small, inverse.diagonal.damping))
    right = exact.flat(small, v)
    residual = float((damped @ found - right).norm() / right.norm())
    report = inverse.report()
    assert report["cg_residual"] == pytest.approx(residual, rel=1e-3)
    assert report["cg_residual"] <= 1.1e-5
    assert error(found, torch.linalg.solve(damped, right)) < 1e-2
    ratio = [inverse.diagonal.damping[n] / (0.1 * m) for n, m in block_means(small, matrix.diagonal()).items()]
    assert all(0.3 < r < 3 for r in ratio)  # four noisy draws a micro-batch


def test_cg_stops_where_it_is_told_to_and_says_so(small):
    v = exact.random_vector(small, 7)
    short = ConjugateGradient(small, BATCHES, InverseSpec(iterations=3))
    short(v)
    assert short.report()["cg_iterations"] == 3
    assert short.report()["cg_residual"] > 1e-5
    rough = ConjugateGradient(small, BATCHES, InverseSpec(tolerance=0.3))
    rough(v)
    assert rough.report()["cg_residual"] <= 0.3
    assert rough.report()["cg_iterations"] < 100
    assert all(not x.any() for x in rough({n: torch.zeros_like(x) for n, x in v.items()}).values())


@pytest.mark.parametrize("precondition", [True, False])
def test_cg_solves_with_and_without_the_preconditioner(model, precondition):
    """All parameters: embeddings, norms and biases differ by orders of magnitude in curvature."""
    v = loss_gradient(model, exact.batches(9, 4))[1]
    inverse = ConjugateGradient(model, BATCHES, InverseSpec(draws=8, iterations=2000, precondition=precondition))
    damped = exact.gauss_newton(model, BATCHES) + torch.diag(spread(model, inverse.diagonal.damping))
    found, right = exact.flat(model, inverse(v)), exact.flat(model, v)
    assert inverse.report()["cg_residual"] <= 1.1e-5
    assert float((damped @ found - right).norm() / right.norm()) < 2e-5


def test_cg_over_some_parameters_solves_their_part(small):
    names = [n for n in trainable(small) if "fc" in n]
    v = {n: x for n, x in exact.random_vector(small, 8).items() if n in names}
    inverse = ConjugateGradient(small, BATCHES, InverseSpec(draws=4, iterations=2000))
    found = inverse(v)
    assert set(found) == set(names)
    keep = exact.flat(small, {n: torch.ones_like(x) for n, x in v.items()}).bool()
    damped = exact.gauss_newton(small, BATCHES) + torch.diag(spread(small, inverse.diagonal.damping))
    expected = torch.linalg.solve(damped[keep][:, keep], exact.flat(small, v)[keep])
    assert error(exact.flat(small, found)[keep], expected) < 1e-2


class OneLayer(nn.Module):
    """A frozen embedding, one linear layer that learns, and a frozen head."""

    def __init__(self, size: int = 4, vocabulary: int = 3, *, start: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embed = nn.Embedding(8, size, dtype=torch.float64)
        self.layer = nn.Linear(size, size, bias=True, dtype=torch.float64)
        self.head = nn.Linear(size, vocabulary, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            for p in self.layer.parameters():
                p.mul_(start)
        self.embed.requires_grad_(False)
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return types.SimpleNamespace(logits=self.head(self.layer(self.embed(input_ids))))


def over_all_signs(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> int:
    """Let successive cotangents of a single token run through every pattern of signs; return how many there are."""
    patterns = list(itertools.product((-1.0, 1.0), repeat=vocabulary))
    turn = itertools.cycle(patterns)

    def signs(like: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(next(turn), dtype=like.dtype).expand_as(like).clone()

    monkeypatch.setattr(estimators, "_random_signs", signs)
    return len(patterns)


def one_token_rows(*prompts: int) -> list[Batch]:
    """Return micro-batches of one row, each a token and the answer token that it predicts."""
    return [collate_rows([Encoded((p, 1), 1)]) for p in prompts]


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("prompts", "start"),
    [((2,), 1.0), ((2, 3, 5, 6, 7), 0.0)],
    ids=["one example", "several whose predictions are alike"],
)
def test_kronecker_inverses_are_exact_on_one_layer(monkeypatch, name, prompts, start):
    """One token an example, and an output curvature that does not depend on the input: then ``G = A (x) G``.

    Rows end in the token to predict, which also passes through the layer: it is masked out of attention, so that only
    the position that predicts counts among the layer's inputs.
    """
    model, batches = OneLayer(start=start), one_token_rows(*prompts)
    for batch in batches:
        batch["attention_mask"][:, 1:] = 0
    matrix = exact.gauss_newton(model, batches)
    draws = over_all_signs(monkeypatch, 3)
    v = exact.random_vector(model, 1)
    for damping in (1e-3, 0.1, 10.0):
        inverse = make_inverse(name, model, batches, InverseSpec(damping=damping, draws=draws))
        eye = torch.eye(len(matrix), dtype=torch.float64)
        expected = torch.linalg.solve(matrix + damping * matrix.diagonal().mean() * eye, exact.flat(model, v))
        assert error(exact.flat(model, inverse(v)), expected) < 1e-6


def test_kronecker_inverses_are_nearer_to_the_exact_solve():
    """A one-layer transformer, 64 rows, ten seeds: cosine to the exact damped solve with the full matrix.

    With a handful of rows the diagonal can win on a seed: the matrix is then of low rank, and no product of factors.
    """
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(10):
        model = only_linear(exact.opt(seed, bias=False, layers=1))
        many = exact.rows(100 + seed, 64)
        batches = [collate_rows(many[i : i + 16]) for i in range(0, 64, 16)]
        matrix = exact.gauss_newton(model, batches)
        v: Vector = loss_gradient(model, exact.batches(200 + seed, 4))[1]
        for damping in (0.01, 0.1):
            added = spread(model, {n: damping * m for n, m in block_means(model, matrix.diagonal()).items()})
            target = torch.linalg.solve(matrix + torch.diag(added), exact.flat(model, v))
            for name in ("identity", "diagonal", "kfac", "ekfac"):
                inverse = make_inverse(name, model, batches, InverseSpec(damping=damping, draws=12), seed)
                found.setdefault((name, damping), []).append(cosine(exact.flat(model, inverse(v)), target))
    for damping, name, other in itertools.product((0.01, 0.1), ("kfac", "ekfac"), ("identity", "diagonal")):
        pairs = zip(found[name, damping], found[other, damping], strict=True)
        assert all(a > b for a, b in pairs), (name, other, found)


def test_whitening_divides_by_the_inputs_second_moments(small):
    inverse = make_inverse("whiten", small, BATCHES, InverseSpec(damping=0.3))
    caught: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _m, args, _o, name=name: caught.setdefault(name, []).append(args[0]))
        for name, layer in linear_layers(small).items()
    ]
    with torch.no_grad():
        for batch in BATCHES:
            for row in range(len(batch["input_ids"])):  # one by one, so that there is no padding to mistake
                length = int(batch["attention_mask"][row].sum())
                small(input_ids=batch["input_ids"][row : row + 1, :length])
    for handle in handles:
        handle.remove()
    v = exact.random_vector(small, 2)
    found = inverse(v)
    assert set(found) == {f"{name}.weight" for name in caught}
    for name, inputs in caught.items():
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs])
        second = x.T @ x / len(x)
        eye = torch.eye(len(second), dtype=torch.float64)
        expected = v[f"{name}.weight"] @ torch.linalg.inv(second + 0.3 * second.diagonal().mean() * eye)
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "whiten"])
def test_kronecker_inverses_leave_embeddings_norms_and_head_alone(model, name):
    v = exact.random_vector(model, 3)
    found = make_inverse(name, model, BATCHES, InverseSpec(draws=1))(v)
    layers = {f"{n}.{part}" for n in linear_layers(model) for part in ("weight", "bias")}
    assert set(found) == layers
    assert not any(word in n for n in found for word in ("embed", "norm", "lm_head"))


@pytest.mark.parametrize("name", ["diagonal", "woodfisher", "cg"])
def test_a_parameter_without_curvature_is_left_alone(name):
    """As LoRA's first factor is at the start, when the second is zero."""
    model = exact.opt()
    model.useless = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    v = {**loss_gradient(model, BATCHES)[1], "useless": torch.ones(3, dtype=torch.float64)}
    found = make_inverse(name, model, BATCHES, InverseSpec(draws=1, rank=4, iterations=2))(v)
    assert "useless" not in found
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("name", ["diagonal", "woodfisher", "cg"])
def test_curvature_that_is_only_rounding_is_no_reason_for_giant_steps(model, name):
    """A key's bias adds the same to all of a query's scores and cancels: its curvature and gradient are rounding."""
    biases = [n for n in trainable(model) if "k_proj.bias" in n]
    mean = block_means(model, exact.gauss_newton(model, BATCHES).diagonal())
    assert biases
    assert max(mean[n] for n in biases) < 1e-25
    found = make_inverse(name, model, BATCHES, InverseSpec(draws=2, rank=6))(loss_gradient(model, BATCHES)[1])
    length = float(exact.flat(model, found).norm())
    assert all(float(found[n].norm()) < 1e-6 * length for n in biases if n in found)


def test_wrong_settings_are_refused(model):
    with pytest.raises(ValueError, match="unknown inverse 'kfca'; known: identity, diagonal"):
        make_inverse("kfca", model, BATCHES)
    with pytest.raises(ValueError, match="damping must be above 0"):
        InverseSpec(damping=0.0)
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        InverseSpec(rank=0)
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        InverseSpec(tolerance=0.0)
    with pytest.raises(ValueError, match="jvp must be one of"):
        InverseSpec(jvp="reverse")  # pyright: ignore[reportArgumentType]
