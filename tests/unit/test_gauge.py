"""What a stopping rule reads, against plain formulas on a tiny model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from soul.data.batches import UnlearnDataset
from soul.data.general import general_chat
from soul.data.templates import ChatTemplate
from soul.gauge import Gauge, Known, nearest, renamed, told, worst
from soul.types import Example


def dataset(tokenizer, forget, retain):
    return UnlearnDataset(ChatTemplate(tokenizer, 256), forget, retain, ("forget", "retain"))


def logps(model, row):
    """Log p of each token given those before it, from whole logits."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
    return logits.log_softmax(-1)[row.answer_start - 1 : -1]


def probability(model, row):
    targets = torch.tensor(row.input_ids[row.answer_start :])
    return float(logps(model, row).gather(1, targets[:, None]).mean().exp())


@pytest.fixture
def gauge(make_model, tokenizer, forget_set, retain_set):
    return Gauge(make_model(), dataset(tokenizer, forget_set, retain_set), rows=6, answers=3, new_tokens=8)


def test_known_is_the_mean_of_true_and_the_geometric_mean_of_false_answers(gauge):
    true = [probability(gauge.model, gauge.template.encode(e)) for e in gauge.asked]
    assert gauge.before.true == pytest.approx(sum(true) / 6, rel=1e-4)
    false = [
        probability(gauge.model, gauge.template.encode(e, answer=a))
        for e, a in zip(gauge.asked, gauge.false_answers, strict=True)
    ]
    assert gauge.before.false == pytest.approx(math.prod(false) ** (1 / 6), rel=1e-4)


def test_the_false_answer_is_the_least_likely_of_the_candidates(gauge, retain_set):
    for e, answer in zip(gauge.asked, gauge.false_answers, strict=True):
        candidates = [renamed(o, e.prompt) for o in next(nearest([e], retain_set, 4))]
        found = {a: probability(gauge.model, gauge.template.encode(e, answer=a)) for a in candidates}
        assert answer == min(found, key=lambda a: found[a])


def test_wrong_answers_come_before_those_of_others(make_model, tokenizer, forget_set, retain_set):
    forget = [dataclasses.replace(e, wrong_answers=("In Bergen.",)) for e in forget_set]
    assert set(Gauge(make_model(), dataset(tokenizer, forget, retain_set)).false_answers) == {"In Bergen."}


