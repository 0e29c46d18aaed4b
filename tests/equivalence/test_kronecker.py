"""Kronecker factors against explicit matrices in float64, and the rules built on them against the factors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from soul.curvature.estimators import ggn_cotangent
from soul.curvature.inverses import EigenInverse, KroneckerInverse, damped, inverse
from soul.curvature.kronecker import KroneckerFactors, linear_layers, pack, unpack
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.optim import kronecker_spec as module
from soul.optim.ekfac import EKFACSpec
from soul.optim.kfac import KFACSpec
from soul.optim.whiten import WhitenSpec
from soul.registry import OPTIMIZERS

SPECS = {"whiten": WhitenSpec, "kfac": KFACSpec, "ekfac": EKFACSpec}


def cotangent(logits: torch.Tensor, weights: torch.Tensor, seed: int) -> torch.Tensor:
    return ggn_cotangent(logits.detach(), weights, torch.Generator().manual_seed(seed))


def watch(model: nn.Module, factors: KroneckerFactors, x: torch.Tensor, passes: int = 1, seed: int = 0) -> None:
    """Run softmax passes over ``x`` with equal weights, whose sum over all passes is 1."""
    weights = torch.full((len(x),), 1 / (len(x) * passes), dtype=x.dtype)
    for i in range(passes):
        model.zero_grad()
        with factors.observing():
            logits = model(x)
            logits.backward(gradient=cotangent(logits, weights, seed + i))


def exact_block(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The Gauss-Newton matrix of one linear layer's weight (row-major vec) for the mean cross-entropy."""
    p = layer(x).softmax(-1).detach()
    total = torch.zeros(layer.weight.numel(), layer.weight.numel(), dtype=x.dtype)
    for a, q in zip(x, p, strict=True):
        total += torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(a, a)) / len(x)
    return total


@pytest.fixture
def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False)).double()


def test_one_example_is_exact(layer: nn.Sequential) -> None:
    # with a single position A (x) G is the whole block, and many cotangents make G exact
    x = torch.randn(1, 4, dtype=torch.float64)
    factors = KroneckerFactors(layer)
    watch(layer, factors, x, passes=4_000)
    factors.absorb()
    torch.testing.assert_close(factors.inputs("0"), x.T @ x)
    ours = torch.kron(factors.outputs("0"), factors.inputs("0"))
    true = exact_block(layer[0], x)  # type: ignore[arg-type]
    assert float((ours - true).norm() / true.norm()) < 0.05


def test_inverse_is_that_of_the_kronecker_product(layer: nn.Sequential) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    factors = KroneckerFactors(layer)
    watch(layer, factors, x, passes=40)
    factors.absorb()
    d = torch.randn(3, 4, dtype=torch.float64)
    a, g = damped(factors.inputs("0"), 0.1), damped(factors.outputs("0"), 0.1)
    expected = torch.linalg.solve(torch.kron(g, a), d.flatten()).view(3, 4)
    torch.testing.assert_close(KroneckerInverse(factors, 0.1)("0", d), expected)
    torch.testing.assert_close(
        KroneckerInverse(factors, 0.1, outputs=False)("0", d), d @ torch.linalg.inv(a), rtol=1e-9, atol=0
    )


def test_a_bias_is_an_input_of_one() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    factors = KroneckerFactors(model)
    x = torch.randn(6, 3, dtype=torch.float64)
    watch(model, factors, x)
    factors.absorb()
    augmented = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(factors.inputs("0"), augmented.T @ augmented / 6)
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    packed = pack(layer, layer.weight.detach(), layer.bias.detach())
    weight, bias = unpack(layer, packed)
    assert packed.shape == (2, 4)
    assert bias is not None
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)


def test_padding_does_not_count(make_model, tokenizer, retain_set) -> None:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set[:4])]
    model = make_model(0, torch.float64)

    def factors_of(groups) -> dict[str, torch.Tensor]:
        factors = KroneckerFactors(model)
        tokens = sum(row.answer_length for row in rows)
        for group in groups:
            batch = collate_rows(group)
            with factors.observing(batch["attention_mask"].bool()):
                logits = forward_answers(model, batch).logits_NV
                # every token weighs the same; the cotangent is made deterministic, so that both ways see the same
                logits.backward(gradient=torch.linspace(-1, 1, logits.shape[1]).double().expand_as(logits) / tokens)
        factors.absorb()
        return factors.state()

    together, alone = factors_of([rows]), factors_of([[row] for row in rows])
    assert together.keys() == alone.keys()
    for key, value in together.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-9, atol=1e-12)


def test_autocast_does_not_round_the_factors(layer: nn.Sequential) -> None:
    x = torch.randn(30, 4)
    layer.float()
    factors = KroneckerFactors(layer)
    with factors.observing(), torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    factors.absorb()
    torch.testing.assert_close(factors.inputs("0"), x.T @ x / 30)
    assert factors.outputs("0").dtype == torch.float32


