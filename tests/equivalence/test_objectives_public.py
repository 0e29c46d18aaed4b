"""Variants and ``compat``, against the published arithmetic written out position by position in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from soul.data.batches import VIEWS, UnlearnDataset, collate_items
from soul.data.templates import ChatTemplate
from soul.registry import OBJECTIVES

PAIRS = [(0, 3), (3, 1), (4, 2)]
BETA = 0.3


class Bench:
    """A model, its reference, and a batch as public code collates it: forget and retain rows padded apart."""

    def __init__(self, tokenizer, make_model, forget, retain, refusals):
        self.pad = tokenizer.pad_token_id
        self.model, self.origin = make_model(1, torch.float64), make_model(0, torch.float64)
        forget = [dataclasses.replace(e, wrong_answers=("Nobody can tell.",)) for e in forget]
        data = UnlearnDataset(ChatTemplate(tokenizer), forget, retain, VIEWS, refusals)
        self.items = [data[0, a, p] for a, p in PAIRS]

    def rows(self, view):
        return [item[view] for item in self.items]

    def padded(self, view):
        """Return tokens, attention and labels (-100 where no answer is) as lists, padded to the longest row."""
        rows = self.rows(view)
        width = max(len(row) for row in rows)
        ids = [[*row.input_ids, *[self.pad] * (width - len(row))] for row in rows]
        attention = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        labels = [
            [-100] * row.answer_start + list(row.input_ids[row.answer_start :]) + [-100] * (width - len(row))
            for row in rows
        ]
        return ids, attention, labels

    def logits(self, model, view):
        ids, attention, _ = self.padded(view)
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(attention)).logits.tolist()

    def states(self, model, view):
        ids, attention, _ = self.padded(view)
        with torch.no_grad():
            out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(attention), output_hidden_states=True)
        return out.hidden_states[1].tolist()

    def terms(self, name, **settings):
        objective = OBJECTIVES.get(name)(**settings)
        batch = collate_items([{v: i[v] for v in objective.views} for i in self.items], pad_id=self.pad)
        reference = objective.ask_reference(self.origin, self.rows, pad_id=self.pad)
        terms = objective(self.model, batch, reference).terms
        assert objective.counts(batch) == {key: term.count for key, term in terms.items()}
        return {key: term.total.item() / term.count for key, term in terms.items()}


@pytest.fixture(scope="module")
def bench(tokenizer, make_model, forget_set, retain_set, refusals):
    return Bench(tokenizer, make_model, forget_set, retain_set, refusals)


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    total = math.fsum(e)
    return [v / total for v in e]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def close(value):
    return pytest.approx(value, rel=1e-10)


def test_open_unlearning_kl_is_a_mean_over_prompts_and_padding(bench):
    values = []
    for ours, theirs in zip(bench.logits(bench.model, "retain"), bench.logits(bench.origin, "retain"), strict=True):
        for z, z_ref in zip(ours, theirs, strict=True):
            p, q = softmax(z_ref), softmax(z)
            values.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    expected = close(sum(values) / len(values))
    assert bench.terms("grad_diff", retain="kl", compat="open-unlearning")["retain"] == expected
    assert bench.terms("kl", compat="open-unlearning")["retain"] == expected
    assert bench.terms("kl")["retain"] != expected


def test_soul_kl_is_a_cross_entropy_from_the_model(bench):
    values = []
    for ours, theirs in zip(bench.logits(bench.model, "retain"), bench.logits(bench.origin, "retain"), strict=True):
        for z, z_ref in zip(ours, theirs, strict=True):
            values.append(-sum(p * math.log(q + 1e-12) for p, q in zip(softmax(z), softmax(z_ref), strict=True)))
    assert bench.terms("kl", compat="soul")["retain"] == close(sum(values) / len(values))


def test_muse_kl_is_of_raw_logits(bench):
    total = 0.0
    for ours, theirs in zip(bench.logits(bench.model, "retain"), bench.logits(bench.origin, "retain"), strict=True):
        for z, z_ref in zip(ours, theirs, strict=True):
            total += sum(math.exp(b) * (b - a) for a, b in zip(z, z_ref, strict=True))
    assert bench.terms("kl", compat="muse")["retain"] == close(total / len(bench.items))


def test_soul_npo_is_one_ratio_for_the_batch(bench):
    means = []
    for model in (bench.model, bench.origin):
        losses = []
        for z, labels in zip(bench.logits(model, "forget"), bench.padded("forget")[2], strict=True):
            losses += [-math.log(softmax(z[t - 1])[y]) for t, y in enumerate(labels) if y != -100]
        means.append(sum(losses) / len(losses))
    expected = -2 / BETA * log_sigmoid(BETA * (means[0] - means[1]))
    assert bench.terms("npo", beta=BETA, compat="soul")["forget"] == close(expected)


def test_muse_npo_does_not_look_at_the_answer(bench):
    values = []
    for ours, theirs in zip(bench.logits(bench.model, "forget"), bench.logits(bench.origin, "forget"), strict=True):
        for z, z_ref in zip(ours, theirs, strict=True):
            values += [log_sigmoid(BETA * (b - a)) for a, b in zip(z, z_ref, strict=True)]
    assert bench.terms("npo", beta=BETA, compat="muse")["forget"] == close(-2 / BETA * sum(values) / len(values))


@pytest.mark.parametrize("name", ["npo", "simnpo", "wga", "satimp", "grad_diff", "altpo"])
def test_open_unlearning_agrees_with_the_formula(bench, name):
    assert bench.terms(name, compat="open-unlearning") == bench.terms(name)


def test_open_unlearning_dpo_is_twice_the_formula(bench):
    assert bench.terms("dpo", compat="open-unlearning")["forget"] == close(2 * bench.terms("dpo")["forget"])


def test_open_unlearning_undial_counts_every_position(bench):
    values = []
    ours, theirs = bench.logits(bench.model, "forget"), bench.logits(bench.origin, "forget")
    for z, z_ref, labels in zip(ours, theirs, bench.padded("forget")[2], strict=True):
        for t, y in enumerate(labels[1:]):
            struck = list(z_ref[t])
            struck[y] -= 3.0  # Python's index -100 means what torch's does: the hundredth from the end
            values.append(-sum(a * math.log(b) for a, b in zip(softmax(struck), softmax(z[t]), strict=True)))
    expected = close(sum(values) / len(values))
    assert bench.terms("undial", strength=3.0, compat="open-unlearning")["forget"] == expected
    assert bench.terms("undial", strength=3.0)["forget"] != expected


def test_open_unlearning_pdu_does_not_shift_its_mask(bench):
    values = []
    for z, labels in zip(bench.logits(bench.model, "forget"), bench.padded("forget")[2], strict=True):
        values += [(max(z[t]) - sum(z[t]) / len(z[t])) ** 2 for t, y in enumerate(labels) if y != -100]
    assert bench.terms("pdu", compat="open-unlearning")["forget"] == close(sum(values) / len(values))


def test_closer_look_me_is_the_other_direction(bench):
    values = []
    for z, labels in zip(bench.logits(bench.model, "forget"), bench.padded("forget")[2], strict=True):
        for t, y in enumerate(labels):
            if y != -100:
                p = softmax(z[t - 1])
                values.append(sum((math.log(1 / len(p)) - math.log(v + 1e-12)) / len(p) for v in p))
    assert bench.terms("me", compat="closer-look")["forget"] == close(sum(values) / len(values))


@pytest.mark.parametrize("code", ["open-unlearning", "wmdp"])
def test_rmu_of_public_code(bench, code):
    u = OBJECTIVES.get("rmu")(steering=2.0).vector(32).tolist()

    def mean(view, target):
        sums, lengths = [], []
        for i, (states, labels) in enumerate(zip(bench.states(bench.model, view), bench.padded(view)[2], strict=True)):
            goals = target[i] if target is not None else [u] * len(states)
            errors = [
                sum((a - b) ** 2 for a, b in zip(h, g, strict=True)) / 32 for h, g in zip(states, goals, strict=True)
            ]
            kept = [e for e, y in zip(errors, labels, strict=True) if code == "wmdp" or y != -100]
            sums.append(sum(kept))
            lengths.append(len(kept))
        if code == "wmdp":
            return sum(sums) / sum(lengths)
        assert len(set(lengths)) > 1  # or the mean of each row's own mean would be the same
        return sum(s / n for s in sums for n in lengths) / len(sums) ** 2  # (B,) / (B, 1): each sum by all lengths

    terms = bench.terms("rmu", steering=2.0, compat=code)
    assert terms["forget"] == close(mean("forget", None))
    assert terms["retain"] == close(mean("retain", bench.states(bench.origin, "retain")))


def test_random_vector_of_rmu():
    rmu = OBJECTIVES.get("rmu")
    u = rmu(steering=7.0, seed=1).vector(50)
    assert u.norm().item() == close(7.0)
    assert (u >= 0).all()
    assert torch.equal(u, rmu(steering=7.0, seed=1).vector(50))
    assert not torch.equal(u, rmu(steering=7.0, seed=2).vector(50))


def test_adaptive_rmu_scales_the_vector_by_the_reference(bench):
    """Adaptive RMU's target is ``5 ||h_ref(t)|| u``, at the positions before answer tokens."""
    u = OBJECTIVES.get("rmu")(steering=1.0).vector(32).tolist()
    rows = []
    for i, (states, before) in enumerate(
        zip(bench.states(bench.model, "forget"), bench.states(bench.origin, "forget"), strict=True)
    ):
        places = [t - 1 for t, y in enumerate(bench.padded("forget")[2][i]) if y != -100]
        goals = [[5.0 * math.hypot(*before[t]) * v for v in u] for t in places]
        errors = [math.dist(states[t], goal) ** 2 for t, goal in zip(places, goals, strict=True)]
        rows.append(sum(errors) / len(errors))
    for settings in ({}, {"retain": "none"}, {"steering": 3.0}):
        assert bench.terms("rmu", adaptive=5.0, **settings)["forget"] == close(sum(rows) / len(rows))


