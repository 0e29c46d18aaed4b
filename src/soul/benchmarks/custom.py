"""An audit of a person's own request, from questions or from raw documents: greedy, reworded and sampled leakage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from soul.benchmarks.base import PRIVATE, Benchmark, Rows, nameless
from soul.benchmarks.request import reworded
from soul.benchmarks.tofu import forget_quality_scores, numbered
from soul.data.documents import Document, is_documents, read_documents
from soul.data.probes import Form, cloze, continuations
from soul.data.sources import listed, load_examples
from soul.metrics import tofu
from soul.metrics.leakage import best_rouge, contains
from soul.metrics.memorization import answer_matches, exact_memorization, extraction_strength
from soul.metrics.perplexity import perplexity_score
from soul.metrics.stats import SHARE, bootstrap_mean
from soul.registry import BENCHMARKS
from soul.types import Ask, Example, Row, Score

Probes = Literal["both", "cloze", "continuation"]
Measure = Callable[[Any], float]
"""From a row that has what the measure needs to its value."""

_FACTS: dict[str, Measure] = {
    "probability": lambda row: math.exp(-row["nll"]),
    "rougeL_recall": lambda row: row["rougeL_recall"],
    "contains": lambda row: float(contains(row["generated"], row["answer"])),
    "exact_memorization": lambda row: exact_memorization(answer_matches(row)),
    "extraction_strength": lambda row: extraction_strength(answer_matches(row)),
    "truth_ratio": lambda row: tofu.truth_ratio_utility(tofu.truth_ratio(row, "geometric")),
}
_NEEDS = {
    "probability": "nll",
    "rougeL_recall": "rougeL_recall",
    "contains": "generated",
    "exact_memorization": "token_matches",
    "extraction_strength": "token_matches",
    "truth_ratio": "wrong_nll",
}
_BLANK_TOKENS = 24
"""Longest answer to a blank, where the true ones are shorter."""


@BENCHMARKS.register("custom")
@dataclasses.dataclass(frozen=True)
class Custom(Benchmark):
    """One's own request, audited: is anything of it still said, greedily, in other words, or in one of n samples?

    ``request`` is the quick judgement of a run; this one looks harder, and takes raw documents too. On each ``forget``
    split: ``probability`` ``exp(-nll)``, ``rougeL_recall``, ``contains`` (the answer's words stand in the greedy
    answer), ``exact_memorization`` and ``extraction_strength`` (:mod:`soul.metrics.memorization`), ``truth_ratio``
    where there are wrong answers, and over n samples ``rougeL_recall_best_of_n`` and ``contains_any_of_n``
    (:mod:`soul.metrics.leakage`; best of n as arXiv 2410.03523 argues for). ``leaked`` counts an item where the greedy
    answer or any sample contains it. The same without samples on ``retain`` splits and ``general``; ``perplexity`` on
    ``text``. Items with a subject (a person, a document) are resampled by subject. Against a retained model the paired
    differences of what is said, ``rougeL_recall_over_reference``, ``leaked_over_reference`` and so on (by chance a text
    holds a date or a name, the oftener the more is said), and ``forget_quality`` where there are wrong answers.

    Answers get as many new tokens as the longest true one of their split has, or ``evaluation.max_new_tokens`` where
    that is more.

    Args:
        forget: What was to be forgotten: a source of examples; a ``.txt`` or ``.md`` file or a folder of them; or rows
            of ``{"text": ...}``; or a list of several. Of documents, probes are made (:mod:`soul.data.probes`).
        retain: What was to be kept, likewise; empty for none.
        paraphrases: A source of the forgotten questions in other words, several for one where you like, beside those
            that rows of ``forget`` carry.
        general: Source of general facts with wrong answers; empty for none.
        text: Source of plain passages; empty for none.
        probes: Of documents: ``cloze``, ``continuation`` or ``both``.
        form: Cloze as a ``question`` with a blank, or as a ``continuation`` up to the span.
        per_document: Most probes of each kind a document.
        passage_words: Words of a passage to continue, half of them given.
        samples: Sampled answers an item; 0 for none.
        temperature: Temperature of the samples.
        top_p: Nucleus of the samples; 1 for all tokens.
        seed: Seed of probes, samples and intervals.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Custom(forget="letters/").samples
        8
    """

    # 4: other names asked for, answers to blanks shorter; 3: text held out; memorization without the end of turn
    version: ClassVar[int] = 4
    citation: ClassVar[str] = "Metrics of TOFU (arXiv 2401.06121) and of sampled leakage (arXiv 2410.03523)"
    private_text: ClassVar[bool] = True
    local: ClassVar[dict[str, str]] = {"forget": "forget.jsonl", "retain": "retain.jsonl"}

    forget: str | list[str] = ""
    retain: str | list[str] = ""
    paraphrases: str = ""
    general: str = "general:facts"
    text: str = "general:heldout_text"
    probes: Probes = "both"
    form: Form = "question"
    per_document: int = 8
    passage_words: int = 80
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes not in ("both", "cloze", "continuation"):
            raise ValueError(f"probes must be both, cloze or continuation, not {self.probes!r}")
        if self.form not in ("question", "continuation"):
            raise ValueError(f"form must be question or continuation, not {self.form!r}")
        if self.per_document < 1 or self.passage_words < 8:
            raise ValueError("per_document must be 1 or more, and passage_words 8 or more")
        self._ask()  # samples, temperature and top_p speak for themselves

    def missing(self) -> dict[str, str]:
        """Say that there is no request where none was given."""
        return {} if self.forget else {"forget": "your own: give forget=FILE with what was to be forgotten"}

    def splits(self) -> dict[str, list[Example]]:
        """Load or make the splits that have a source.

        Raises:
            ValueError: There is no ``forget`` source, or a source cannot be read.
        """
        if not self.forget:
            raise ValueError("the custom benchmark needs what was to be forgotten: forget=FILE, or a folder of text")
        splits = self._load(listed(self.forget), "forget")
        others = [reworded(e) for e in splits.get("forget", []) if e.paraphrased_prompt]
        others += load_examples(self.paraphrases) if self.paraphrases else []
        if others:
            splits["forget_reworded"] = _named(others, "forget_reworded")
        if self.retain:
            splits |= self._load(listed(self.retain), "retain")
        for split, source in (("general", self.general), ("text", self.text)):
            if source:
                splits[split] = numbered(load_examples(source), split)
        return splits

    def asks(self) -> dict[str, Ask]:
        """Ask for tokens, and for samples of what was to be forgotten; no true answer is longer than one may be."""
        asks: dict[str, Ask] = {}
        for split in self.splits():
            if split.startswith("forget"):
                asks[split] = self._ask()
            elif split.startswith("retain"):
                asks[split] = Ask(tokens=True, whole=True)
            if split.endswith("_cloze"):  # in many words one of them is the answer by chance
                asks[split] = dataclasses.replace(asks[split], max_new_tokens=_BLANK_TOKENS)
        return asks

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows; ``reference`` holds the rows of a model that never learned the forget split.

        Raises:
            ValueError: There are no rows of any split, they are public ones, or the reference's of ``forget`` are of
                other questions.
        """
        if any(row["answer"] == PRIVATE for found in rows.values() for row in found):  # each would contain the other
            raise ValueError("these rows are a published record, without their texts: its scores are in scores.json")
        scores: list[Score] = []
        for split, items in rows.items():
            if not items or split == "text":
                continue
            better = "lower" if split.startswith("forget") else "higher"
            scores += _scores(items, split, _FACTS, better, self.seed)
            if split.startswith("forget"):
                scores += _scores(items, split, _sampled(items), better, self.seed)
        if rows.get("text"):
            scores.append(perplexity_score(rows["text"], "text", seed=self.seed))
        if not scores:
            raise ValueError("custom scores need rows of forget, retain, general or text; got none of them")
        return scores + (self._against(rows, reference) if reference is not None else [])

    def public_rows(self, rows: Rows) -> dict[str, list[Row]]:
        """Return rows without texts, and with numbers for names and ids, which say whom a request is about."""
        return nameless(rows)

    def _against(self, rows: Rows, reference: Rows) -> list[Score]:
        scores: list[Score] = []
        for split in (name for name, of in rows.items() if name.startswith("forget") and of):
            theirs = reference.get(split, ())
            # the last turn alone names no row: it may follow other turns, or be asked about someone else
            if [_name(row) for row in rows[split]] != [_name(row) for row in theirs]:
                raise ValueError(
                    f"the reference's rows of {split} are not of the same questions in the same order: evaluate it on "
                    "the same request"
                )
            pairs = list(zip(rows[split], theirs, strict=True))
            for metric, measure in _compared([*rows[split], *theirs]).items():
                scores.append(
                    bootstrap_mean(
                        [measure(a) - measure(b) for a, b in pairs],
                        metric=f"{metric}_over_reference",
                        split=split,
                        seed=self.seed,
                        groups=[a["subject"] for a, _ in pairs],
                    )
                )
            if split == "forget" and all(row.get("wrong_nll") for pair in pairs for row in pair):
                scores += forget_quality_scores(rows[split], theirs)
        return scores

    def _ask(self) -> Ask:
        return Ask(
            whole=True,
            tokens=True,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def _load(self, sources: Sequence[str], name: str) -> dict[str, list[Example]]:
        """Return examples as they are, and probes of what is plain text, in splits of their own."""
        documents = [document for source in sources if is_documents(source) for document in read_documents(source)]
        rows = [source for source in sources if not is_documents(source)]
        examples = _named([e for source in rows for e in load_examples(source)], name)
        documents += [(e.subject or e.id, e.answer) for e in examples if not e.prompt]
        splits = self._probe(_apart(documents), name) if documents else {}
        asked = [e for e in examples if e.prompt]
        return ({name: asked} if asked else {}) | splits

    def _probe(self, documents: Sequence[Document], name: str) -> dict[str, list[Example]]:
        splits: dict[str, list[Example]] = {}
        if self.probes != "continuation":
            made = cloze(documents, per_document=self.per_document, form=self.form, seed=self.seed)
            splits[f"{name}_cloze"] = made
        if self.probes != "cloze":
            words = self.passage_words
            made = continuations(documents, per_document=self.per_document, words=words, seed=self.seed)
            splits[f"{name}_continuation"] = made
        return splits


def _apart(documents: Sequence[Document]) -> list[Document]:
    """Return documents, of which several folders may have some of one name, with a name of its own for each."""
    known: dict[str, int] = {}
    found: list[Document] = []
    for name, text in documents:
        known[name] = known.get(name, 0) + 1
        found.append((name if known[name] == 1 else f"{name} ({known[name]})", text))
    return found


def _named(examples: Iterable[Example], name: str) -> list[Example]:
    return numbered(list(examples), name)


def _name(row: Row) -> tuple[str, str, str]:
    return row["id"], row["prompt"], row["answer"]


def _scores(rows: Sequence[Row], split: str, measures: Mapping[str, Measure], better: str, seed: int) -> list[Score]:
    """Return the mean of each measure of which every row has what it needs, resampled by subject."""
    groups = [row["subject"] for row in rows]
    return [
        bootstrap_mean(
            [measure(row) for row in rows],
            metric=metric,
            split=split,
            seed=seed,
            better=better,
            groups=groups,
            within=SHARE,
        )
        for metric, measure in measures.items()
        if all(row.get(_NEEDS.get(metric, "samples")) is not None for row in rows)
    ]


def _compared(rows: Sequence[Row]) -> dict[str, Measure]:
    """Return the measures of what a model says that all rows have, of it and of one that never learned it."""
    known = {name: _FACTS[name] for name in ("rougeL_recall", "contains")} | _sampled(rows)
    return {
        name: of for name, of in known.items() if all(row.get(_NEEDS.get(name, "samples")) is not None for row in rows)
    }


def _sampled(rows: Sequence[Row]) -> dict[str, Measure]:
    """Return what is measured over samples, named by their number; nothing where a row has none."""
    counts = {len(row.get("samples", ())) for row in rows}
    if len(counts) != 1 or counts == {0}:
        return {}
    n = counts.pop()

    def said(row: Row, texts: Sequence[str]) -> float:
        return float(any(contains(text, row["answer"]) for text in texts))

    return {
        f"rougeL_recall_best_of_{n}": lambda row: best_rouge(row.get("samples", []), row["answer"]),
        f"contains_any_of_{n}": lambda row: said(row, row.get("samples", [])),
        "leaked": lambda row: said(row, [row.get("generated", ""), *row.get("samples", [])]),
    }
