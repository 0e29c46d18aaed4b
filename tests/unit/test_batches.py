from __future__ import annotations

import collections
import dataclasses
import itertools

import pytest
import torch

from soul.data.batches import VIEWS, Pairing, PairSampler, UnlearnDataset, collate_items, collate_rows, length_batches
from soul.data.templates import ChatTemplate, Encoded
from soul.types import Example

ALL = ("forget", "refusal", "retain")


@pytest.fixture
def make_dataset(tokenizer, forget_set, retain_set, refusals):
    def make(views=ALL, seed=0):
        return UnlearnDataset(ChatTemplate(tokenizer), forget_set, retain_set, views, refusals, seed)

    return make


@pytest.mark.parametrize(("anchors", "partners"), [(8, 10), (8, 8), (20, 7), (5, 1)])
def test_partners_are_drawn_without_replacement(anchors, partners):
    pairs = Pairing(anchors, partners, seed=3).epoch(2)
    assert sorted(a for a, _ in pairs) == list(range(anchors))
    used = collections.Counter(p for _, p in pairs)
    assert set(used) <= set(range(partners))
    assert len(used) == min(anchors, partners)
    assert max(used.values()) == -(-anchors // partners)  # none again before all others were used
    assert min(used.values()) >= anchors // partners


def test_pairing_depends_on_seed_and_epoch_alone():
    pairing = Pairing(20, 30, seed=5)
    later = pairing.epoch(4)
    assert pairing.epoch(0) != later
    assert Pairing(20, 30, seed=5).epoch(4) == later  # not on the epochs seen before
    assert Pairing(20, 30, seed=6).epoch(4) != later


def test_no_partner_set():
    assert sorted(Pairing(3, 0, seed=0).epoch(0)) == [(0, -1), (1, -1), (2, -1)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_sampler_walks_the_anchors_once(make_dataset, batch_size):
    dataset = make_dataset()
    sampler = PairSampler(dataset, batch_size)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(a for batch in batches for _, a, _ in batch) == list(range(len(dataset)))
    assert sorted((a, p) for batch in batches for _, a, p in batch) == sorted(dataset.pairing.epoch(0))
    assert max(map(len, batches)) <= batch_size


def test_sampler_is_a_function_of_seed_and_epoch(make_dataset):
    fresh, used = PairSampler(make_dataset(), 2), PairSampler(make_dataset(), 2)
    first = list(used)
    list(used)
    for sampler in (fresh, used):
        sampler.set_epoch(3)
    assert list(fresh) == list(used) != first
    assert list(PairSampler(make_dataset(), 2)) == first
    assert list(PairSampler(make_dataset(seed=1), 2)) != first


def test_sampler_puts_similar_lengths_together(make_dataset):
    dataset = make_dataset()
    lengths = [[dataset.length(a, p) for _, a, p in batch] for batch in PairSampler(dataset, 2)]
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))


