"""How much a run puts through its model: rows, tokens and answer tokens of a step, a curvature pass, a reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from soul.benchmarks.request import DeletionRequest
from soul.curvature.estimators import ESTIMATORS
from soul.curvature.passes import CurvaturePasses
from soul.curvature.picks import source_rows, text_rows
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import PairSampler, UnlearnDataset
from soul.data.general import general_text
from soul.data.guard import set_system_turn
from soul.data.sources import is_hub_id, listed, load_examples
from soul.inputs import read_refusals
from soul.pretrained import load_tokenizer
from soul.recipe import Recipe
from soul.run import default_benchmark
from soul.trainer import make_dataset
from soul.types import Example

SAMPLE = 256
"""Examples of each set that are tokenised; more of them would change a mean by a few percent."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A padded micro-batch.

    Attributes:
        rows: Rows.
        width: Tokens of each, padding included.
        answers: Positions of all rows that the head is applied to.
    """

    rows: float
    width: float
    answers: float

    @property
    def positions(self) -> float:
        """Tokens that go through the model's body."""
        return self.rows * self.width


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an evaluation asks of a model.

    Attributes:
        answers: Answers that it writes.
        likelihoods: Answers, paraphrases and wrong answers whose likelihood is measured.
    """

    answers: int
    likelihoods: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run puts through its model.

    Attributes:
        typical: A micro-batch as it is on average.
        largest: The largest one, which decides how much memory is needed.
        curvature: A micro-batch of a curvature pass; None where no passes are made.
        reference: All rows that the reference is asked about, as one batch; None where it is asked nothing beforehand.
        items: Items of an epoch; 0 where the data are not at hand.
        source: Where the lengths are from.
        cut: What of the data ``training.max_length`` cuts, in words; empty where nothing is.
        measured: What the model is asked before training, and again after it; None where that is not told cheaply.
    """

    typical: Batch
    largest: Batch
    curvature: Batch | None
    reference: Batch | None
    items: int
    source: str
    cut: str = ""
    measured: Measured | None = None


def resized(work: Work, factor: float) -> Work:
    """Return the work with ``factor`` times the rows in a micro-batch of training."""

    def part(batch: Batch) -> Batch:
        return Batch(batch.rows * factor, batch.width, batch.answers * factor)

    return dataclasses.replace(work, typical=part(work.typical), largest=part(work.largest))


def curvature_of(recipe: Recipe) -> CurvatureSpec | None:
    """Return the spec of the curvature passes that a recipe's rule makes."""
    spec = getattr(recipe.optimizer, "curvature", None) if recipe.optimizer.needs_curvature else None
    return spec if spec is not None and ESTIMATORS[spec.estimator].needs_pass else None


def find_work(recipe: Recipe, length: int = 0, answer: int = 0) -> Work:
    """Tokenise a sample of the data where they are on this machine; take given lengths, or the longest, where not.

    Args:
        recipe: What is planned.
        length: Tokens of a row; 0 looks into the data, and takes ``training.max_length`` where there are none.
        answer: Answer tokens of a row; 0 for half of them, where the data do not tell.

    Raises:
        ValueError: Data that are here cannot be read, or lengths make no sense.
    """
    if length < 0 or not 0 <= answer <= (length or recipe.training.max_length):
        raise ValueError(f"--length {length} and --answer {answer} must be 0 or more, and answers no longer than rows")
    sources = [*recipe.data.forget_sources, *recipe.data.retain_sources, *recipe.data.curvature_sources]
    for source in sources if not (length or answer) else ():
        if source and not _is_here(source) and not is_hub_id(source.partition(",")[0]):
            load_examples(source)  # says that there is no such file
    here = any(sources) and all(_is_here(source) for source in sources if source)
    if length or answer or not here:
        return _assumed(recipe, length or recipe.training.max_length, answer)
    return _counted(recipe)


def _is_here(source: str) -> bool:
    scheme = source.partition(":")[0]
    return scheme in ("people", "general") or Path(source.partition(",")[0]).expanduser().exists()


