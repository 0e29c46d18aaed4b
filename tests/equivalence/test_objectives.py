"""Every objective against its formula, written out over full logits of single unpadded rows in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from soul.adapters import AdapterSpec, add_adapter
from soul.data.batches import VIEWS, UnlearnDataset, collate_items
from soul.data.templates import ChatTemplate
from soul.forward import forward_answers
from soul.objectives.base import Objective
from soul.objectives.schedule import RetainSchedule
from soul.reference import build_reference
from soul.registry import OBJECTIVES

PAIRS = [(0, 3), (3, 1), (4, 2)]  # answers of unequal length
BETA = 0.3


def log_softmax(model, row):
    """Return log p(. | before) at each answer token, as lists of floats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].tolist()
    result = []
    for t in range(row.answer_start, len(row.input_ids)):
        z = logits[t - 1]
        top = max(z)
        norm = top + math.log(math.fsum(math.exp(v - top) for v in z))
        result.append([v - norm for v in z])
    return result


def logps(model, row):
    dists = log_softmax(model, row)
    return [dist[row.input_ids[row.answer_start + i]] for i, dist in enumerate(dists)]


def kl(reference, model, row):
    total = 0.0
    for p, q in zip(log_softmax(reference, row), log_softmax(model, row), strict=True):
        total += math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return total


