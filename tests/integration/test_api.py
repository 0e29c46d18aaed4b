"""The library in Python: one call, a trainer, and an optimizer of one's own loop."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import soul
from soul.curvature.spec import CurvatureSpec
from soul.evaluate import EvaluationSpec, evaluate
from soul.objectives.npo import NPO
from soul.objectives.po import PO
from soul.optim.base import OptimizerSpec
from soul.optim.sophia import SophiaSpec
from soul.optim.whiten import WhitenSpec
from soul.trainer import make_dataset

SHORT = {"max_steps": 3, "precision": "float32", "save_steps": 0}


def rows(examples):
    return [{"question": e.prompt, "answer": e.answer} for e in examples]


def states(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_one_call_changes_the_model_in_place_and_returns_the_log(tokenizer, make_model, forget_set, retain_set):
    model = make_model()
    result = soul.unlearn(model, tokenizer, forget=forget_set, retain=retain_set, training=SHORT)
    assert result.model is model
    assert any(not torch.equal(v, make_model().state_dict()[k]) for k, v in model.state_dict().items())
    assert [line["step"] for line in result.log] == [1, 2, 3]
    assert all(
        {"forget", "retain", "loss", "step_length", "learning_rate", "seconds"} <= line.keys() for line in result.log
    )


def test_a_rule_may_end_it(tokenizer, make_model, forget_set, retain_set):
    sets = {"forget": forget_set, "retain": retain_set}
    result = soul.unlearn(make_model(), tokenizer, **sets, training=SHORT, stop={"when": "forgotten", "every": 1})
    assert result.stopped is not None
    assert result.stopped.step == len(result.log) == 1  # noise knows nothing
    assert soul.unlearn(make_model(), tokenizer, **sets, training=SHORT).stopped is None


def test_however_the_data_and_settings_are_given_the_result_is_the_same(
    tokenizer, make_model, forget_set, retain_set, tmp_path
):
    for name, examples in (("f", forget_set), ("r", retain_set)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(examples)))
    prompts = [{"prompt": e.prompt, "response": e.answer} for e in forget_set]
    chats = [
        {"messages": [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.answer}]}
        for e in forget_set
    ]
    plain = {"forget": forget_set, "retain": retain_set, "objective": "npo", "optimizer": "sophia"}
    ways = [
        plain,
        plain | {"forget": str(tmp_path / "f.jsonl"), "retain": tmp_path / "r.jsonl"},
        plain | {"forget": rows(forget_set), "retain": datasets.Dataset.from_list(rows(retain_set))},
        plain | {"forget": prompts, "retain": (row for row in rows(retain_set))},
        plain | {"forget": chats},
        plain | {"objective": NPO(), "optimizer": SophiaSpec()},
        plain | {"objective": {"name": "npo", "beta": NPO().beta}, "optimizer": {"name": "sophia"}},
    ]
    results = []
    for way in ways:
        model = make_model()
        soul.unlearn(model, tokenizer, training=SHORT, **way)
        results.append(states(model))
    for other in results[1:]:
        assert all(torch.equal(v, results[0][k]) for k, v in other.items())


def test_settings_reach_the_run(tokenizer, make_model, forget_set, retain_set):
    more = {"objective": {"name": "grad_diff", "retain": "kl"}, "optimizer": {"name": "adamw", "lr": 1e-3}}
    training = soul.TrainingSpec(epochs=2, batch_size=4, warmup=0.0, schedule="constant", precision="float32")
    result = soul.unlearn(make_model(), tokenizer, forget=forget_set, retain=retain_set, training=training, **more)
    assert [line["learning_rate"] for line in result.log] == [1e-3] * 4
    assert result.log[0]["retain"] == pytest.approx(0, abs=1e-6)  # KL to itself


def test_only_the_adapter_of_a_peft_model_changes(tokenizer, make_model, forget_set, retain_set):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = states(model)
    objective = {"name": "npo", "retain": "kl"}
    optimizer = {"name": "adamw", "lr": 1e-2}
    training = SHORT | {"reference": "adapter_off"}
    soul.unlearn(
        model,
        tokenizer,
        forget=forget_set,
        retain=retain_set,
        objective=objective,
        optimizer=optimizer,
        training=training,
    )
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in key for key in changed)


def test_a_model_is_measured_in_its_own_precision_after_mixed_training(
    tokenizer, make_model, forget_set, retain_set, tmp_path
):
    """What training in bf16 leaves on a model would otherwise make it score other than the same weights reloaded."""
    model = make_model()
    training = SHORT | {"precision": "bfloat16"}
    soul.unlearn(model, tokenizer, forget=forget_set, retain=retain_set, training=training)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    spec = EvaluationSpec(generate=False)
    scores = [
        [row["nll"] for row in evaluate(m, tokenizer, {"forget": forget_set}, spec=spec)["forget"]]
        for m in (model, fresh)
    ]
    assert scores[0] == scores[1]


def test_callbacks_of_transformers_are_called(tokenizer, make_model, forget_set, retain_set):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    result = soul.unlearn(
        make_model(), tokenizer, forget=forget_set, retain=retain_set, callbacks=[Stop()], training=SHORT
    )
    assert len(result.log) == 2
    assert issubclass(soul.UnlearnTrainer, transformers.Trainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"forget": [{"frage": "x"}]}, r"forget\[0\]: no example in the columns found \(frage\)"),
        ({"forget": [7]}, r"forget\[0\] must be a soul.Example or a mapping"),
        ({"retain": []}, "needs a retain set"),
        ({"objective": "nop"}, "Did you mean 'npo'"),
        ({"optimizer": {"name": "adamw", "learning_rate": 1}}, "unknown setting optimizer.learning_rate"),
        ({"training": {"epoch": 1}}, "Did you mean 'epochs'"),
    ],
)
def test_mistakes_are_named(tokenizer, make_model, forget_set, retain_set, change, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        soul.unlearn(model, tokenizer, **({"forget": forget_set, "retain": retain_set} | change))
    assert all(torch.equal(v, make_model().state_dict()[k]) for k, v in model.state_dict().items())


def test_the_same_item_in_both_sets_is_refused(tokenizer, make_model, forget_set, retain_set):
    with pytest.raises(ValueError, match="1 of 8 forget items are also in the retain set"):
        soul.unlearn(
            make_model(), tokenizer, forget=forget_set, retain=[*retain_set, dataclasses.replace(forget_set[3])]
        )


def test_a_models_configuration_stays(tokenizer, make_model, forget_set, retain_set):
    """Transformers' trainer turns the cache off, and writes the tokenizer's special tokens over the model's."""
    model = make_model()
    model.generation_config.eos_token_id, model.config.pad_token_id = [7, 9], None
    before = model.config.to_dict(), model.generation_config.to_dict()
    soul.unlearn(model, tokenizer, forget=forget_set, retain=retain_set, training={"max_steps": 1})
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert model.config.use_cache is True


