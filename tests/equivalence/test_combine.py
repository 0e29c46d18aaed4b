"""Two optimizer states, one for what to forget and one for what to keep, against an explicit loop of two optimizers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, get_scheduler

from soul import config
from soul.combine import DualRule, make_combination
from soul.contest.matrix import matrix_from_tree
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec

NAMES = OPTIMIZERS.names()
LR = 1e-3


class KilledError(Exception):
    """Stands for a lost machine."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture
def make_trainer(tokenizer, make_model, forget_set, retain_set, refusals):
    def make(folder, optimizer, *, objective="grad_diff", dtype=torch.float32, callbacks=(), log=None, **settings):
        training = TrainingSpec(precision="float32", **{"combine": "dual", **settings})
        loss = config.component(OBJECTIVES, objective, "")
        trainer = UnlearnTrainer(
            make_model(0, dtype),
            training.arguments(folder),
            dataset=make_dataset(tokenizer, forget_set, retain_set, loss, training, refusals),
            objective=loss,
            optimizer=config.component(OPTIMIZERS, optimizer, ""),
            training=training,
            callbacks=[*([log] if log else []), *callbacks],
        )
        if log:
            log.trainer = trainer
        return trainer

    return make


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (1, 4)])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_equals_an_explicit_loop_of_two_optimizers(
    tmp_path, make_trainer, make_model, size, accumulation, max_grad_norm
):
    """AdamW of torch, twice, its gradients from two backward passes, each clipped by itself; six steps in float64."""
    trainer = make_trainer(
        tmp_path, {"name": "adamw", "lr": LR, "betas": [0.8, 0.9], "weight_decay": 0.1}, dtype=torch.float64,
        batch_size=size, accumulation=accumulation, epochs=3, warmup=0.2, max_grad_norm=max_grad_norm, retain_lr=0.5,
    )  # fmt: skip
    model = make_model(0, torch.float64)
    decayed = trainer.get_decay_parameter_names(model)
    optimizers = []
    for ratio in (1.0, 0.5):
        groups = [
            {"params": [p for n, p in model.named_parameters() if (n in decayed) == decay], "weight_decay": wd}
            for decay, wd in ((True, 0.1), (False, 0.0))
        ]
        optimizers.append(torch.optim.AdamW(groups, lr=LR * ratio, betas=(0.8, 0.9)))
    schedules = [get_scheduler("linear", o, num_warmup_steps=2, num_training_steps=6) for o in optimizers]
    params = list(model.parameters())
    sampler = trainer.get_train_dataloader().batch_sampler
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        for start in range(0, len(batches), accumulation):
            keys = [key for batch in batches[start : start + accumulation] for key in batch]
            terms = trainer.objective(
                model, trainer.data_collator([trainer.unlearn_data[k] for k in keys]), trainer.reference
            ).terms
            losses = [terms[name].weight * terms[name].total / terms[name].count for name in ("forget", "retain")]
            gradients = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
            for optimizer, schedule, found in zip(optimizers, schedules, gradients, strict=True):
                for p, g in zip(params, found, strict=True):
                    p.grad = g.clone()
                if max_grad_norm:
                    assert nn.utils.clip_grad_norm_(params, max_grad_norm) > max_grad_norm
                optimizer.step()
                schedule.step()
    trainer.train()
    assert trainer.state.global_step == 6
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name).detach(), p.detach(), rtol=0, atol=1e-9)


def test_momentum_does_not_mix_and_the_sum_would(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, {"name": "sgd", "lr": LR, "momentum": 0.9}, batch_size=4, epochs=2)
    trainer.train()
    rule = trainer.update_rule
    assert isinstance(rule, DualRule)
    forget, retain = [
        torch.cat([r.state[p]["momentum_buffer"].flatten() for p in trainer.model.parameters()])
        for r in (rule.forget, rule.retain)
    ]
    assert not torch.allclose(forget, retain)
    assert rule.param_groups[0]["lr"] == rule.forget.param_groups[0]["lr"]


