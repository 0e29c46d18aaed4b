"""What Kronecker rules make of refreshes over time, and what they leave to the next run."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from soul.adapters import AdapterSpec, add_adapter
from soul.curvature.ihvp import INVERSES, InverseSpec
from soul.curvature.inverses import EigenInverse, KroneckerInverse
from soul.curvature.kronecker import LARGEST, KroneckerFactors
from soul.curvature.passes import CurvaturePasses
from soul.curvature.products import GaussNewton, micro_batches
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.optim.ekfac import EKFACSpec
from soul.optim.kronecker import KroneckerRule
from soul.registry import OPTIMIZERS


@pytest.fixture
def passes(tokenizer: Any, retain_set: Any) -> Callable[..., CurvaturePasses]:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set)]
    return lambda spec: CurvaturePasses(spec, rows)


@pytest.mark.parametrize(("batch", "count"), [(10, 1), (5, 2), (2, 5)])
def test_moments_are_those_of_a_whole_refresh(passes: Any, make_model: Any, batch: int, count: int) -> None:
    """A rotation keeps the sum of squares, so the moments of a layer sum to the diagonal estimate of its weight."""
    spec = CurvatureSpec(batch=batch, micro_batches=count, interval=1, cache=False)
    model = make_model()
    rule = EKFACSpec(curvature=spec, decay=0.0).build(model.parameters(), model)
    source = passes(spec)
    source.refresh(model, rule, 0)
    source.refresh(model, rule, 1)
    diagonal = source.estimate(model, rule, source.plan(1))  # the same picks and noise once more
    assert diagonal is not None
    for name, layer in rule.factors.layers.items():
        assert isinstance(rule.preconditioner, EigenInverse)
        total = float(rule.preconditioner.moments[name].sum())
        assert total == pytest.approx(float(diagonal[layer.weight].sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "whiten"])
def test_a_warm_start_weighs_as_many_refreshes_as_it_is_worth(passes: Any, make_model: Any, name: str) -> None:
    spec = CurvatureSpec(batch=4, warm_start=9, micro_batches=2, interval=1, cache=False)
    model = make_model()
    source = passes(spec)

    def known(decay: float) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what a rule knows after the warm start and after one more refresh."""
        rule = OPTIMIZERS.get(name)(curvature=spec, decay=decay).build(model.parameters(), model)
        for step in range(2):
            source.refresh(model, rule, step)
            for layer in rule.factors.layers if name == "ekfac" else ():
                rule.preconditioner.basis(layer)
            yield {key: value.clone() for key, value in rule.curvature_state().items() if value.is_floating_point()}

    (warm, both), (_, new) = known(0.9), known(0.0)
    share = (1 - 0.9) / (1 - 0.9**5)  # the fifth, after a warm start worth four
    for key, value in both.items():
        torch.testing.assert_close(value, warm[key].lerp(new[key], share), rtol=1e-4, atol=1e-7)
    assert ("moments" in {key.rpartition(".")[2] for key in both}) == (name == "ekfac")