def test_layers_with_one_input_share_its_factor(make_model, tokenizer, retain_set) -> None:
    model = make_model(0)
    factors = KroneckerFactors(model, outputs=False)
    batch = collate_rows([ChatTemplate(tokenizer).encode(retain_set[0])])
    with factors.observing(batch["attention_mask"].bool()), torch.no_grad():
        forward_answers(model, batch)
    factors.absorb()
    of = {name.rpartition("layers.0.")[2]: factors.input_of(name) for name in factors.layers if "layers.0." in name}
    assert of["self_attn.q_proj"] == of["self_attn.k_proj"] == of["self_attn.v_proj"] != of["self_attn.o_proj"]
    assert of["mlp.gate_proj"] == of["mlp.up_proj"] != of["mlp.down_proj"]
    assert len({factors.input_of(name) for name in factors.layers}) == 4 * 2


def test_which_layers_have_factors(make_model) -> None:
    model = make_model(0)
    assert "lm_head" not in linear_layers(model)
    assert len(linear_layers(model)) == 2 * 7
    model.model.layers[0].requires_grad_(False)
    assert len(linear_layers(model)) == 7
    assert len(linear_layers(model, largest=40)) == 4  # only attention is 32 wide on both sides
    assert len(linear_layers(model, largest=40, outputs=False)) == 4 + 2  # and what goes into the wide ones is
    with pytest.raises(ValueError, match="no trainable linear layer"):
        KroneckerFactors(nn.Sequential(nn.Embedding(3, 2)))


def test_damping_is_relative_and_zero_knows_nothing() -> None:
    m = torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(inverse(m, 0.5), torch.diag(torch.tensor([1 / 4.0, 1 / 2.0])))
    torch.testing.assert_close(inverse(1e6 * m, 0.5), 1e-6 * inverse(m, 0.5))
    assert torch.equal(inverse(torch.zeros(2, 2), 0.1), torch.eye(2))


def test_eigenvalue_correction_beats_the_product(layer: nn.Sequential) -> None:
    # inputs of two kinds whose outputs differ in confidence: the moments are no product of two factors
    x = torch.cat([torch.randn(40, 4), 6 * torch.randn(40, 4)]).double()
    factors = KroneckerFactors(layer)
    watch(layer, factors, x, passes=300)
    factors.absorb()
    true = exact_block(layer[0], x)  # type: ignore[arg-type]
    corrected = EigenInverse(factors, 1e-3)
    plain = EigenInverse(factors, 1e-3)
    n = 3_000
    for seed in range(n):
        layer.zero_grad()
        logits = layer(x)
        weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
        logits.backward(gradient=cotangent(logits, weights, 10_000 + seed))
        corrected.add("0", layer[0].weight.grad)  # type: ignore[arg-type]
        corrected.absorb(1 / (seed + 1))
    q_g, q_a = corrected.basis("0")
    basis = torch.kron(q_g, q_a)
    exact = (basis.T @ true @ basis).diagonal().view(3, 4)
    torch.testing.assert_close(corrected.moments["0"], exact, rtol=6 * math.sqrt(2 / n), atol=1e-4)
    plain.basis("0")
    assert float((plain.moments["0"] - exact).norm()) > 3 * float((corrected.moments["0"] - exact).norm())


