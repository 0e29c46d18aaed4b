"""The trust region: no step costs more KL than its budget, and a budget that never binds changes nothing."""

from __future__ import annotations

import pytest
import torch

from soul import config
from soul.forward import forward_answers
from soul.objectives.base import kl_to_reference
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.trust_region import _move

RULES = [{"name": "signum", "lr": 0.02}, {"name": "kfac", "lr": 0.5, "curvature": {"interval": 2}}]


@pytest.fixture
def run(tmp_path, tokenizer, make_model, forget_set, retain_set, refusals):
    def do(optimizer, dtype=torch.float32, **settings):
        settings = {"precision": "float32", **settings}
        training = TrainingSpec(batch_size=4, max_steps=4, save_steps=0, warmup=0.0, **settings)
        loss = OBJECTIVES.get("grad_diff")()
        log = LogCallback(None)
        trainer = UnlearnTrainer(
            make_model(0, dtype),
            training.arguments(tmp_path),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, refusals),
            objective=loss,
            optimizer=config.component(OPTIMIZERS, optimizer, "adamw"),
            training=training,
            callbacks=[log],
        )
        log.trainer = trainer
        trainer.train()
        return trainer, log.records

    return do


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["name"])
def test_no_step_costs_more_than_the_budget(run, make_model, rule):
    trainer, records = run(rule, trust_kl=0.002, trust_batch=100)
    assert all(r["step_kl"] <= 0.002 for r in records)
    assert any(r["proposed_kl"] > 0.002 and 0 < r["step_scale"] < 1 for r in records)
    # sqrt(KL) is a distance to second order, so the steps together bound the way from the first model
    batch = trainer.trust._batch
    model = make_model(0)
    with torch.no_grad():
        before, after = forward_answers(model, batch), forward_answers(trainer.model, batch)
    total = float(kl_to_reference(after, before.logits_NV)) / len(before.logits_NV)
    assert 0 < total <= 1.5 * sum(r["step_kl"] ** 0.5 for r in records) ** 2


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["name"])
def test_a_wide_budget_changes_nothing(run, rule):
    free, _ = run(rule)
    bounded, records = run(rule, trust_kl=1e6)
    assert all(r["step_scale"] == 1.0 for r in records)
    same = [torch.equal(a, b) for a, b in zip(free.model.parameters(), bounded.model.parameters(), strict=True)]
    assert all(same) or rule["name"] == "kfac"  # whose damping heard what its steps cost


def test_a_step_that_never_fits_is_taken_back_and_told_of_once(run, make_model, caplog):
    trainer, records = run({"name": "signum", "lr": 1e30}, trust_kl=1e-3)  # the model would be lost
    assert all(r["step_scale"] == 0.0 for r in records)
    (said,) = [message for message in caplog.messages if "trust_kl" in message]
    assert "trust_kl=0.001: step 1 cost" in said
    for a, b in zip(trainer.model.parameters(), make_model(0).parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_measured_under_autocast_is_the_step_and_no_rounding(run):
    _, records = run({"name": "adamw", "lr": 1e-5}, trust_kl=1e-6, trust_batch=100, precision="bfloat16")
    assert all(r["step_scale"] == 1.0 and 0 < r["step_kl"] <= 1e-6 for r in records)  # rounded, 5e-5


def test_budgets_that_drown_in_rounding_are_refused(run):
    with pytest.raises(ValueError, match=r"trust_kl=0\.001 is less than rounding .* set it to 0\.002 or more"):
        run({"name": "adamw"}, torch.bfloat16, trust_kl=1e-3)
    _, records = run({"name": "adamw"}, torch.bfloat16, trust_kl=2e-3)
    assert all(r["step_scale"] == 1.0 for r in records)


def test_a_shortened_step_keeps_its_mean_in_bf16():
    old = torch.full((100, 100), 1.0, dtype=torch.bfloat16)
    after = []
    for key in (1, 1, 2):
        p = old.clone().T  # not in the order of its memory
        _move(p, torch.full_like(p, 2**-7), 0.3, key)  # to the next number
        after.append(p)
    first, again, other = after
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(float((first > 1).float().mean()) - 0.3) < 0.02


def test_levenberg_follows_what_steps_cost(run):
    _, records = run({"name": "kfac", "lr": 1.0, "curvature": {"interval": 1}}, trust_kl=1e-3)
    assert len({r["damping"] for r in records}) > 1


def test_settings():
    with pytest.raises(ValueError, match="trust_kl"):
        TrainingSpec(trust_kl=-1.0)
    with pytest.raises(ValueError, match="trust_batch"):
        TrainingSpec(trust_batch=0)
