"""Pairing, length buckets and collation: what one training step sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from soul.data.templates import ChatTemplate, Encoded, ends
from soul.types import Example

VIEWS = ("forget", "refusal", "retain", "alternate", "mismatch", "retain_refusal")
"""Roles a row of a batch can play; ``batch["view"]`` holds positions in this tuple.

The question of a forget example comes with its own answer (``forget``), a refusal, one of its wrong answers
(``alternate``) or the answer of a retain example (``mismatch``); that of a retain example with its own answer
(``retain``) or a refusal (``retain_refusal``). A refusal ends its turn, and another's answer where that one does, also
in the place of a piece after which nothing ends.
"""
_ABOUT_FORGET = ("forget", "refusal", "alternate", "mismatch")

Batch = dict[str, torch.Tensor]
Item = dict[str, Encoded]
Key = tuple[int, int, int]
"""``(epoch, anchor, partner)`` of an item; ``(~epoch, anchor, partner)``, with a negative number, of an idle one."""


class Idle(dict[str, Encoded]):
    """An item in a batch that is there so that all processes run alike, and counts nothing."""


def collate_rows(rows: Sequence[Encoded], views: Sequence[str] | None = None, pad_id: int = 0) -> Batch:
    """Pad ``rows`` on the right to the longest of them.

    Padding is told from content by length and never by token id, so a real end-of-turn token stays visible where the
    pad token is the end token.

    Returns:
        ``input_ids`` (B, T) int64, ``attention_mask`` (B, T) int64, ``answer_mask`` (B, T) bool (True at positions
        that hold an answer token, i.e. a target), ``view`` (B,), ``key`` (B,) the content's name.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor([row.answer_start for row in rows])
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.input_ids)
    position = torch.arange(width)
    attention = position < lengths[:, None]
    names = views or ["retain"] * len(rows)
    return {
        "input_ids": ids,
        "attention_mask": attention.long(),
        "answer_mask": attention & (position >= starts[:, None]),
        "view": torch.tensor([VIEWS.index(name) for name in names]),
        "key": torch.tensor([row.key for row in rows]),
    }


def collate_items(items: Sequence[Item], pad_id: int = 0) -> Batch:
    """Collate paired items so that all views go through the model in one forward pass.

    An item may have further rows of a view, named ``retain+1``. A batch of :class:`Idle` items has a further entry
    ``idle``.
    """
    rows = [
        (row, view) for view in VIEWS for item in items for name, row in item.items() if name.partition("+")[0] == view
    ]
    batch = collate_rows([row for row, _ in rows], [view for _, view in rows], pad_id)
    return batch | {"idle": torch.tensor(True)} if isinstance(items[0], Idle) else batch


def fitting(max_tokens: int, device: torch.device) -> int:
    """Return how many tokens a batch is best made of, at most ``max_tokens``: on a CPU, what its caches hold.

    On a processor with 2 MiB a core, two threads measure likelihoods 1.2 to 1.5 times faster in batches of 1,024 tokens
    than of 4,096 (``benchmarks/batch_tokens.py``), and a batch takes less memory.
    """
    if device.type != "cpu":
        return max_tokens
    return min(max_tokens, max(1024, 512 * torch.get_num_threads()))