SLOW_START = {"sophia": {"curvature": {"interval": 2}}, "external": {"path": "torch.optim.NAdam"}}


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_of_any_rule_ends_where_it_would_have(tmp_path, make_trainer, name):
    """Both states are in the checkpoint, and whatever curvature both were told."""
    tree = {"name": name, "lr": LR, **SLOW_START.get(name, {})}
    settings = {"batch_size": 4, "epochs": 1, "save_steps": 1}
    logs = [LogCallback(tmp_path / f"{which}.jsonl") for which in ("whole", "cut", "cut")]
    whole = make_trainer(tmp_path / "whole", tree, log=logs[0], **settings)
    whole.train()
    killed = make_trainer(tmp_path / "cut", tree, callbacks=[KillAt(2)], log=logs[1], **settings)
    with pytest.raises(KilledError):
        killed.train()
    resumed = make_trainer(tmp_path / "cut", tree, log=logs[2], **settings)
    start = weights(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    expected = weights(whole.model)
    assert all(torch.equal(v, expected[k]) for k, v in weights(resumed.model).items())
    assert any(not torch.equal(v, start[k]) for k, v in expected.items())
    assert all(torch.isfinite(v).all() for v in expected.values())
    lines = [[json.loads(x) for x in (tmp_path / f).read_text().splitlines()] for f in ("whole.jsonl", "cut.jsonl")]
    timed = ("seconds", "curvature_seconds")
    assert [{k: v for k, v in x.items() if k not in timed} for x in lines[0]] == [
        {k: v for k, v in x.items() if k not in timed} for x in lines[1]
    ]


def test_a_retain_term_of_no_weight_takes_no_step(tmp_path, make_trainer, make_model):
    """As where its weight rises from nothing: the retain rule must not step on the forget gradient."""
    silent, tree = {"name": "grad_diff", "retain_weight": 0.0}, {"name": "sgd", "lr": LR, "momentum": 0.0}
    settings = {"batch_size": 8, "epochs": 1, "warmup": 0.0, "schedule": "constant"}
    trainer = make_trainer(tmp_path / "dual", tree, objective=silent, **settings)
    trainer.train()
    alone = make_trainer(tmp_path / "alone", tree, objective=silent, combine="sum", **settings)
    alone.train()
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value)
    assert any(not torch.equal(v, make_model(0).state_dict()[k]) for k, v in weights(alone.model).items())


def test_what_cannot_step_twice_is_refused(tmp_path, make_trainer):
    class Again(type(config.component(OPTIMIZERS, "sgd", ""))):
        needs_closure = True

    rule = Again()
    with pytest.raises(ValueError, match=r"asks for one loss again and again"):
        make_combination("dual", "npo", rule)
    with pytest.raises(ValueError, match="use one process"):
        make_combination("dual", "npo", config.component(OPTIMIZERS, "sgd", ""), processes=2)
    with pytest.raises(ValueError, match="needs a retain term, and ga as set has none"):
        make_trainer(tmp_path, {"name": "adamw"}, objective="ga", batch_size=4, epochs=1).train()
    with pytest.raises(ValueError, match="has nothing to forget"):
        make_trainer(tmp_path, {"name": "adamw"}, objective="ft", batch_size=4, epochs=1).train()


def test_older_recipes_and_contests_are_understood():
    assert config.parse(TrainingSpec, {"projected": True}, "training").combine == "projected"
    assert config.parse(TrainingSpec, {"projected": False, "epochs": 2}, "training") == TrainingSpec(epochs=2)
    task = {n: n for n in ("model", "gold", "forget", "retain", "seen", "unseen", "text")}
    tree = {
        "tasks": {"t": task | {"tune": ["a"], "report": ["b"]}},
        "objectives": ["npo"],
        "optimizers": [{"name": "adamw", "projected": True}],
        "training": {"max_steps": 3, "projected": False},
    }
    matrix = matrix_from_tree(tree)
    assert matrix.optimizers[0].projected
    assert matrix.training.combine == "sum"
    with pytest.raises(ValueError, match="combine"):
        config.parse(TrainingSpec, {"combine": "both"}, "training")
    with pytest.raises(ValueError, match="retain_lr must be above 0"):
        config.parse(TrainingSpec, {"retain_lr": 0}, "training")


def test_settings_that_do_not_go_together_or_are_misread_are_refused():
    with pytest.raises(ValueError, match="combine=dual makes two"):
        TrainingSpec(combine="dual", trust_kl=0.1)
    with pytest.raises(ValueError, match=r"training\.projected must be true or false"):
        TrainingSpec.upgraded({"projected": "yes"})
    assert TrainingSpec.upgraded({"projected": True}) == {"combine": "projected"}


def test_the_retain_rule_knows_the_peak_of_the_schedule():
    """By which rules see whether a step is of the full learning rate, and worth looking at for what rounding drops."""
    p = torch.nn.Parameter(torch.zeros(1))
    rule = DualRule(*(OPTIMIZERS.get("sgd")(lr=1.0).build([p]) for _ in range(2)), ratio=0.5)
    torch.optim.lr_scheduler.LambdaLR(rule, lambda step: (step + 1) / 10)
    p.grad, rule.retain_gradients = torch.ones(1), {p: torch.ones(1)}
    rule.step()
    (group,) = rule.retain.param_groups
    assert (group["lr"], group["initial_lr"]) == (pytest.approx(0.05), 0.5)