def _assumed(recipe: Recipe, length: int, answer: int) -> Work:
    objective, training = recipe.objective, recipe.training
    answer = answer or max(1, length // 2)
    rows = training.batch_size * len(objective.views)
    batch = Batch(rows, length, rows * answer)
    spec, curvature = curvature_of(recipe), None
    if spec:
        rows = spec.batch + spec.general_text
        curvature = Batch(rows, length, rows * answer)
    steps = training.max_steps * training.accumulation
    asked = steps * training.batch_size * len(_asked(recipe))
    reference = Batch(asked, length, asked * answer) if asked else None
    source = f"rows of {length} tokens, {answer} of them answers (the data are not at hand, or lengths were given)"
    return Work(batch, batch, curvature, reference, steps * training.batch_size, source)


def _asked(recipe: Recipe) -> tuple[str, ...]:
    objective = recipe.objective
    return tuple(dict.fromkeys((*objective.needs_logps, *objective.needs_distributions, *objective.needs_states)))


def _counted(recipe: Recipe) -> Work:
    data, training, objective = recipe.data, recipe.training, recipe.objective
    forget = [example for source in data.forget_sources for example in load_examples(source)]
    retain = [example for source in data.retain_sources for example in load_examples(source)]
    if not retain and recipe.needs_anchors:
        retain = load_examples("general:chat")  # the model's own samples cannot be had without it
    own = [example for source in data.curvature_sources for example in load_examples(source)]
    named = recipe.model
    tokenizer = load_tokenizer(named.path, named.revision, trust_remote_code=named.trust_remote_code)
    refusals = read_refusals(data.refusals)
    if recipe.model.system:
        set_system_turn(tokenizer, recipe.model.system)
    dataset = make_dataset(tokenizer, _some(forget), _some(retain), objective, training, refusals, _some(own))
    batches = _batches(dataset, training.batch_size)
    largest, read = list(batches), [dataset]
    if max(len(forget), len(retain)) > SAMPLE:  # the longest texts decide about memory, and a sample may lack them
        lost, kept, also = (_longest(examples, training.batch_size) for examples in (forget, retain, own))
        rare = make_dataset(tokenizer, lost, kept, objective, training, refusals, also)
        largest += _batches(rare, training.batch_size)
        read.append(rare)
    mean = sum(b.positions for b in batches) / sum(b.rows for b in batches)
    typical = Batch(*(sum(getattr(b, name) for b in batches) / len(batches) for name in ("rows", "width", "answers")))
    typical = dataclasses.replace(typical, width=mean)
    anchors = len(forget if dataset.anchor == "forget" else retain)
    asked = [row for view in _asked(recipe) for row in dataset.rows(view, 1)]
    many = {"forget": len(forget), "retain": min(len(retain), anchors * _epochs(recipe, anchors))}
    scale = max(1.0, sum(many[v if v in many else "forget"] for v in _asked(recipe)) / max(1, len(asked)))
    rows = len(asked) * scale
    reference = (
        Batch(rows, sum(map(len, asked)) / len(asked), rows * sum(r.answer_length for r in asked) / len(asked))
        if asked
        else None
    )
    return Work(
        typical,
        max(largest, key=lambda b: (b.positions, b.answers)),
        _curvature_batch(recipe, dataset),
        reference,
        anchors,
        f"{len(forget)} to forget, {len(retain)} to keep, "
        + ("tokenised" if max(len(forget), len(retain), len(own)) <= SAMPLE else f"{SAMPLE} of each tokenised"),
        _cut({"forget": len(forget), "retain": len(retain)}, read),
        _measured(recipe),
    )


def _cut(sizes: Mapping[str, int], read: Sequence[UnlearnDataset]) -> str:
    """Say of which sets how many rows are too long; of a set that is not tokenised whole, how many at least."""
    found = []
    for name, size in sizes.items():
        if count := max(sum(row.lost > 0 for row in dataset.encoded[name]) for dataset in read):
            least = "at least " if size > SAMPLE else ""
            found.append(f"{least}{count} of {size} {name} items")
    what = "longer than training.max_length: the rest of each will not be trained on"
    return f"{' and '.join(found)} are {what}" if found else ""


def _measured(recipe: Recipe) -> Measured | None:
    """Count what judging the run by its request takes; other benchmarks may have to be fetched first."""
    benchmark = recipe.benchmark or default_benchmark(recipe)
    if not isinstance(benchmark, DeletionRequest):
        return None
    sources = [
        s for part in (benchmark.forget, benchmark.kept, benchmark.general, benchmark.text) for s in listed(part)
    ]
    if not all(_is_here(source) for source in sources if source):
        return None
    items = [example for split in benchmark.splits().values() for example in split]
    return Measured(
        answers=sum(bool(e.prompt) for e in items) if recipe.evaluation.generate else 0,
        likelihoods=sum(1 + (e.paraphrased_answer is not None) + len(e.wrong_answers) for e in items),
    )


def _epochs(recipe: Recipe, anchors: int) -> int:
    """Return of how many epochs the trainer asks the reference; an epoch's last window may be short, and is a step."""
    training = recipe.training
    steps = max(1, -(-anchors // (training.batch_size * training.accumulation)))
    if training.max_steps:
        return -(-training.max_steps // steps) + 1
    return math.ceil(recipe.stop.epochs(steps, training.epochs))


def _some(examples: Sequence[Example]) -> Sequence[Example]:
    return examples[:: max(1, -(-len(examples) // SAMPLE))]


def _longest(examples: Sequence[Example], n: int) -> Sequence[Example]:
    return sorted(examples, key=lambda e: len(e.prompt) + len(e.answer), reverse=True)[:n]


def _batches(dataset: UnlearnDataset, size: int) -> list[Batch]:
    found = []
    for keys in PairSampler(dataset, size):
        rows = [row for key in keys for row in dataset[key].values()]
        found.append(Batch(len(rows), max(map(len, rows)), sum(row.answer_length for row in rows)))
    return found


def _curvature_batch(recipe: Recipe, dataset: UnlearnDataset) -> Batch | None:
    spec = curvature_of(recipe)
    if spec is None:
        return None
    text = text_rows(dataset) if spec.general_text and general_text() else ()
    passes = CurvaturePasses(spec, source_rows(dataset, spec.source), text, seed=recipe.training.seed)
    picked = [[pick.row for pick in picks] for picks in passes.plan(0)]
    widths = [max(map(len, rows)) for rows in picked]
    return Batch(
        sum(map(len, picked)) / len(picked),
        sum(w * len(rows) for w, rows in zip(widths, picked, strict=True)) / sum(map(len, picked)),
        sum(row.answer_length for rows in picked for row in rows) / len(picked),
    )