def length_batches(lengths: Sequence[int], max_tokens: int, max_rows: int = 256) -> list[list[int]]:
    """Group positions into batches of similar length, longest first, with at most ``max_tokens`` padded tokens each."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens and len(batches[-1]) < max_rows:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which retain example accompanies which forget example in which epoch.

    An epoch walks through the anchor set once (forget, or retain where the objective looks at nothing else). Each
    anchor gets a partner without replacement: a partner repeats within an epoch only when the partner set is the
    smaller one, and then only after all others were used.

    Attributes:
        anchors: Size of the anchor set.
        partners: Size of the partner set; 0 where there is none.
        seed: Seed; with the epoch it decides everything.
    """

    anchors: int
    partners: int
    seed: int

    def epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Return ``(anchor, partner)`` for each item of the epoch, shuffled; partner is -1 where there is none."""
        rng = np.random.default_rng([self.seed, epoch, 1])
        order = rng.permutation(self.anchors)
        drawn: list[int] = []
        while self.partners and len(drawn) < self.anchors:
            drawn.extend(rng.permutation(self.partners).tolist())
        return [(int(a), drawn[i] if self.partners else -1) for i, a in enumerate(order)]


class UnlearnDataset(Dataset[Item]):
    """Forget, retain and refusal examples, tokenised once, addressed by ``(epoch, anchor, partner)``.

    Args:
        template: How text becomes tokens.
        forget: Examples to forget (may be empty where the objective needs none).
        retain: Examples to keep.
        views: What the objective looks at.
        refusals: Phrasings of "I don't know" for the ``refusal`` view.
        seed: Seed of the choice of phrasing, which depends on (seed, epoch, example) only.
        curvature: Examples that curvature passes look at in place of ``retain``; the retain set where empty.
    """

    def __init__(
        self,
        template: ChatTemplate,
        forget: Sequence[Example],
        retain: Sequence[Example],
        views: Sequence[str],
        refusals: Sequence[str] = (),
        seed: int = 0,
        curvature: Sequence[Example] = (),
    ) -> None:
        if isinstance(refusals, str):
            raise ValueError(f"refusals must be a list of sentences, not the text {refusals!r:.60}")
        _check_views(views, forget, retain, refusals)
        self.template, self.views, self.refusals, self.seed = template, tuple(views), tuple(refusals), seed
        self.examples = {"forget": list(forget), "retain": list(retain)}
        self.curvature = [template.encode(e, index=i, where="curvature") for i, e in enumerate(curvature)]
        self.encoded = {
            name: [template.encode(e, index=i, where=name) for i, e in enumerate(examples)] if self._uses(name) else []
            for name, examples in self.examples.items()
        }
        self.anchor = "forget" if self._uses("forget") else "retain"
        partner = len(self.encoded["retain"]) if self.anchor == "forget" else 0
        self.pairing = Pairing(len(self.encoded[self.anchor]), partner, seed)
        self._answered: dict[tuple[str, int, str, bool], Encoded] = {}

    def _uses(self, name: str) -> bool:
        return any(view in self.views for view in (_ABOUT_FORGET if name == "forget" else ("retain", "retain_refusal")))

    def __len__(self) -> int:
        return self.pairing.anchors

    def __getitem__(self, key: Key) -> Item:
        epoch, anchor, partner = key
        return self._item(epoch, anchor, partner) if epoch >= 0 else Idle(self._item(~epoch, anchor, partner))

    def _item(self, epoch: int, anchor: int, partner: int) -> Item:
        item: Item = {}
        if self.anchor == "retain":
            return {"retain": self.encoded["retain"][anchor]}
        if "forget" in self.views:
            item["forget"] = self.encoded["forget"][anchor]
        if "refusal" in self.views:
            item["refusal"] = self.refusal(epoch, anchor)
        if "retain" in self.views:
            item["retain"] = self.encoded["retain"][partner]
        if "alternate" in self.views:
            item["alternate"] = self.alternate(epoch, anchor)
        if "mismatch" in self.views:
            item["mismatch"] = self.mismatch(epoch, anchor)
        if "retain_refusal" in self.views:
            item["retain_refusal"] = self.retain_refusal(epoch, partner)
        return item

    def refusal(self, epoch: int, anchor: int) -> Encoded:
        """Return the forget question with the refusal it gets in this epoch."""
        pick = int(np.random.default_rng([self.seed, epoch, anchor, 2]).integers(len(self.refusals)))
        return self._answer("forget", anchor, self.refusals[pick], whole=True)

    def alternate(self, epoch: int, anchor: int) -> Encoded:
        """Return the forget question with the wrong answer it gets in this epoch."""
        example = self.examples["forget"][anchor]
        pick = int(np.random.default_rng([self.seed, epoch, anchor, 4]).integers(len(example.wrong_answers)))
        return self._answer("forget", anchor, example.wrong_answers[pick], whole=example.ends)

    def mismatch(self, epoch: int, anchor: int) -> Encoded:
        """Return the forget question with the answer of the retain example it gets in this epoch."""
        others = self.examples["retain"]
        pick = int(np.random.default_rng([self.seed, epoch, anchor, 6]).integers(len(others)))
        return self._answer("forget", anchor, others[pick].answer, whole=ends(others[pick]))

    def retain_refusal(self, epoch: int, partner: int) -> Encoded:
        """Return the retain question with the refusal it gets in this epoch."""
        pick = int(np.random.default_rng([self.seed, epoch, partner, 7]).integers(len(self.refusals)))
        return self._answer("retain", partner, self.refusals[pick], whole=True)

    def _answer(self, name: str, index: int, answer: str, *, whole: bool) -> Encoded:
        """Return a question with another answer, and an end of turn where that is ``whole``."""
        key = (name, index, answer, whole)
        if key not in self._answered:
            example = dataclasses.replace(self.examples[name][index], ends=whole)
            self._answered[key] = self.template.encode(example, answer=answer, index=index)
        return self._answered[key]

    def length(self, anchor: int, partner: int) -> int:
        """Return the longest row of a pair, for length buckets."""
        lengths = [len(self.encoded[self.anchor][anchor])]
        if partner >= 0:
            lengths.append(len(self.encoded["retain"][partner]))
        return max(lengths)

    def rows(self, view: str, epochs: int) -> list[Encoded]:
        """Return every distinct row that ``view`` shows in ``epochs`` epochs (what a reference has to know)."""
        shown = [(e, anchor, partner) for e in range(epochs) for anchor, partner in self.pairing.epoch(e)]
        if view in self.encoded:
            places = {anchor if view == self.anchor else partner for _, anchor, partner in shown}
            rows = [self.encoded[view][i] for i in sorted(places) if i >= 0]
        elif view == "retain_refusal":
            rows = [self.retain_refusal(e, partner) for e, _, partner in shown]
        else:
            rows = [getattr(self, view)(e, anchor) for e, anchor, _ in shown]
        return list({row.key: row for row in rows}.values())


def _check_views(
    views: Sequence[str], forget: Sequence[Example], retain: Sequence[Example], refusals: Sequence[str]
) -> None:
    """Make sure that the data hold what the objective looks at, and something to answer where answers are replaced."""
    for view, examples, what in (("forget", forget, "a forget set"), ("retain", retain, "a retain set")):
        if view in views and not examples:
            raise ValueError(f"this objective needs {what}, and none was given")
    if "refusal" in views and not (forget and refusals):
        raise ValueError("this objective needs a forget set and at least one refusal")
    if "mismatch" in views and not (forget and retain):
        raise ValueError("this objective needs a forget set, and a retain set to take other answers from")
    if "alternate" in views:
        lacking = [example.id or example.prompt for example in forget if not example.wrong_answers]
        if lacking or not forget:
            raise ValueError(
                "this objective needs a forget set with other answers of the same kind (column perturbed_answer: a "
                f"text or a list); {len(lacking)} of {len(forget)} examples have none"
                + (f", for one {lacking[0]!r}" if lacking else "")
            )
    for name, examples, replaced in (
        ("forget", forget, ("refusal", "mismatch")),
        ("retain", retain, ("retain_refusal",)),
    ):
        bare = [example.id or example.answer for example in examples if not (example.prompt or example.history)]
        if bare and any(view in views for view in replaced):
            ways = "an objective that needs none, such as npo or grad_diff"
            raise ValueError(
                f"this objective answers the {name} set otherwise (with refusals or others' answers), and "
                f"{len(bare)} of its {len(examples)} rows are texts without a prompt, which leave nothing to answer, "
                f"for one {bare[0]!r:.60}: give questions with answers, or prompts with completions, or take {ways}"
                + (" (samples of the model are such texts, too: data.anchors=general)" if name == "retain" else "")
            )


class PairSampler(Sampler[list[Key]]):
    """Batches of ``(epoch, anchor, partner)``: shuffled, bucketed by length, a function of (seed, epoch) alone.

    Several processes take turns: of an epoch's batches, process ``r`` of ``R`` has those numbered ``r, r + R, ...``, so
    that together they have in each window what one process has in a window of ``R`` times as many. Where batches run
    out before all have had one, the rest run the epoch's first again and count nothing (:class:`Idle`).

    Args:
        dataset: What is sampled.
        batch_size: Pairs in a batch.
        bucket: Batches whose pairs are sorted by length together; 1 keeps the pure shuffle.
        process: Rank of this process and the number of processes.
    """

    def __init__(
        self, dataset: UnlearnDataset, batch_size: int, bucket: int = 8, process: tuple[int, int] = (0, 1)
    ) -> None:
        self.dataset, self.batch_size, self.bucket = dataset, batch_size, bucket
        self.rank, self.world = process
        self.drop_last = False  # accelerate asks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration shows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        batches = self._whole()
        mine = batches[self.rank :: self.world]
        if len(mine) < len(self):
            mine.append([(~epoch, anchor, partner) for epoch, anchor, partner in batches[0]])
        return iter(mine)

    def _whole(self) -> list[list[Key]]:
        """Return the batches of all processes."""
        pairs = self.dataset.pairing.epoch(self._epoch)
        window = self.batch_size * self.bucket
        batches: list[list[Key]] = []
        for start in range(0, len(pairs), window):
            chunk = sorted(pairs[start : start + window], key=lambda p: -self.dataset.length(*p))
            keyed = [(self._epoch, a, p) for a, p in chunk]
            batches += [keyed[i : i + self.batch_size] for i in range(0, len(keyed), self.batch_size)]
        order = np.random.default_rng([self.dataset.seed, self._epoch, 3]).permutation(len(batches))
        return [batches[i] for i in order]