def states(model, row):
    """Return the output of the first block at the positions that predict answer tokens, as lists of floats."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
    return out.hidden_states[1][0, row.answer_start - 1 : -1].tolist()


def distance(ours, theirs):
    """Return the mean over tokens of the squared distance."""
    return sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)) / len(
        ours
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


class Bench:
    """A model that has moved away from its reference, and a few pairs."""

    def __init__(self, tokenizer, make_model, forget, retain, refusals, views=VIEWS):
        self.pad = tokenizer.pad_token_id
        self.model, self.origin = make_model(1, torch.float64), make_model(0, torch.float64)
        forget = [dataclasses.replace(e, wrong_answers=(f"Not {e.answer}", "Nobody can tell.")) for e in forget]
        self.data = UnlearnDataset(ChatTemplate(tokenizer), forget, retain, views, refusals)
        self.items = [self.data[0, a, p] for a, p in PAIRS]

    def rows(self, view):
        return [item[view] for item in self.items]

    def batch(self, objective: Objective, items=None):
        items = self.items if items is None else items
        return collate_items([{v: i[v] for v in objective.views} for i in items], pad_id=self.pad)

    def reference(self, objective: Objective, mode="cache", model=None):
        return objective.ask_reference(
            model or self.origin,
            self.rows,
            mode=mode,
            pad_id=self.pad,
            max_tokens=150,  # several passes of unequal width
        )

    def ratio(self, row):
        return math.fsum(logps(self.model, row)) - math.fsum(logps(self.origin, row))

    def forget(self, name):
        """Return total and count of the forget term."""
        forget, refusal = self.rows("forget"), self.rows("refusal")
        tokens = sum(r.answer_length for r in forget)
        if name in ("ga", "grad_diff", "kl"):
            return sum(sum(logps(self.model, r)) for r in forget), tokens
        if name in ("po", "idk", "ap", "random_labels"):
            learned = self.rows("mismatch") if name == "random_labels" else refusal
            return -sum(sum(logps(self.model, r)) for r in learned), sum(r.answer_length for r in learned)
        if name == "npo":
            return -2 / BETA * sum(log_sigmoid(-BETA * self.ratio(r)) for r in forget), len(forget)
        if name in ("dpo", "altpo"):
            better = refusal if name == "dpo" else self.rows("alternate")
            won = [self.ratio(w) - self.ratio(r) for w, r in zip(better, forget, strict=True)]
            return -(1 if name == "dpo" else 2) / BETA * sum(log_sigmoid(BETA * x) for x in won), len(forget)
        if name == "simnpo":
            nll = [-sum(logps(self.model, r)) / r.answer_length for r in forget]
            return -2 / BETA * sum(log_sigmoid(BETA * x - 0.2) for x in nll), len(forget)
        if name == "rmu":
            u = OBJECTIVES.get("rmu")(steering=2.0).vector(32).tolist()
            return sum(distance(h, [u] * len(h)) for h in (states(self.model, r) for r in forget)), len(forget)
        if name == "flat":
            p = [
                [sum(map(math.exp, logps(self.model, r))) / r.answer_length for r in rows] for rows in (forget, refusal)
            ]
            return sum(math.tanh(f) / 2 - math.tanh(e) / 2 for f, e in zip(*p, strict=True)), len(forget)
        if name == "ceu":  # the first token of each answer is skipped
            return sum(sum(list(self.by_token(name, r))[1:]) for r in forget), tokens - len(forget)
        return sum(sum(self.by_token(name, r)) for r in forget), tokens

    def by_token(self, name, row):
        """Give the loss of each answer token, from the whole distribution."""
        before = log_softmax(self.origin, row)
        for t, logs in enumerate(log_softmax(self.model, row)):
            y = row.input_ids[row.answer_start + t]
            p = math.exp(logs[y])
            if name == "wga":
                yield p**0.7 * logs[y]
            elif name == "satimp":
                yield p**2 * (1 - p) ** 0.5 * logs[y]
            elif name == "me":
                yield math.log(len(logs)) + sum(math.exp(v) * v for v in logs)
            elif name == "pdu":  # margins are the same in logits and log-probabilities
                yield (max(logs) - sum(logs) / len(logs)) ** 2
            elif name == "ceu":
                yield -sum(math.exp(v) / (1 - p) * v for i, v in enumerate(logs) if i != y)
            else:
                assert name == "undial", f"no formula written out for {name}"
                q = [math.exp(v - 3 * (i == y)) for i, v in enumerate(before[t])]
                yield -sum(a / sum(q) * b for a, b in zip(q, logs, strict=True))

    def retain(self, kind):
        rows = self.rows("retain")
        if kind == "kl":
            return sum(kl(self.origin, self.model, r) for r in rows), sum(r.answer_length for r in rows)
        if kind == "hidden":
            return sum(distance(states(self.model, r), states(self.origin, r)) for r in rows), len(rows)
        return -sum(sum(logps(self.model, r)) for r in rows), sum(r.answer_length for r in rows)

    def further(self, name):
        """Return total, count and weight of the terms besides forget and retain."""
        retain = self.rows("retain")
        if name == "l1_sparse":
            weights = [p.flatten().tolist() for p in self.model.parameters()]
            return {"sparsity": (math.fsum(abs(v) for w in weights for v in w), 1, 0.01)}
        if name == "ap":
            pairs = zip(retain, self.rows("retain_refusal"), strict=True)
            margins = [sum(logps(self.model, y)) - sum(logps(self.model, r)) for y, r in pairs]
            return {"preserve": (-sum(log_sigmoid(BETA * m) for m in margins) / BETA, len(retain), 0.6)}
        if name == "pdu":
            count = sum(r.answer_length for r in retain)
            return {"reference": (-sum(sum(logps(self.origin, r)) for r in retain), count, 0.0)}
        return {}


SETTINGS = {
    **{name: {"beta": BETA} for name in ("npo", "dpo", "altpo")},
    "ap": {"beta": BETA, "preserve_weight": 0.6},
    "simnpo": {"beta": BETA, "gamma": 0.2},
    "wga": {"alpha": 0.7},
    "satimp": {"beta1": 2.0, "beta2": 0.5},
    "undial": {"strength": 3.0},
    "ceu": {"skip_first": 1},
    "rmu": {"steering": 2.0},
    "l1_sparse": {"gamma": 0.01},
}
WITHOUT_FORGET = ("ft", "l1_sparse")
CASES = [
    (n, r)
    for n in OBJECTIVES.names()
    for r in ("nll", "kl", "hidden", "none")
    if not (n in WITHOUT_FORGET and r == "none")
]


def make(name, retain="nll", **more):
    settings = {**SETTINGS.get(name, {}), **more}
    if name == "pdu" and retain != "nll":
        settings["retain_schedule"] = RetainSchedule()
    return OBJECTIVES.get(name)(retain=retain, **settings)


@pytest.fixture(scope="module")
def bench(tokenizer, make_model, forget_set, retain_set, refusals):
    return Bench(tokenizer, make_model, forget_set, retain_set, refusals)


@pytest.mark.parametrize(("name", "retain"), CASES)
def test_formula(bench, name, retain):
    weights = {"forget_weight": 0.3} | ({} if retain == "none" else {"retain_weight": 1.7})
    objective = make(name, retain, **weights)
    out = objective(bench.model, bench.batch(objective), bench.reference(objective))
    terms = {} if name == "pdu" and retain != "nll" else bench.further(name)
    if name not in WITHOUT_FORGET:
        terms["forget"] = (*bench.forget(name), 0.3)
    if retain != "none":
        terms["retain"] = (*bench.retain(retain), 1.7)
    assert set(out.terms) == set(terms)
    for key, (total, count, weight) in terms.items():
        assert out.terms[key].total.item() == pytest.approx(total, rel=1e-10)
        assert out.terms[key].count == count
        assert out.terms[key].weight == weight
    expected = sum(weight * total / count for total, count, weight in terms.values())
    assert out.loss().item() == pytest.approx(expected, rel=1e-10)


ALONE = [(n, r) for n, r in CASES if r == "none" or n in ("ft", "l1_sparse", "rmu", "npo", "pdu")]


@pytest.mark.parametrize(("name", "retain"), ALONE)
def test_padding_changes_nothing(bench, name, retain):
    objective = make(name, retain)
    reference, batch = bench.reference(objective), bench.batch(objective)
    wide = {k: v.clone() for k, v in batch.items()}
    for key, filler in (("input_ids", 9), ("attention_mask", 0), ("answer_mask", False)):
        extra = torch.full((len(wide[key]), 5), filler, dtype=wide[key].dtype)
        wide[key] = torch.cat([wide[key], extra], dim=1)
    wide["input_ids"][wide["attention_mask"] == 0] = 9
    plain, padded = (objective(bench.model, b, reference).terms for b in (batch, wide))
    for key, term in plain.items():
        assert padded[key].total.item() == pytest.approx(term.total.item(), rel=1e-12, abs=1e-12)
        assert padded[key].count == term.count


@pytest.mark.parametrize(("name", "retain"), ALONE)
def test_company_changes_nothing(bench, name, retain):
    objective = make(name, retain)
    reference = bench.reference(objective)
    whole = objective(bench.model, bench.batch(objective), reference).terms
    alone = [objective(bench.model, bench.batch(objective, [item]), reference).terms for item in bench.items]
    for key, term in whole.items():
        times = len(alone) if key == "sparsity" else 1  # it is there once in each batch
        total, count = sum(t[key].total.item() for t in alone), sum(t[key].count for t in alone)
        assert total == pytest.approx(times * term.total.item(), rel=1e-12, abs=1e-12)
        assert count == times * term.count


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_prompts_and_padding_are_no_targets(bench, name):
    """The loss reaches the head at the positions before answer tokens and nowhere else."""
    objective = make(name)
    batch = bench.batch(objective)
    model = bench.model
    caught = []

    def keep(_module, _args, output):
        output.last_hidden_state.retain_grad()
        caught.append(output.last_hidden_state)

    handle = model.model.register_forward_hook(keep)
    try:
        objective(model, batch, bench.reference(objective)).loss().backward()
    finally:
        handle.remove()
        model.zero_grad()
    touched = caught[0].grad.abs().sum(-1) > 0
    reach = [v for v in VIEWS if v in objective.views and (name, v) != ("rmu", "forget")]  # it looks below the head
    rows = [item[v] for v in VIEWS if v in objective.views for item in bench.items]
    reaching = [v in reach for v in VIEWS if v in objective.views for _ in bench.items]
    expected = torch.zeros_like(touched)
    for i, row in enumerate(rows):
        skipped = int(name == "ceu" and i < len(bench.items))
        expected[i, row.answer_start - 1 + skipped : len(row.input_ids) - 1] = reaching[i]
    assert torch.equal(touched, expected)


@pytest.mark.parametrize(
    ("name", "retain"),
    [("npo", "nll"), ("npo", "kl"), ("dpo", "kl"), ("ft", "kl"), ("ft", "hidden"), ("rmu", "hidden"), ("undial", "kl")],
)
@pytest.mark.parametrize("mode", ["copy", "adapter_off"])
def test_references_agree(bench, make_model, name, retain, mode):
    objective = make(name, retain)
    model = get_peft_model(
        make_model(0, torch.float64), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).double()
    model.eval()
    references = [bench.reference(objective, m, model) for m in ("cache", mode)]
    generator = torch.Generator().manual_seed(0)
    adapters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in adapters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    results = []
    for reference in references:
        out = objective(model, bench.batch(objective), reference)
        results.append((out, torch.autograd.grad(out.loss(), adapters, materialize_grads=True, allow_unused=True)))
    (cached, cached_grads), (live, live_grads) = results
    for key, term in cached.terms.items():
        assert live.terms[key].total.item() == pytest.approx(term.total.item(), rel=1e-10)
    for a, b in zip(cached_grads, live_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if retain in ("kl", "hidden"):
        assert cached.terms["retain"].total.item() > 1e-3  # the model did move


def test_kl_of_the_reference_itself_is_zero(bench):
    objective = make("ft", "kl")
    out = objective(bench.origin, bench.batch(objective), bench.reference(objective))
    assert out.loss().item() == pytest.approx(0, abs=1e-12)


def test_reference_does_not_follow_the_model(bench, make_model):
    objective = make("npo", "kl")
    model = make_model(0, torch.float64)
    references = [bench.reference(objective, mode, model) for mode in ("cache", "copy")]
    before = [objective(bench.model, bench.batch(objective), r).loss().item() for r in references]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert [objective(bench.model, bench.batch(objective), r).loss().item() for r in references] == before


SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
AFTER_THE_HEAD = {
    "granite divides": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.1)),
    "cohere multiplies": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0)),
    "gemma2 caps": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "gpt2 does nothing": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("mode", ["cache", "copy"])
@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_kl_where_the_model_changes_its_logits_after_the_head(bench, name, mode):
    """What a model does to its logits after the head belongs to the reference too, and no second copy is needed."""
    objective = make("ft", "kl")
    torch.manual_seed(0)
    model = AFTER_THE_HEAD[name]().eval()
    reference = bench.reference(objective, mode, model)
    assert (reference.live is None) == (mode == "cache")
    batch = bench.batch(objective)
    answers = forward_answers(model, batch)
    logits = reference.logits(model, batch, answers, "retain")
    torch.testing.assert_close(logits, answers.logits_NV.detach(), rtol=1e-4, atol=1e-4)
    assert objective(model, batch, reference).loss().item() == pytest.approx(0, abs=1e-6)


def test_a_model_that_cannot_be_taken_apart_is_copied(bench, make_model, caplog):
    """Logits that need more than the last hidden state cannot be cached: a frozen copy answers, and the log says so."""

    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out: Any = super().forward(*args, **kwargs)
            out.logits = out.logits + 5 * self.model.embed_tokens(kwargs["input_ids"]).sum()
            out.logits[..., 0] += 5
            return out

    objective = make("ft", "kl")
    model = Odd(make_model().config).eval()
    reference = bench.reference(objective, "cache", model)
    assert "frozen copy" in caplog.text
    assert not reference.hidden
    loss = objective(model, bench.batch(objective), reference).loss()
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_an_adapter_trained_before_is_part_of_the_reference(bench, make_model, caplog):
    """With it off the model would be the one before that training, and not the one before unlearning."""
    model = add_adapter(make_model(0, torch.float64), AdapterSpec(r=2)).double().eval()
    fresh = build_reference(model, as_model=True)
    assert fresh.live == model.disable_adapter
    nn.init.normal_(next(p for name, p in model.named_parameters() if ".lora_B." in name))
    objective = make("ft", "kl")
    with pytest.raises(ValueError, match=r"trained already: set training\.reference to cache or copy, or merge"):
        bench.reference(objective, "adapter_off", model)
    assert "frozen copy" not in caplog.text
    batch = bench.batch(objective)
    with torch.no_grad(), build_reference(model, as_model=True).asking(model) as before:
        assert torch.equal(forward_answers(before, batch).logits_NV, forward_answers(model, batch).logits_NV)
        assert before is not model
    assert "frozen copy" in caplog.text


def test_reference_with_adapters_off_has_no_dropout(bench):
    objective = make("ft", "kl")
    base = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256)).double()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).double()
    reference = bench.reference(objective, "adapter_off", model)
    batch = bench.batch(objective)
    model.train()
    asked = [reference.logits(model, batch, forward_answers(model, batch), "retain") for _ in range(2)]
    assert torch.equal(*asked)