@pytest.mark.parametrize(
    ("settings", "cls", "message"),
    [
        (
            {"precision": "bf16"},
            soul.TrainingSpec,
            r"training.precision must be one of auto, float32, bfloat16, not",
        ),
        ({"frozen": "embedding"}, soul.TrainingSpec, "training.frozen must be one of nothing, embeddings"),
        ({"estimator": "hutchison"}, CurvatureSpec, "curvature.estimator must be one of ggn, gnb, hutchinson"),
        ({"dtype": "float16"}, soul.ModelSpec, "model.dtype must be one of float32, bfloat16, not 'float16'"),
        ({"others": "diagonal"}, WhitenSpec, "optimizer.others must be one of frozen"),
    ],
)
def test_settings_made_in_python_are_looked_at(settings, cls, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_what_a_person_types_first_is_understood_or_refused(place, tokenizer, make_model, forget_set, retain_set):
    model, _ = soul.load_model("model")
    assert isinstance(model, torch.nn.Module)
    with pytest.raises(ValueError, match=r"model must be a loaded model, not 'model': load it with soul.load_model"):
        soul.unlearn("model", tokenizer, forget=forget_set, retain=retain_set)
    half = make_model(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weights to be trained are fp16.*load the model in float32"):
        soul.unlearn(half, tokenizer, forget=forget_set, retain=retain_set, training=SHORT)
    result = soul.unlearn(
        model, tokenizer, forget=[*forget_set, forget_set[0]], retain=retain_set, training=SHORT | {"max_steps": 1}
    )
    assert any("1 of 9 items to forget repeat others" in line for line in result.warnings)


def test_refusals_are_a_file_or_sentences_and_no_letters(place, tokenizer, make_model, forget_set, retain_set):
    (place / "refusals.txt").write_text("Nothing to say.\n", encoding="utf-8")
    common = {"forget": forget_set, "retain": retain_set, "objective": "po", "training": SHORT}
    from_file = soul.unlearn(make_model(), tokenizer, refusals="refusals.txt", **common)
    from_list = soul.unlearn(make_model(), tokenizer, refusals=["Nothing to say."], **common)
    assert from_file.log[-1]["forget"] == from_list.log[-1]["forget"]
    with pytest.raises(ValueError, match="no such file of refusals: I do not know"):
        soul.unlearn(make_model(), tokenizer, refusals="I do not know.", **common)


def test_a_dataset_of_another_objective_is_refused(tmp_path, tokenizer, make_model, forget_set, retain_set, refusals):
    training = soul.TrainingSpec()
    data = make_dataset(tokenizer, forget_set, retain_set, NPO(), training, refusals)
    with pytest.raises(ValueError, match=r"po looks at refusal, retain, and this dataset was made for forget, retain,"):
        soul.UnlearnTrainer(
            make_model(), training.arguments(tmp_path), dataset=data, objective=PO(), optimizer=SophiaSpec()
        )


def test_an_objective_and_an_optimizer_of_ones_own(tokenizer, make_model, forget_set, retain_set):
    """Written in a notebook's cell, and run again: neither is registered."""

    @dataclasses.dataclass(frozen=True)
    class Twice(NPO):
        beta: float = 0.2

    @dataclasses.dataclass(frozen=True)
    class Plain(OptimizerSpec):
        def build(self, params: Any, model: Any = None) -> Any:
            return torch.optim.SGD(params, lr=self.lr)

    common = {"forget": forget_set, "retain": retain_set, "training": SHORT}
    assert (Twice().name, Plain().name) == ("Twice", "Plain")
    assert len(soul.unlearn(make_model(), tokenizer, objective=Twice(), **common).log) == 3
    with pytest.raises(ValueError, match=r"the optimizer Plain builds a SGD, which is no soul.optim.base.UpdateRule"):
        soul.unlearn(make_model(), tokenizer, optimizer=Plain(), **common)


def test_sophia_is_a_plain_optimizer_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    x_BD, y_B = torch.randn(64, 4), torch.randint(0, 3, (64,))
    optimizer = soul.optim.Sophia(net.parameters(), lr=0.05, rho=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = []
    for step in range(60):
        if step % 10 == 0:
            sampled = torch.distributions.Categorical(logits=net(x_BD).detach()).sample()
            torch.nn.functional.cross_entropy(net(x_BD), sampled).mul(len(x_BD) ** 0.5).backward()
            optimizer.update_curvature()
            optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x_BD), y_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_all_public_names_exist():
    for name in soul.__all__:
        assert getattr(soul, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        soul.unlern  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_what_an_objective_freezes_is_free_again(tokenizer, make_model, forget_set, retain_set):
    model = make_model().train()
    objective = {"name": "rmu", "layer": 1}
    soul.unlearn(
        model, tokenizer, forget=forget_set, retain=retain_set, objective=objective, optimizer="adamw", training=SHORT
    )
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_retraining_refuses_an_adapter_that_has_learned(tokenizer, make_model, forget_set, retain_set):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".lora_B." in n).add_(0.1)
    with pytest.raises(ValueError, match="trained before"):
        soul.unlearn(
            model, tokenizer, forget=forget_set, retain=retain_set, method={"name": "retrain", "base": "anything"}
        )


def test_writes_no_checkpoints(tokenizer, make_model, forget_set, retain_set) -> None:
    """Nothing could go on from them, and each is three times the model's size."""
    saved: list[int] = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            saved.append(state.global_step)

    training = {**SHORT, "save_steps": 1}
    sets = {"forget": forget_set, "retain": retain_set}
    soul.unlearn(make_model(), tokenizer, **sets, training=training, callbacks=[Watch()])
    assert saved == []