def test_collate_masks(tokenizer):
    rows = [Encoded((5, 6, 7, 1), 2), Encoded((8, 9), 1), Encoded((1, 1, 1), 1)]
    batch = collate_rows(rows, ["forget", "refusal", "retain"], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 9, 1, 1], [1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["answer_mask"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert batch["view"].tolist() == [0, 1, 2]
    assert batch["key"].tolist() == [row.key for row in rows]


def test_collate_items_orders_rows_view_by_view(make_dataset):
    dataset = make_dataset()
    items = [dataset[0, a, p] for a, p in ((0, 3), (4, 1))]
    batch = collate_items(items)
    assert [VIEWS[v] for v in batch["view"]] == ["forget", "forget", "refusal", "refusal", "retain", "retain"]
    assert batch["key"].tolist() == [item[view].key for view in ALL for item in items]


def test_refusals_change_with_the_epoch_and_are_known_beforehand(make_dataset):
    dataset, other = make_dataset(), make_dataset()
    seen = {dataset[e, a, 0]["refusal"].key for e in range(5) for a in range(len(dataset))}
    assert {row.key for row in other.rows("refusal", 5)} == seen
    assert len({dataset[e, 0, 0]["refusal"].key for e in range(8)}) > 1
    assert [other.refusal(4, a) for a in range(8)] == [dataset.refusal(4, a) for a in range(8)]


@pytest.mark.parametrize("chat", [True, False])
def test_what_replaces_a_piece_ends_as_it_would_itself(tokenizer, forget_set, retain_set, chat):
    """Nothing ends after a piece of a book, but after a refusal in its place the turn does."""
    template = ChatTemplate(tokenizer)
    piece = Example("Alice was", "beginning to get", chat=chat, ends=False, wrong_answers=("about to",))
    views = ("forget", "refusal", "retain", "alternate", "mismatch", "retain_refusal")

    def ended(retained):
        item = UnlearnDataset(template, [piece], [retained], views, ["No idea."])[0, 0, 0]
        return {name for name, row in item.items() if row.input_ids[-1] == template.end_of_turn}

    assert ended(retain_set[0]) == {"refusal", "retain", "mismatch", "retain_refusal"}
    assert ended(piece) == {"refusal", "retain_refusal"}
    whole = UnlearnDataset(template, forget_set, retain_set, views[:3], ["No idea."]).refusal(0, 0)
    assert whole == template.encode(dataclasses.replace(forget_set[0], answer="No idea."))


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_reference_is_asked_about_what_is_shown_alone(tokenizer, forget_set, retain_set, epochs):
    """A large retain set is not walked through for the few of it that a short run meets."""
    views = ("forget", "retain", "retain_refusal")
    dataset, other = (
        UnlearnDataset(ChatTemplate(tokenizer), forget_set[:2], retain_set, views, ["No.", "Never."]) for _ in range(2)
    )
    for view in views:
        shown = {
            dataset[key][view].key
            for epoch in range(epochs)
            for key in ((epoch, a, p) for a, p in dataset.pairing.epoch(epoch))
        }
        assert {row.key for row in other.rows(view, epochs)} == shown
    assert len(dataset.rows("retain", epochs)) <= 2 * epochs


@pytest.mark.parametrize(
    ("views", "forget", "retain", "phrases", "message"),
    [
        (("forget",), False, True, True, "needs a forget set"),
        (("forget", "retain"), True, False, True, "needs a retain set"),
        (("refusal",), True, True, False, "at least one refusal"),
    ],
)
def test_missing_sets_are_named(tokenizer, forget_set, retain_set, refusals, views, forget, retain, phrases, message):
    with pytest.raises(ValueError, match=message):
        UnlearnDataset(
            ChatTemplate(tokenizer),
            forget_set if forget else [],
            retain_set if retain else [],
            views,
            refusals if phrases else [],
        )


@pytest.mark.parametrize("view", ["refusal", "mismatch", "retain_refusal"])
def test_a_passage_leaves_nothing_to_answer(tokenizer, forget_set, retain_set, view):
    """Bare refusals would be learned, and nothing of the passage would be forgotten."""
    passage = Example("", "Once upon a time.", id="tale", chat=False)
    sets = {"forget": forget_set, "retain": retain_set}
    name = "retain" if view == "retain_refusal" else "forget"
    UnlearnDataset(ChatTemplate(tokenizer), **sets, views=(view, "retain"), refusals=["No."])
    sets[name] = [*sets[name], passage]
    with pytest.raises(ValueError, match=rf"answers the {name} set otherwise.* 1 of its .*'tale'.*such as npo"):
        UnlearnDataset(ChatTemplate(tokenizer), **sets, views=(view, "retain"), refusals=["No."])
    UnlearnDataset(ChatTemplate(tokenizer), **sets, views=("forget", "retain"))


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
@pytest.mark.parametrize("most", [1, 3, 256])
def test_length_batches_cover_everything_within_budget(budget, most):
    lengths = torch.randint(1, 60, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = length_batches(lengths, budget, most)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        assert len(batch) <= most
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    if budget == 10_000 and most == 256:
        assert len(batches) == 1


def test_no_rows_no_batches():
    assert length_batches([], 100) == []


@pytest.mark.parametrize(("size", "world"), [(2, 2), (3, 2), (4, 3), (5, 8)])
def test_processes_divide_the_batches_of_one(make_dataset, size, world):
    """Together they have the same batches in each window, and who has none left idles on the first."""
    dataset = make_dataset()
    whole = list(PairSampler(dataset, size))
    parts = [PairSampler(dataset, size, process=(rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(list(part)) for part in parts} == {-(-len(whole) // world)}
    turns = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert turns[: len(whole)] == whole
    for batch in turns[len(whole) :]:
        assert [(~epoch, *pair) for epoch, *pair in batch] == whole[0]
        idle = collate_items([dataset[key] for key in batch])
        busy = collate_items([dataset[key] for key in whole[0]])
        assert "idle" not in busy
        assert bool(idle.pop("idle"))
        assert all(torch.equal(value, busy[name]) for name, value in idle.items())