F_DIVERGENCES = {  # generator f of D_f(P || Q) = sum q f(p/q), its conjugate, and the g whose value is v
    "kl": (lambda t: math.exp(t - 1), lambda v: v),
    "pearson": (lambda t: t * t / 4 + t, lambda v: v),
    "js": (lambda t: -math.log(2 - math.exp(t)), lambda v: math.log(2) - math.log(1 + math.exp(-v))),
    "tv": (lambda t: t, lambda v: math.tanh(v) / 2),
}


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_flat_composes_conjugate_and_variational_function(name):
    conjugate, g = F_DIVERGENCES[name]
    flat = OBJECTIVES.get("flat")(divergence=name)
    for p in (0.0, 0.2, 0.9):
        value = torch.tensor(p, dtype=torch.float64)
        assert flat._variational(value).item() == close(g(p))
        assert flat._conjugate(value).item() == pytest.approx(conjugate(g(p)), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("npo", {"compat": "tofu"}, "compat must be empty or one of soul, muse, open-unlearning, not 'tofu'"),
        ("rmu", {"compat": "wmdp", "retain": "kl"}, "compat wmdp knows no KL"),
        ("grad_diff", {"compat": "wmdp"}, "compat must be empty or one of"),
    ],
)
def test_rejects_code_that_it_does_not_know(name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.get(name)(**settings)