def test_states_of_older_runs_load(passes: Any, make_model: Any) -> None:
    """They kept K-FAC's moments beside the corrected ones, and the number of corrections."""
    model = make_model()
    rule = EKFACSpec().build(model.parameters(), model)
    passes(CurvatureSpec(interval=1, cache=False)).refresh(model, rule, 0)
    inverse = rule.preconditioner
    assert isinstance(inverse, EigenInverse)
    for name in rule.factors.layers:
        inverse.basis(name)
    state = inverse.state()
    old = {key.replace(".moments", ".kfac"): value for key, value in state.items()}
    inverse.load_state(old)
    assert inverse.state().keys() == state.keys()
    corrected = {key: value + 1 for key, value in state.items() if key.endswith(".moments")}
    counts = {f"{name}.corrections": torch.tensor(2) for name in rule.factors.layers}
    inverse.load_state(old | corrected | counts)
    assert all(torch.equal(inverse.state()[key], value) for key, value in corrected.items())


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_damping_that_waits_for_a_refresh_waits_after_a_resume_too(name: str) -> None:
    def step(layer: nn.Linear, rule: KroneckerRule, seed: int) -> None:
        layer.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        rule.step()

    def begin() -> tuple[nn.Linear, KroneckerRule]:
        layer = nn.Linear(5, 4, bias=False)
        nn.init.ones_(layer.weight)
        model = nn.Sequential(layer)
        return layer, OPTIMIZERS.get(name)(lr=0.1).build(model.parameters(), model)

    layer, rule = begin()
    with rule.observing():
        layer(torch.randn(9, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    rule.update_curvature()
    step(layer, rule, 1)
    rule.feedback(1.0, 10.0)  # far more than predicted
    assert rule.metrics()["damping"] == 0.1
    other, resumed = begin()
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    step(layer, rule, 2)
    step(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    assert resumed.metrics() == rule.metrics()
    state = copy.deepcopy(rule.state_dict())
    del state["kronecker"]["damping_in_use"]  # an older one
    resumed.load_state_dict(state)
    assert resumed.preconditioner.damping == pytest.approx(0.15)
    for either in (rule, resumed):
        with either.observing():
            (layer if either is rule else other)(torch.ones(2, 5)).square().sum().backward()
        either.update_curvature()
        assert either.preconditioner.damping == pytest.approx(0.15)


@pytest.fixture
def adapter(make_model: Any) -> Callable[[], Any]:
    return lambda: add_adapter(make_model(), AdapterSpec(r=3))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def halves_of(rule: KroneckerRule) -> list[tuple[str, str]]:
    halves = sorted(rule.factors.through.items())
    assert len(halves) == 2 * 7
    assert all(".lora_A." in first and ".lora_B." in second for first, second in halves)
    return halves


def test_curvature_of_an_adapter_s_first_half_follows_the_second(passes: Any, adapter: Any) -> None:
    torch.manual_seed(0)
    spec = CurvatureSpec(batch=10, interval=0, cache=False)
    model = adapter()
    rule = OPTIMIZERS.get("kfac")(curvature=spec, damping=0.3).build(trainable(model), model)
    passes(spec).refresh(model, rule, 0)
    gradient = torch.randn(3, 5)
    for first, second in halves_of(rule):
        assert not rule.factors.outputs(first).any()  # B is 0
        layer = rule.factors.layers[second]
        nn.init.normal_(layer.weight, std=0.1)
        g, b = rule.factors.outputs(second), layer.weight.detach()
        torch.testing.assert_close(rule.factors.outputs(first), b.T @ g @ b)
        damped = b.T @ g @ b
        damped += 0.3 * (damped.trace() / 3 + 1.3 * g.trace() / len(g)) * torch.eye(3)
        torch.testing.assert_close(rule.preconditioner._left_of(first) @ gradient, torch.linalg.solve(damped, gradient))  # type: ignore[union-attr]
    # and is what a pass that watches the first half would find
    watching = KroneckerFactors(model)
    watching.through = {}
    own = KroneckerRule(trainable(model), watching, KroneckerInverse(watching, 0.1))
    rule = OPTIMIZERS.get("kfac")(curvature=spec).build(trainable(model), model)
    for each in (own, rule):
        passes(spec).refresh(model, each, 0)
    for first, _ in halves_of(rule):
        torch.testing.assert_close(rule.factors.outputs(first), watching.outputs(first), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_inverses_of_an_adapter_s_first_half_are_those_of_kfac(passes: Any, adapter: Any, name: str) -> None:
    torch.manual_seed(0)
    model = adapter()
    rows = passes(CurvatureSpec()).rows
    for module, p in model.named_parameters():
        if "lora_B" in module:
            nn.init.normal_(p, std=0.1)
    solve: Any = INVERSES[name](model, micro_batches(rows, 0), InverseSpec(damping=0.3))
    assert solve.factors.through
    for first, second in solve.factors.through.items():
        d = torch.randn_like(solve.factors.layers[first].weight, dtype=torch.float64)
        (_, q_a), values = solve.solve._bases[first], solve.solve.moments[first][0]
        a, g = (q_a * values @ q_a.T).double(), solve.factors.outputs(first).double()
        damping = 0.3 * (g.diagonal().mean() + solve.factors.outputs(second).diagonal().mean()) * values.mean()
        expected = torch.linalg.solve(torch.kron(g, a) + damping * torch.eye(d.numel()), d.flatten()).view_as(d)
        torch.testing.assert_close(solve.solve(first, d), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("length", [0.02, 0.3])
def test_both_halves_of_an_adapter_are_moved_in_one_unit(passes: Any, adapter: Any, name: str, length: float) -> None:
    """What a move costs is what it is predicted to, as nearly in one half as in the other, or less while B is short."""
    torch.manual_seed(0)
    spec = CurvatureSpec(batch=10, warm_start=4, interval=1, cache=False)
    model = adapter()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)  # so that curvature is small, and no unit is right by chance
    rule = OPTIMIZERS.get(name)(curvature=spec).build(trainable(model), model)
    source = passes(spec)
    source.refresh(model, rule, 0)
    for _, second in halves_of(rule):
        weight = rule.factors.layers[second].weight
        nn.init.normal_(weight, std=length / len(weight) ** 0.5)
    exact = GaussNewton(model, micro_batches(source.rows, 0))
    forward_answers(model, collate_rows(source.rows)).token_logps().mean().backward()
    found = {}
    for half in ("lora_A", "lora_B"):
        gradients = {n: layer.weight.grad for n, layer in rule.factors.layers.items() if half in n}
        moves = {n: rule.preconditioner(n, g) for n, g in gradients.items()}  # type: ignore[arg-type]
        predicted = sum(float((moves[n] * g).sum()) for n, g in gradients.items())  # type: ignore[operator]
        found[half] = exact.quadratic({f"{n}.weight": move for n, move in moves.items()}) / predicted
    assert 0.3 < found["lora_B"] < 10
    assert (0.2 * found["lora_B"] if length > 0.1 else 0) < found["lora_A"] < 3 * found["lora_B"]


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_states_that_hold_curvature_of_first_halves_load(passes: Any, adapter: Any, name: str) -> None:
    spec = CurvatureSpec(batch=10, interval=1, cache=False)
    model = adapter()
    rule, again = (OPTIMIZERS.get(name)(curvature=spec).build(trainable(model), model) for _ in range(2))
    passes(spec).refresh(model, rule, 0)
    state = rule.curvature_state()
    assert not any(f"factor.{first}.outputs" in state for first, _ in halves_of(rule))
    again.load_curvature_state(state | {f"factor.{first}.outputs": torch.zeros(3, 3) for first in rule.factors.through})
    assert again.curvature_state().keys() == state.keys()
    for first, second in halves_of(rule):
        nn.init.ones_(rule.factors.layers[second].weight)
        gradient = torch.randn_like(rule.factors.layers[first].weight)
        assert torch.equal(again.preconditioner(first, gradient), rule.preconditioner(first, gradient))


def pair(inputs: int, outputs: int) -> nn.ModuleDict:
    sizes = {"lora_A": (inputs, 2), "lora_B": (2, outputs)}
    return nn.ModuleDict({half: nn.ModuleDict({"default": nn.Linear(*io, bias=False)}) for half, io in sizes.items()})


class Experts(nn.Module):
    """Three of them in one tensor, as transformers keeps them, and a layer of all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(3, 6, 5))
        self.norm, self.layer = nn.LayerNorm(2, bias=False), nn.Linear(4, 3, bias=False)


WIDE = LARGEST + 1
MODELS: dict[str, Callable[[], nn.Module]] = {
    "whole": lambda: nn.Sequential(*(nn.Linear(*io, bias=False) for io in ((4, 3), (3, WIDE), (WIDE, 2)))),
    "experts": lambda: Experts(),
    "lora": lambda: nn.ModuleDict({"q": pair(4, 4), "up": pair(4, WIDE), "down": pair(WIDE, 4)}),
}


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (
            "kfac",
            "whole",
            r"kfac: 100\.0 % of .*: 2 of 3 linear layers \(the first is 1\) are wider than 16384\. To move",
        ),
        ("ekfac", "whole", r"ekfac: .* raise optimizer\.max_dim, or set optimizer\.others to diagonal, or use lion"),
        ("whiten", "whole", r"whiten: 40\.0 % .* 1 of 3 .*first is 2\) .* raise optimizer\.max_dim, or use lion"),
        ("kfac", "lora", r"2 of 6 .*first is up\.lora_B\.default\) .*LoRA pairs among them, .* moves alone: 2\)"),
        ("whiten", "lora", r"1 of 6 .*first is down\.lora_A\.default\) .*LoRA pairs among them, .* moves alone: 1\)"),
        (
            "kfac",
            "experts",
            r"kfac: 86\.5 % of 104 .*: 1 tensors \(the first is experts\) are no .* set optimizer\.others to diag",
        ),
        ("whiten", "experts", r"whiten: 86\.5 % .* stay as they are: 1 tensors .* To move them, use lion or adamw$"),
    ],
)
def test_layers_too_wide_for_factors_are_told_once(name: str, kind: str, said: str, caplog: Any) -> None:
    model = MODELS[kind]()
    OPTIMIZERS.get(name)().build(model.parameters(), model)
    (message,) = caplog.messages
    assert re.search(said, message)
    caplog.clear()
    if name != "whiten":  # which knows no diagonal
        OPTIMIZERS.get(name)(others="diagonal").build(model.parameters(), model)
    narrow = nn.Sequential(nn.Linear(4, 3))
    OPTIMIZERS.get(name)().build(narrow.parameters(), narrow)
    assert not caplog.messages
    OPTIMIZERS.get(name)().prepare(model)
    assert len(caplog.messages) == 1
    left = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert left
    OPTIMIZERS.get(name)().build(trainable(model), model)  # which finds nothing more to tell of
    assert len(caplog.messages) == 1
    assert left == {n for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", ["kfac", "ekfac", "whiten"])
def test_the_widest_factor_is_a_setting(name: str, caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 9, bias=False))
    spec = OPTIMIZERS.get(name)(max_dim=4)
    assert set(spec.build(model.parameters(), model).factors.layers) == ({"0", "1"} if name == "whiten" else {"0"})
    assert ("wider than 4" in caplog.text) == (name != "whiten")
    params = list(model.parameters())
    assert spec.cost(params, model).whole <= OPTIMIZERS.get(name)().cost(params, model).whole
    assert spec.curvature_settings() != OPTIMIZERS.get(name)().curvature_settings()
    with pytest.raises(ValueError, match="max_dim must be 1 or more, not 0"):
        OPTIMIZERS.get(name)(max_dim=0)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "whiten"])
@pytest.mark.parametrize("estimator", ["objective_squared", "hutchinson", "squared_gradient"])
def test_estimators_whose_passes_show_no_layer_are_refused_at_once(name: str, estimator: Any) -> None:
    fit = "choose one of ggn, gnb, empirical$"
    with pytest.raises(ValueError, match=f"{name} watches the model's layers .*estimator {estimator} .*{fit}"):
        OPTIMIZERS.get(name)(curvature=CurvatureSpec(estimator=estimator, interval=1))


@pytest.mark.parametrize(
    ("name", "interval", "said"),
    [
        ("kfac", 2, "set curvature.interval to 0 for kfac"),
        ("ekfac", 2, "shuffled does not know ekfac: .* use kfac"),
        ("ekfac", 0, "shuffled does not know ekfac: .* use kfac"),
    ],
)
def test_factors_that_cannot_be_turned_are_refused_at_once(name: str, interval: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OPTIMIZERS.get(name)(curvature=CurvatureSpec(shuffled=True, interval=interval))


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, True), (torch.float32, False)])
def test_moves_that_rounding_drops_are_told_once(dtype: torch.dtype, lost: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    model = nn.Sequential(layer)
    rule = OPTIMIZERS.get("kfac")(lr=1e-3).build(model.parameters(), model)
    with rule.observing():
        model(torch.randn(128, 64, dtype=dtype)).square().sum().backward()
    rule.update_curvature()
    before = layer.weight.detach().clone()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rule.step()
        rule.step()
    assert ["weights: only" in str(w.message) for w in told] == [True] * lost
    assert all("stochastic" not in str(w.message) for w in told)  # which the rule does not know
    assert (float(torch.ne(layer.weight, before).float().mean()) < 0.5) is lost
