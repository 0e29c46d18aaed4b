"""The optimizers to compare with are torch's, and parameter groups know embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from soul import config
from soul.optim import SGD, AdamW, Muon
from soul.optim.external import ExternalSpec
from soul.optim.groups import embedding_ids, parameter_groups
from soul.registry import OPTIMIZERS


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


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


def test_sgd_is_torchs_with_decoupled_decay() -> None:
    mine, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    ours = SGD([mine], lr=0.1, momentum=0.8, weight_decay=0.5)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.8)
    assert ours.param_groups[0]["fused"] is True
    for step in range(5):
        for p in (mine, theirs):
            p.grad = torch.tensor([0.3 * step, 1.0 - step])
        with torch.no_grad():
            theirs.mul_(1 - 0.1 * 0.5)
        ours.step()
        reference.step()
        assert ours.param_groups[0]["weight_decay"] == 0.5
    torch.testing.assert_close(mine, theirs)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 3))
    twin: Any = copy.deepcopy(model)
    ours = Muon(model.parameters(), lr=0.1, weight_decay=0.2, model=model)
    assert [(g["matrix"], [tuple(p.shape) for p in g["params"]]) for g in ours.param_groups] == [
        (True, [(3, 4)]),
        (False, [(6, 4), (3,)]),
    ]
    matrices = torch.optim.Muon([twin[1].weight], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([twin[0].weight, twin[1].bias], lr=0.1, weight_decay=0.2, fused=True)
    for _ in range(4):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in (ours, matrices, rest):
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_heeds_the_mark_of_embeddings() -> None:
    marked, free = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([{"params": [marked], "embedding": True}, {"params": [free]}])
    assert [(g["matrix"], g["params"]) for g in optimizer.param_groups] == [(False, [marked]), (True, [free])]


def test_any_optimizer_can_be_named() -> None:
    spec = config.component(
        OPTIMIZERS,
        {"name": "external", "path": "torch.optim.RMSprop", "lr": 0.1, "kwargs": {"alpha": 0.5}},
        "",
    )
    mine, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    ours, reference = spec.build([mine]), torch.optim.RMSprop([theirs], lr=0.1, alpha=0.5)
    for step in range(4):
        for p, optimizer in ((mine, ours), (theirs, reference)):
            p.grad = torch.tensor([0.3 * step, 1.0 - step])
            optimizer.step()
    assert torch.equal(mine, theirs)


def test_an_external_optimizer_may_call_the_closure_as_often_as_it_likes() -> None:
    p = parameter(3.0, -2.0)
    optimizer: Any = ExternalSpec(path="torch.optim.LBFGS", lr=1.0).build([p])
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p.square() * torch.tensor([1.0, 9.0])).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    assert len(calls) > 2
    assert calls[-1] < 1e-3 * calls[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "torch.optim.Nadam"}, "torch.optim has no Nadam; give an import path such as torch.optim.NAdam"),
        ({"path": "NAdam"}, "'NAdam' is not a torch.optim.Optimizer"),
        ({"path": "torch.nn.Linear"}, "is not a torch.optim.Optimizer"),
        ({"kwargs": {"lr": 0.1}}, "kwargs must not hold lr"),
        ({"kwargs": {"alpha": 0.1}}, "torch.optim.NAdam takes no alpha"),
        ({"path": "torch.optim.LBFGS", "weight_decay": 0.1}, "torch.optim.LBFGS takes no weight_decay"),
    ],
)
def test_a_wrong_name_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExternalSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "no_such_package.Thing"}, "cannot be imported"),
        ({"path": "accelerate.optimizer.AcceleratedOptimizer", "kwargs": {"beta": 1}}, "takes no lr"),
    ],
)
def test_what_is_not_torchs_own_is_asked_for_when_it_is_used(settings: dict[str, Any], message: str) -> None:
    spec = ExternalSpec(**settings)
    with pytest.raises(ValueError, match=message):
        spec.build([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        _ = spec.needs_closure


def test_parameter_groups_of_a_language_model(make_model: Any) -> None:
    model = make_model()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i] for i in embedding_ids(model)} == {"model.embed_tokens.weight", "lm_head.weight"}
    decayed = [name for name in names.values() if "norm" not in name and "lm_head" not in name]
    groups = parameter_groups(model, 0.1, decayed)
    shown = [(g["weight_decay"], g["embedding"], {names[id(p)] for p in g["params"]}) for g in groups]
    assert [(decay, embedding) for decay, embedding, _ in shown] == [
        (0.1, False),
        (0.1, True),
        (0.0, False),
        (0.0, True),
    ]
    assert shown[1][2] == {"model.embed_tokens.weight"}
    assert shown[3][2] == {"lm_head.weight"}
    assert all("norm" in name for name in shown[2][2])
    assert sum(len(g["params"]) for g in groups) == len(names) - 1
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        parameter_groups(model, 0.1, [])