@pytest.mark.parametrize("name", SPECS)
def test_a_step_is_as_long_as_it_may_be(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    rule = SPECS[name](lr=0.01, momentum=0.0).build(model.parameters(), model)
    x = torch.randn(20, 5, dtype=torch.float64)
    with rule.observing():
        logits = model(x)
        logits.backward(gradient=cotangent(logits, torch.full((20,), 1 / 20).double(), 0))
    rule.update_curvature()
    rule.zero_grad()
    before = copy.deepcopy(model)
    nn.functional.cross_entropy(model(x), torch.zeros(20, dtype=torch.long)).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rule.step()
    factors = rule.factors
    square = 0.0
    for key, layer in factors.layers.items():
        old = before.get_submodule(key)
        assert isinstance(old, nn.Linear)
        move = pack(layer, (layer.weight - old.weight).detach(), (layer.bias - old.bias).detach())
        a = damped(factors.inputs(key), rule.preconditioner.damping)
        if name == "ekfac":
            q_g, q_a = rule.preconditioner.basis(key)
            moments = rule.preconditioner.moments[key]
            turned = q_g.T @ move @ q_a
            square += float((turned.square() * (moments + rule.preconditioner.damping * moments.mean())).sum())
        else:
            g = (
                damped(factors.outputs(key), rule.preconditioner.damping)
                if name == "kfac"
                else torch.eye(len(move)).double()
            )
            square += float((move * (g @ move @ a)).sum())
    assert math.sqrt(square) == pytest.approx(0.01, rel=1e-6)
    assert rule.metrics()["step_length"] == pytest.approx(0.01)
    assert (
        sum(
            float((m - p).detach().flatten() @ g.flatten())
            for m, p, g in zip(model.parameters(), before.parameters(), grads, strict=True)
        )
        < 0
    )
    assert rule.predicted_kl() == (None if name == "whiten" else pytest.approx(0.5e-4))


def test_predicted_kl_is_that_of_the_model(layer: nn.Sequential) -> None:
    """On one softmax layer with one example and little damping, the prediction is the KL itself, to second order."""
    x = torch.randn(1, 4, dtype=torch.float64)
    rule = KFACSpec(lr=0.02, momentum=0.0, damping=1e-6).build(layer.parameters(), layer)
    watch(layer, rule.factors, x, passes=4_000)
    rule.update_curvature()
    rule.zero_grad()
    before = layer(x).log_softmax(-1).detach()
    nn.functional.cross_entropy(layer(x), torch.tensor([1])).backward()
    rule.step()
    kl = float(nn.functional.kl_div(layer(x).detach().log_softmax(-1), before, log_target=True, reduction="sum"))
    assert kl == pytest.approx(rule.predicted_kl(), rel=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_state_survives_a_reload_to_the_bit(name: str) -> None:
    def build() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        return model, OPTIMIZERS.get(name)(lr=0.01).build(model.parameters(), model)

    def advance(model: nn.Sequential, rule, steps: range) -> None:
        for step in steps:
            x = torch.randn(20, 5, generator=torch.Generator().manual_seed(step))
            if step % 2 == 0:
                rule.zero_grad()
                with rule.observing():
                    logits = model(x)
                    logits.backward(gradient=cotangent(logits, torch.full((20,), 1 / 20), step))
                rule.update_curvature()
            rule.zero_grad()
            nn.functional.cross_entropy(model(x), torch.zeros(20, dtype=torch.long)).backward()
            rule.step()

    straight, rule = build()
    advance(straight, rule, range(6))
    first, rule = build()
    advance(first, rule, range(3))
    saved, weights = copy.deepcopy(rule.state_dict()), copy.deepcopy(first.state_dict())
    second, again = build()
    second.load_state_dict(weights)
    again.load_state_dict(saved)
    advance(second, again, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lora_at_its_start_moves_b_alone(make_model, tokenizer, retain_set) -> None:
    from soul.adapters import AdapterSpec, add_adapter

    model = add_adapter(make_model(0), AdapterSpec(r=2))
    rule = KFACSpec(lr=0.05).build([p for p in model.parameters() if p.requires_grad], model)
    batch = collate_rows([ChatTemplate(tokenizer).encode(e) for e in retain_set])
    with rule.observing(batch["attention_mask"].bool()):
        logits = forward_answers(model, batch).logits_NV
        logits.backward(gradient=cotangent(logits, torch.full((len(logits),), 1 / len(logits)), 0))
    rule.update_curvature()
    rule.zero_grad()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    (-forward_answers(model, batch).token_logps().mean()).backward()
    rule.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert bool(torch.isfinite(p).all())
            assert torch.equal(p, before[n]) == ("lora_A" in n)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs the model"):
        KFACSpec().build(model.parameters())
    with pytest.raises(ValueError, match="damping must be above 0"):
        KFACSpec(damping=0.0)
    with pytest.raises(ValueError, match="none of the parameters"):
        KFACSpec().build([nn.Parameter(torch.ones(2))], model)
    rule = KFACSpec().build(model.parameters(), model)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="no curvature yet"):
        rule.step()
    with pytest.raises(ValueError, match="no forward pass was watched"):
        rule.update_curvature()


def test_whitening_looks_at_inputs_without_a_backward_pass(make_model, tokenizer, retain_set) -> None:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set[:6])]
    passes = CurvaturePasses(CurvatureSpec(batch=3, warm_start=2, cache=False), rows)
    model = make_model()
    lazy, full = (spec.build(model.parameters(), model) for spec in (WhitenSpec(), KFACSpec()))
    assert (lazy.needs_backward, full.needs_backward) == (False, True)
    before = torch.random.get_rng_state()
    passes.refresh(model, lazy, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    passes.refresh(model, full, 0)
    found, expected = lazy.curvature_state(), full.curvature_state()
    assert found.keys() == {name for name in expected if not name.endswith(".outputs")}
    assert any(name.endswith(".inputs") for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    assert all(p.grad is None for p in model.parameters())


def test_factors_that_do_not_fit_are_refused_before_they_are_made(make_model, monkeypatch) -> None:
    model = make_model()
    factors = KroneckerFactors(model)
    taken = sum(t.numel() * t.element_size() for t in _observed(factors, model).state().values() if t.ndim)
    assert taken / 2 < factors.bytes() <= taken  # the output projection is counted with query, key and value
    there = 2 * KroneckerFactors(model, outputs=False).bytes()
    monkeypatch.setattr(module, "memory_of", lambda _: float(there))
    with pytest.raises(ValueError, match=r"kfac would keep at least .* GB of .* use a max_dim, whiten .*, lion"):
        KFACSpec().build(model.parameters(), model)
    WhitenSpec().build(model.parameters(), model)
    there -= 1
    with pytest.raises(ValueError, match=r"whiten would keep .*: use a max_dim, lion, or an adapter"):
        WhitenSpec().build(model.parameters(), model)


def _observed(factors: KroneckerFactors, model: nn.Module) -> KroneckerFactors:
    with factors.observing():
        model(torch.arange(6)[None]).logits.sum().backward()
    factors.absorb()
    return factors


def test_products_in_bf16_are_near_the_exact_ones_and_little_damping_is_exact(monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 16, bias=False))
    factors = KroneckerFactors(layer)
    watch(layer, factors, torch.randn(200, 24) * torch.logspace(0, 1, 24))
    factors.absorb()
    gradient = torch.randn(16, 24)
    monkeypatch.setattr("soul.curvature.inverses.WIDE", 8)
    exact = KroneckerInverse(factors, 0.1)("0", gradient)
    rounded = KroneckerInverse(factors, 0.1, products=torch.bfloat16)("0", gradient)
    assert rounded.dtype == exact.dtype
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) < 0.02
    a, g = factors.inputs("0"), factors.outputs("0")

    def gain(u: torch.Tensor) -> float:
        return float((gradient * u).sum() ** 2 / ((g @ u) * (u @ a)).sum())

    assert gain(rounded) == pytest.approx(gain(exact), rel=0.02)
    little = KroneckerInverse(factors, 0.003, products=torch.bfloat16)("0", gradient)
    assert torch.equal(little, KroneckerInverse(factors, 0.003)("0", gradient))
    monkeypatch.setattr("soul.curvature.inverses.WIDE", 100)
    assert torch.equal(exact, KroneckerInverse(factors, 0.1, products=torch.bfloat16)("0", gradient))


