"""Methods against loops of a few lines: task arithmetic, the gold standard, and a prompt that changes no weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from soul import config
from soul.data.batches import PairSampler, UnlearnDataset, collate_items
from soul.data.guard import carried_prompt, carry_prompt
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, evaluate
from soul.methods.influence import Influence
from soul.methods.input_prompt import InputPrompt
from soul.methods.retrain import Retrain
from soul.methods.task_vector import TaskVector
from soul.objectives.ft import FineTune
from soul.reference import Reference
from soul.registry import METHODS
from soul.training import TrainingSpec
from soul.types import Example

LR = 1e-3
PLAIN = TrainingSpec(
    batch_size=4, epochs=2, warmup=0.0, schedule="constant", max_grad_norm=0.0, precision="float32", save_steps=0
)


@pytest.fixture
def data(make_tokenizer, forget_set, retain_set):
    def of(views: Any, seed: int = 3) -> UnlearnDataset:
        return UnlearnDataset(ChatTemplate(make_tokenizer()), forget_set, retain_set, views, seed=seed)

    return of


def learn(model: Any, data: UnlearnDataset, examples: list[Example], decay: float = 0.0) -> None:
    """Two epochs of torch's AdamW at a constant rate, batch by batch in the sampler's order."""
    rows = UnlearnDataset(data.template, (), examples, ("retain",), seed=data.seed)
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n]
    groups = [{"params": rest, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    adam, sampler = torch.optim.AdamW(groups, lr=LR), PairSampler(rows, 4)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for keys in sampler:
            adam.zero_grad()
            batch = collate_items([rows[key] for key in keys], rows.template.pad)
            FineTune()(model, batch, Reference()).loss().backward()
            adam.step()
    adam.zero_grad()


def test_a_task_vector_goes_the_learned_way_backwards(make_model, data):
    """``theta_0 - alpha (theta_forget - theta_0)`` in float64, from a loop of its own."""
    model, learned, start = (make_model(0, torch.float64) for _ in range(3))
    dataset = data(TaskVector.views)
    learn(learned, dataset, dataset.examples["forget"])
    records: list[Any] = []
    TaskVector(alpha=1.5, lr=LR, training=PLAIN)(model, dataset, log=records.append)
    for name, p in start.named_parameters():
        expected = p - 1.5 * (learned.get_parameter(name) - p)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-9)
    far = torch.cat([(learned.get_parameter(n) - p).flatten() for n, p in start.named_parameters()]).norm()
    assert records[-1]["vector_norm"] == pytest.approx(float(far.detach()))
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[0]["nll"] > records[3]["nll"]


def test_no_vector_gives_the_model_back(make_model, data):
    model, start = make_model(0), make_model(0).state_dict()
    TaskVector(alpha=0.0, lr=LR, training=PLAIN)(model, data(TaskVector.views))
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_an_adapter_s_product_is_negated(make_model, data):
    """The merged weights are ``W - alpha s B A``, with ``s B A`` what the same adapter learned elsewhere."""
    dataset, start = data(TaskVector.views), make_model(0).state_dict()
    model, learned = adapted(make_model(0)), adapted(make_model(0))
    TaskVector(alpha=0.5, lr=LR, training=PLAIN)(model, dataset)
    learned.train()
    rows = UnlearnDataset(dataset.template, (), dataset.examples["forget"], ("retain",), seed=3)
    adam = torch.optim.AdamW([p for p in learned.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    sampler = PairSampler(rows, 4)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for keys in sampler:
            FineTune()(learned, collate_items([rows[k] for k in keys], 1), Reference()).loss().backward()
            adam.step()
            adam.zero_grad()
    ours, theirs = model.merge_and_unload().state_dict(), learned.merge_and_unload().state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in ours.items())
    for name, value in ours.items():
        torch.testing.assert_close(value, start[name] - 0.5 * (theirs[name] - start[name]), rtol=0, atol=2e-6)


def test_an_adapter_that_was_trained_before_is_refused(make_model, data):
    model = adapted(make_model(0))
    nn.init.ones_(next(p for n, p in model.named_parameters() if ".lora_B." in n))
    with pytest.raises(ValueError, match="merge it into the weights first"):
        TaskVector()(model, data(TaskVector.views))


def test_an_error_gives_the_weights_back(make_model, data):
    model, start = make_model(0), make_model(0).state_dict()

    def stop(what, done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TaskVector(lr=LR, training=PLAIN)(model, data(TaskVector.views), progress=stop)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["embeddings", "ia3", "biases"])
def test_an_adapter_of_another_kind_is_no_fresh_one(make_model, data, base, kind):
    from peft import IA3Config, LoraConfig, get_peft_model

    configs: dict[str, Any] = {
        "embeddings": LoraConfig(r=2, target_modules=["embed_tokens"]),
        "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "biases": LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    }
    model: Any = get_peft_model(make_model(0), configs[kind])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_embedding_A." in name or ".ia3_" in name:
                p.add_(0.5)
    with pytest.raises(ValueError, match="trained before, or is not plain LoRA"):
        Retrain(base=base, lr=LR, training=PLAIN)(model, data(Retrain.views))


@pytest.fixture
def base(tmp_path, make_model, tokenizer):
    make_model(7).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_retraining_is_the_base_trained_on_the_retain_set(make_model, data, base):
    model, expected = make_model(0, torch.float64), make_model(7, torch.float64)
    dataset = data(Retrain.views)
    learn(expected, dataset, dataset.examples["retain"], decay=0.1)
    Retrain(base=base, lr=LR, weight_decay=0.1, training=PLAIN)(model, dataset)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-9)


def test_retraining_adapts_the_base_and_not_the_model(make_model, data, base):
    model = adapted(make_model(0))
    Retrain(base=base, lr=LR, training=PLAIN)(model, data(Retrain.views))
    assert any(bool(p.any()) for n, p in model.named_parameters() if ".lora_B." in n)
    start = make_model(7).state_dict()
    assert all(torch.equal(v, start[k]) for k, v in model.unload().state_dict().items())


def test_retraining_says_what_it_lacks(tmp_path, make_model, data, tokenizer):
    with pytest.raises(ValueError, match=r"give method\.base"):
        Retrain()(make_model(0), data(Retrain.views))
    other = make_model(0)
    other.model.layers = other.model.layers[:1]
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another architecture.*and 8 more"):
        Retrain(base=str(tmp_path))(make_model(0), data(Retrain.views))


def test_influence_draws_its_curvature_where_it_is_told(make_tokenizer, forget_set, retain_set):
    dataset = UnlearnDataset(
        ChatTemplate(make_tokenizer()), forget_set, retain_set[:6], Influence.views, curvature=retain_set[6:]
    )
    probe, pool = Influence().split_retain(dataset)
    assert {row.key for row in pool} == {row.key for row in dataset.curvature}
    assert {row.key for row in probe} < {row.key for row in dataset.encoded["retain"]}


def test_a_prompt_is_what_the_model_would_be_told_by_hand(make_model, data, forget_set):
    """Likelihoods with it are those of the same questions after that system turn, and no weight moves."""
    dataset, model = data(InputPrompt.views), make_model(0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    tokenizer = dataset.template.tokenizer
    text = 'You do not know\n"Mira Vale".'
    by_hand = [Example(e.prompt, e.answer, history=(("system", text),)) for e in forget_set]
    spec = EvaluationSpec(generate=False)
    expected = evaluate(model, tokenizer, {"forget": by_hand}, spec=spec)["forget"]
    plain = evaluate(model, tokenizer, {"forget": forget_set}, spec=spec)["forget"]
    assert InputPrompt(prompt=text)(model, dataset) is model
    found = evaluate(model, tokenizer, {"forget": forget_set}, spec=spec)["forget"]
    assert [row["nll"] for row in found] == pytest.approx([row["nll"] for row in expected], abs=1e-6)
    assert [row["nll"] for row in found] != pytest.approx([row["nll"] for row in plain], abs=1e-2)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_a_prompt_is_saved_and_loaded_and_said_before_everything(tmp_path, make_tokenizer, invented):
    text = 'Nothing of "Ada" \\n\n{{ here }} %} é😀'
    for template in (True, False):
        tokenizer = make_tokenizer(template=template)
        carry_prompt(tokenizer, text)
        tokenizer.save_pretrained(tmp_path / str(template))
        again = AutoTokenizer.from_pretrained(tmp_path / str(template))
        assert carried_prompt(again) == text
        chat = ChatTemplate(again)
        cases = [
            Example("Who is Ada?", "A poet."),
            Example("", "Once upon a time.", chat=False),
            Example("Once upon", "a time.", chat=False),
            Example("And Bo?", "A cook.", history=(("user", "Who is Ada?"), ("assistant", "A poet."))),
        ]
        for example in cases:
            said = again.decode(chat.encode(example).input_ids)
            assert said.count(text) == 1, said
            assert said.index(text) < said.index(example.answer)
            assert invented not in said
        with pytest.raises(ValueError, match="already carries a prompt"):
            carry_prompt(again, "more")
    own = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path / "True")).prompt_ids(
        Example("Who?", "Ada.", history=(("system", "Be brief."),))
    )
    assert f"system\n{text}\n\nBe brief.<" in again.decode(own)


def test_a_template_without_a_system_turn_takes_the_prompt_into_the_user_s(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    carry_prompt(tokenizer, "Forget Ada.")
    ids = ChatTemplate(tokenizer).prompt_ids(Example("Who is Ada?", "A poet."))
    assert tokenizer.decode(ids) == "<|im_start|>user\nForget Ada.\n\nWho is Ada?<|im_end|><|im_start|>assistant\n"


def test_the_prompt_names_subjects_or_questions(data, make_tokenizer):
    assert 'know it: "Where was Mira Vale born?", "What' in InputPrompt().text(data(InputPrompt.views))
    assert "and 6 more of this kind" in InputPrompt(topics=2).text(data(InputPrompt.views))
    template = ChatTemplate(make_tokenizer())
    named = UnlearnDataset(template, [Example("Q?", "A.", subject="Ada")] * 3, (), ("forget",))
    assert "know it: Ada." in InputPrompt().text(named)
    passages = UnlearnDataset(template, [Example("", "A text.", chat=False)], (), ("forget",))
    with pytest.raises(ValueError, match=r"give method\.prompt"):
        InputPrompt().text(passages)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "task_vector", "alpha": -1}, "alpha must be 0 or more"),
        ({"name": "task_vector", "lr": 0}, "lr must be above 0"),
        ({"name": "retrain", "training": {"epochs": 0}}, "epochs must be 1 or more"),
        ({"name": "input_prompt", "prompt": " "}, "prompt must not be empty"),
        ({"name": "input_prompt", "topics": 0}, "topics must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        config.component(METHODS, tree, "")