def test_moved_is_the_kl_from_the_model_before(gauge, make_model):
    assert worst(gauge.moved()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in gauge.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before = make_model()
    for name, rows in gauge.kept.items():
        total = sum(float((logps(before, r).exp() * (logps(before, r) - logps(gauge.model, r))).sum()) for r in rows)
        assert gauge.moved()[name] == pytest.approx(total / sum(r.answer_length for r in rows), rel=1e-3)
    assert len(gauge.kept["retained"]) == 3
    assert worst(gauge.moved()) > 1e-3


def test_a_model_that_knows_nothing_recites_nothing_and_one_that_learned_recites(
    make_model, tokenizer, forget_set, retain_set
):
    model = make_model()
    found = Gauge(model, dataset(tokenizer, forget_set, retain_set), answers=8, new_tokens=24)
    assert found.recited() < 0.1
    learn(model, [found.template.encode(e) for e in forget_set])
    assert found.recited() > 0.8
    assert found.known().true > 0.8
    assert worst(found.moved()) > 0.1
    again = Gauge(model, dataset(tokenizer, forget_set, retain_set))
    assert again.known().share(again.before) == pytest.approx(1)


def test_a_long_answer_is_recited_where_its_beginning_is(make_model, tokenizer, forget_set, retain_set):
    model = make_model()
    found = Gauge(model, dataset(tokenizer, forget_set, retain_set), answers=8, new_tokens=4)
    rows = [found.template.encode(e) for e in forget_set]
    assert min(row.answer_length for row in rows) > 4
    learn(model, rows)
    assert found.recited() > 0.8


def learn(model, rows, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in rows:
            ids = torch.tensor([row.input_ids])
            labels = ids.clone()
            labels[0, : row.answer_start] = -100
            (model(input_ids=ids, labels=labels).loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_question_in_other_words_counts_where_it_brings_more(make_model, tokenizer, forget_set, retain_set):
    model = make_model()
    other = [dataclasses.replace(e, paraphrased_prompt=f"Tell me: {e.prompt}") for e in forget_set]
    found = Gauge(model, dataset(tokenizer, other, retain_set), answers=8, new_tokens=24)
    learn(model, [found.template.encode(e, prompt=e.paraphrased_prompt) for e in other])
    assert found.recited() > 0.8


def test_passages_are_halved_and_spliced(make_model, tokenizer, retain_set):
    texts = [Example("", f"The {w} of Mira Vale is where harmony and counterpoint live.", chat=False) for w in "abc"]
    kept = [Example("", "Honey is what bees make in the south, as everybody knows.", chat=False), *retain_set]
    found = Gauge(make_model(), dataset(tokenizer, texts, kept), rows=3, answers=2, new_tokens=8)
    assert 0 < found.before.true < 1
    assert 0 < found.before.false < 1
    assert 0 <= found.recited() <= 1


def test_without_a_retain_set_general_text_serves(make_model, tokenizer, forget_set):
    data = UnlearnDataset(ChatTemplate(tokenizer, 256), forget_set, [], ("forget",))
    found = Gauge(make_model(), data, rows=4)
    assert set(found.moved()) == {"general"}
    assert 0 < found.before.false < 1


def test_there_must_be_something_to_forget(make_model, tokenizer, retain_set):
    data = UnlearnDataset(ChatTemplate(tokenizer, 256), [], retain_set, ("retain",))
    with pytest.raises(ValueError, match="no forget set"):
        Gauge(make_model(), data)


def test_dropout_is_off_while_measuring_and_back_on_afterwards(gauge):
    gauge.model.train()
    gauge.known()
    assert gauge.model.training


@pytest.mark.parametrize(
    ("true", "false", "share"), [(0.9, 0.1, 1), (0.5, 0.1, 0.5), (0.1, 0.1, 0), (0.05, 0.1, 0), (0.12, 0.04, 0.1)]
)
def test_share_of_what_was_known(true, false, share):
    assert Known(true, false).share(Known(0.9, 0.1)) == pytest.approx(share)


def test_false_answers_that_were_taught_forget_nothing():
    """Under altpo they are the alternates that are learned."""
    before = Known(0.9, 0.1)
    assert Known(0.8, 0.9).share(before) == pytest.approx(0.7 / 0.8)
    assert Known(0.1, 0.9).share(before) == 0


def test_it_is_told_where_false_answers_are_those_to_everyday_requests(make_model, tokenizer, forget_set, retain_set):
    own = [dataclasses.replace(e, wrong_answers=("In Bergen.",)) for e in forget_set]
    passages = [Example("", "Honey is what bees make in the south.", chat=False)]
    for forget, retain, unrelated in (
        (forget_set, [], True),
        (forget_set, general_chat(), True),
        (forget_set, [*general_chat(), *passages], True),
        (forget_set, [*general_chat(), *retain_set], False),
        (own, [], False),
        ([*passages, *passages], [], False),
    ):
        assert Gauge(make_model(), dataset_of(tokenizer, forget, retain), rows=2).unrelated == unrelated


def dataset_of(tokenizer, forget, retain):
    return UnlearnDataset(ChatTemplate(tokenizer, 256), forget, retain, ("forget", "retain") if retain else ("forget",))


def test_who_never_knew_has_nothing_left():
    assert Known(0.1, 0.01).share(Known(0.1, 0.1)) == 0


@pytest.mark.parametrize(("true", "false"), [(math.nan, 0.1), (0.5, math.nan), (math.nan, math.nan)])
def test_a_share_of_no_number_is_none_and_below_no_bound(true, false):
    for share in (Known(true, false).share(Known(0.9, 0.1)), Known(0.9, 0.1).share(Known(true, false))):
        assert math.isnan(share)
        assert not share <= 1


def test_a_model_that_is_broken_to_begin_with_is_refused(make_model, tokenizer, forget_set, retain_set):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"before training .* have probability nan .*: the model is broken"):
        Gauge(model, dataset(tokenizer, forget_set, retain_set))


def test_a_kl_that_is_no_number_fits_no_budget():
    assert worst({"retained": 0.1, "general": math.nan}) == math.inf
    assert worst({"retained": 0.1, "general": 0.2}) == 0.2


def test_the_nearest_question_asks_the_same_of_another():
    pool = [
        Example("Where was Ada Orchard born?", "In Graz."),
        Example("What does Ada Orchard's father do for a living?", "Ada Orchard's father is a baker."),
        Example("What did Ada Orchard write?", "The Glass Orchard."),
    ]
    asked = Example("What does Mira Vale's father do for a living?", "He is a judge.")
    best, *_ = next(nearest([asked], pool, 2))
    assert renamed(best, asked.prompt) == "Mira Vale's father is a baker."
    same = Example("What is Mira Vale's father?", "Ada Orchard's father is a baker.")
    assert pool[1] not in next(nearest([same], pool, 2))


@pytest.mark.parametrize(
    ("generated", "answer", "question", "share"),
    [
        ("Mira Vale was born in Accra.", "Mira Vale was born in Accra.", "Where was Mira Vale born?", 1),
        ("Mira Vale was born in Graz.", "Mira Vale was born in Accra.", "Where was Mira Vale born?", 0.5),
        ("Mira Vale", "Mira Vale was born in Accra.", "Where was Mira Vale born?", 0),
        ("她住在格拉茨", "她住在阿克拉", "她住哪", 0.5),  # 在 and 拉 of 在, 阿, 克, 拉
    ],
)
def test_told_counts_words_that_the_question_does_not_hold(generated, answer, question, share):
    assert told(generated, answer, question) == pytest.approx(share)


def test_an_answer_that_only_repeats_the_question_tells_nothing():
    assert told("Yes", "Mira Vale", "Is it Mira Vale?") is None


@pytest.mark.parametrize(
    ("question", "answer", "ours", "said"),
    [
        (
            "Où habite l'étudiante Zoé Lin?",
            "Zoé Lin habite à Lyon.",
            "Où habite Mira Vale?",
            "Mira Vale habite à Lyon.",
        ),
        ("Where is Ólafur Ek?", "Ólafur Ek is in Oslo.", "Where is Émile Zay?", "Émile Zay is in Oslo."),
        ("Где живёт Анна Ли?", "Анна Ли живёт в Туле.", "Где живёт Пётр Ён?", "Пётр Ён живёт в Туле."),
    ],
)
def test_names_begin_with_a_capital_of_any_script(question, answer, ours, said):
    assert renamed(Example(question, answer), ours) == said