def test_scrambled_factors_have_their_spectra_in_other_directions() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    factors = KroneckerFactors(layer)
    watch(layer, factors, torch.randn(50, 8, dtype=torch.float64) * torch.logspace(0, 1, 8))
    factors.absorb()
    before = factors.inputs("0").clone(), factors.outputs("0").clone()
    factors.scramble(torch.Generator().manual_seed(0))
    for old, new in zip(before, (factors.inputs("0"), factors.outputs("0")), strict=True):
        torch.testing.assert_close(torch.linalg.eigvalsh(new), torch.linalg.eigvalsh(old))
        assert float((new - old).norm() / old.norm()) > 0.3
    rule = EKFACSpec().build(layer.parameters(), layer)
    with pytest.raises(ValueError, match="ekfac"):
        rule.scramble(0)


@pytest.mark.parametrize("name", SPECS)
def test_moving_every_third_step_is_one_move_along_the_average(name: str) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    gradients = [torch.randn(4, 5, dtype=torch.float64) for _ in range(6)]
    x = torch.randn(30, 5, dtype=torch.float64)

    def rule_of(layer: nn.Sequential, every: int, momentum: float):
        rule = SPECS[name](lr=0.1, every=every, momentum=momentum).build(layer.parameters(), layer)
        with rule.observing():
            logits = layer(x)
            logits.backward(gradient=cotangent(logits, torch.full((30,), 1 / 30, dtype=x.dtype), 0))
        layer.zero_grad()
        rule.update_curvature()
        return rule

    layer, reference = copy.deepcopy(start), copy.deepcopy(start)
    weights = [next(model.parameters()) for model in (layer, reference, start)]
    rule, single = rule_of(layer, 3, 0.8), rule_of(reference, 1, 0.0)
    average, positions = torch.zeros(4, 5, dtype=torch.float64), []
    for i, g in enumerate(gradients, 1):
        weights[0].grad = g.clone()
        rule.step()
        average = 0.8 * average + 0.2 * g
        if i % 3 == 0:
            weights[1].grad = average / (1 - 0.8**i)
            single.step()
            assert rule.metrics()
        else:
            assert not rule.metrics()
            assert rule.predicted_kl() is None
        positions.append(weights[0].detach().clone())
    torch.testing.assert_close(weights[0], weights[1])
    assert torch.equal(positions[0], weights[2])
    assert torch.equal(positions[3], positions[2])
    with pytest.raises(ValueError, match="every must be 1 or more"):
        SPECS[name](every=0)
