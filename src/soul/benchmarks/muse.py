"""MUSE: forget news articles or books, six ways to look at it (arXiv 2407.06460)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast, get_args

from soul.benchmarks._leakage import leakage_scores, memorization_scores
from soul.benchmarks._muse_data import HUB, TRAIN_SETS, Corpus, chunks, columns, holds, muse_train, texts
from soul.benchmarks.base import Benchmark, Rows, hashed, pick
from soul.metrics.membership import attack_values
from soul.metrics.memorization import answer_matches, exact_memorization, extraction_strength
from soul.metrics.stats import SHARE, bootstrap_mean
from soul.metrics.text import rouge
from soul.registry import BENCHMARKS
from soul.types import Ask, Example, Row, Score

__all__ = ["TRAIN_SETS", "Muse", "chunks", "muse_train"]

_STOPS = ("\n\n", "\nQuestion", "Question:")  # where a model goes on to ask itself
_NEW_TOKENS = {"verbmem": 128, "knowmem": 32}
_SPLITS = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout")


@BENCHMARKS.register("muse")
@dataclasses.dataclass(frozen=True)
class Muse(Benchmark):
    """MUSE on News or Books: are text and facts forgotten, does their absence show, and is the rest still there?

    * ``verbmem`` on ``forget``: mean ROUGE-L F1 of the greedy continuation (128 tokens) of a passage with the true one.
    * ``knowmem`` on ``forget``, and on ``retain``, which is the paper's utility: mean ROUGE-L F1 of the greedy answer
      (32 tokens, cut where a next question begins) to a question after ten answered ones.
    * ``privleak`` on ``forget``, against a retrained model: membership inference by Min-K% (k = 0.4) between passages
      of the forget set and a holdout set, relative to that model's, in percent
      (:func:`soul.metrics.privacy.privleak`); ``mia_<attack>_auc`` and ``_tpr_at_fpr_0.01`` of all attacks.
    * ``exact_memorization`` and ``extraction_strength`` of the true continuations (arXiv 2506.12618), without the end
      of turn, which a passage does not have.

    Values are shares where the paper shows percent, except ``privleak``. Scaling and sustainability are further models
    under the same measurements: their corpora are ``scal_1`` to ``scal_4`` and ``sust_1`` to ``sust_4`` of
    :func:`muse_train`, and :func:`soul.sequence.run_sequence` forgets one after another.

    Prompts are plain text for chat models too, as in the public code. News and Books are under copyright:
    :meth:`public_rows` has ids, digests and numbers only. Passages have up to 2,048 of Llama's tokens, and are
    measured in up to 2,304 where ``evaluation.max_length`` is less.

    Args:
        corpus: ``"news"`` or ``"books"``.
        source: Hub id, or a folder with ``verbmem_forget.json``, ``knowmem_forget_qa.json``,
            ``knowmem_forget_qa_icl.json``, ``privleak_forget.json``, ``privleak_holdout.json`` and so on (or
            ``verbmem/forget.json`` ...); empty for the corpus' hub id. What is not there is left out (:meth:`missing`).
        limit: Keep this many rows of each set, picked by ``seed``.
        seed: Seed of the pick and of the intervals.
        memorization: Look at the tokens of the true continuations.
        min_k: Share of the tokens that both kinds of Min-K take.
        gradient_norm: Attack by gradient norms too: a backward pass for each passage.
        compat: Prompts end in a space after ``Answer:``, as in the public code. Most tokenizers join a space to the
            word that follows, so that the model must begin with a token it has rarely seen there.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Muse(corpus="books").origin
        'muse-bench/MUSE-Books'
    """

    version: ClassVar[int] = 2  # 2: continuations that begin within a word
    citation: ClassVar[str] = "Shi et al., MUSE: Machine Unlearning Six-Way Evaluation, 2024, arXiv 2407.06460"
    private_text: ClassVar[bool] = True
    longest: ClassVar[int] = 2304  # privacy passages of 2,048 words' tokens, and the longest verbatim prompts
    local: ClassVar[dict[str, str]] = {"source": "muse_{corpus}"}

    corpus: Corpus = "news"
    source: str = ""
    limit: int | None = None
    seed: int = 0
    memorization: bool = True
    min_k: float = 0.4
    gradient_norm: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        if self.corpus not in get_args(Corpus):
            raise ValueError(f"unknown corpus {self.corpus!r}; known: {', '.join(get_args(Corpus))}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or left out for all rows; got {self.limit}")
        if not 0 < self.min_k <= 1:
            raise ValueError(f"min_k must be above 0 and at most 1, not {self.min_k}")

    @property
    def origin(self) -> str:
        """Where the sets come from: the source given, or the corpus' hub id."""
        return self.source or HUB[self.corpus]

    def splits(self) -> dict[str, list[Example]]:
        """Load what is there of ``verbmem``, ``knowmem_forget``, ``knowmem_retain``, ``privleak_forget``, ``_holdout``.

        Raises:
            ValueError: None of them is.
        """
        found, reasons = self._load()
        if not found:
            raise ValueError(f"none of MUSE's sets can be loaded: {next(iter(reasons.values()))}")
        return {split: pick(examples, self.limit, self.seed) for split, examples in found.items()}

    def asks(self) -> dict[str, Ask]:
        """Ask for 128 tokens of continuations, 32 of answers, and for the likelihood of the privacy passages."""
        known = Ask(likelihood=False, max_new_tokens=_NEW_TOKENS["knowmem"])
        seen = Ask(generate=False, tokens=True, gradient_norm=self.gradient_norm)
        verbatim = Ask(likelihood=False, max_new_tokens=_NEW_TOKENS["verbmem"], tokens=self.memorization)
        asked = {
            "verbmem": verbatim,
            **{split: known if split.startswith("knowmem") else seen for split in _SPLITS[1:]},
        }
        found, _ = self._load()
        return {split: ask for split, ask in asked.items() if split in found}

    def missing(self) -> dict[str, str]:
        """Say which sets cannot be loaded, and which corpora of scaling and sustainability a folder lacks."""
        _, reasons = self._load()
        for kind in ("scal", "sust"):
            absent = [k for k in (2, 3, 4) if holds(self.origin, kind, f"forget_{k}") is False]
            if absent:
                reasons[kind] = f"{self.origin!r} holds no {kind}_forget_{', '.join(map(str, absent))}"
        return reasons

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows; ``reference`` holds the rows of a model retrained without the forget set.

        Raises:
            ValueError: There are no rows of any of MUSE's splits, they are public ones, or the reference's are of other
                passages.
        """
        if any(row["answer"].startswith("sha256:") for found in rows.values() for row in found):
            raise ValueError("these rows are a published record, without their texts: its scores are in scores.json")
        scores: list[Score] = []
        for split in _SPLITS[:3]:
            if rows.get(split) and all("generated" in row for row in rows[split]):
                scores.append(self._overlap(split, rows[split]))
        if self.memorization and rows.get("verbmem"):
            scores += memorization_scores(rows["verbmem"], "forget", seed=self.seed)
        sides = [rows.get(f"privleak_{side}") for side in ("forget", "holdout")]
        if sides[0] and sides[1]:
            known = [(reference or {}).get(f"privleak_{side}") for side in ("forget", "holdout")]
            retrained = (known[0], known[1]) if known[0] and known[1] else None
            scores += leakage_scores((sides[0], sides[1]), retrained, k=self.min_k, seed=self.seed)
        if not scores:
            raise ValueError(f"MUSE scores need rows of {', '.join(_SPLITS)}, with generations; got none of them")
        return scores

    def public_rows(self, rows: Rows) -> dict[str, list[Row]]:
        """Return rows with ids, digests and numbers: each row's part in the scores stands for its text and tokens."""
        return {split: [cast("Row", _public(split, row, self.min_k)) for row in found] for split, found in rows.items()}

    def _overlap(self, split: str, rows: Sequence[Row]) -> Score:
        kind, _, side = split.partition("_")
        return bootstrap_mean(
            [overlap(split, row) for row in rows],
            metric=kind,
            split=side or "forget",
            seed=self.seed,
            better="higher" if side == "retain" else "lower",
            within=SHARE,
        )

    def _load(self) -> tuple[dict[str, list[Example]], dict[str, str]]:
        """Return the sets that can be loaded, by split, and why the others cannot, by part."""
        loaders: dict[str, Callable[[], list[Example]]] = {
            "verbmem": self._continuations,
            "knowmem_forget": lambda: self._questions("forget"),
            "knowmem_retain": lambda: self._questions("retain"),
            "privleak_forget": lambda: self._passages("forget"),
            "privleak_holdout": lambda: self._passages("holdout"),
        }
        found: dict[str, list[Example]] = {}
        reasons: dict[str, str] = {}
        for split, load in loaders.items():
            try:
                found[split] = load()
            except ValueError as error:
                reasons[split] = str(error)
        sides = ("privleak_forget", "privleak_holdout")
        if any(side in reasons for side in sides):  # one is of no use without the other
            found = {split: examples for split, examples in found.items() if split not in sides}
        return found, reasons

    def _continuations(self) -> list[Example]:
        pairs = columns(self.origin, "verbmem", "forget", "prompt", "gt")
        return [
            Example(prompt, answer, id=f"verbmem:{i}", chat=False, ends=False, joined=True)
            for i, (prompt, answer) in enumerate(pairs)
        ]

    def _questions(self, side: str) -> list[Example]:
        shots = columns(self.origin, "knowmem", f"{side}_qa_icl", "question", "answer")
        asked = columns(self.origin, "knowmem", f"{side}_qa", "question", "answer")
        before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
        end = " " if self.compat else ""
        return [
            Example(f"{before}Question: {question}\nAnswer:{end}", answer, id=f"knowmem_{side}:{i}", chat=False)
            for i, (question, answer) in enumerate(asked)
        ]

    def _passages(self, side: str) -> list[Example]:
        found = texts(self.origin, "privleak", side)
        return [Example("", text, id=f"privleak_{side}:{i}", chat=False) for i, text in enumerate(found)]


def overlap(split: str, row: Row) -> float:
    """Return the ROUGE-L F1 of a row's generation with its answer; one to a question ends where the next begins.

    Raises:
        ValueError: The row has no generation.
    """
    if "generated" not in row:
        raise ValueError(f"row {row['id']!r} has no answer: evaluate with generation switched on")
    generated = row["generated"]
    if split.startswith("knowmem"):
        for stop in _STOPS:
            generated = generated.split(stop)[0]
    return rouge(generated, row["answer"], stem=False)["rougeL_f1"]


def _public(split: str, row: Row, k: float) -> dict[str, Any]:
    """Return the row as :func:`soul.benchmarks.base.hashed`, with what the row gives to each score."""
    values: dict[str, float] = {}
    if "generated" in row:
        values["rougeL_f1"] = overlap(split, row)
    if split == "verbmem" and row.get("token_matches"):
        matches = answer_matches(row)
        values["exact_memorization"] = exact_memorization(matches)
        values["extraction_strength"] = extraction_strength(matches)
    if split.startswith("privleak"):
        values |= {f"mia_{attack}": found[0] for attack, found in attack_values([row], k=k).items()}
    return {**hashed(row), "values": values}
