"""Copyright: does the model go on with a book where a few of its words are given? (arXiv 2404.18239, 2310.02238)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from soul.benchmarks import truthfulqa
from soul.benchmarks.base import Benchmark, Rows
from soul.data.books import Passage, book_text, cut_passages
from soul.data.plain import plain_text
from soul.metrics import text as overlap
from soul.metrics.perplexity import perplexity_score
from soul.metrics.stats import SHARE, bootstrap_mean
from soul.registry import BENCHMARKS
from soul.types import Ask, Example, Row, Score

_SIDES = {"forget": "lower", "asked": "lower", "kept": "higher"}


@BENCHMARKS.register("copyright")
@dataclasses.dataclass(frozen=True)
class Copyright(Benchmark):
    """Verbatim continuation of a book that was to be forgotten, and what else the model can still do.

    The book is cut into passages (:func:`soul.data.books.cut_passages`). Given the ``prompts`` = 50, 100, 200 and 300
    tokens before a passage's continuation, the model writes ``continuation`` tokens, greedily:

    - ``forget_50`` ... ``forget_300``: ``rougeL_recall`` and ``rougeL_f1`` (Lin 2004) and ``bleu`` (Papineni et al.
      2002) against the true continuation, means over passages; the same over all lengths as ``forget``.
    - ``asked_100`` ... : the same prompts in a chat that asks for the passage: what refuses plain text may still obey.
    - ``kept_200`` ...: the same of a text that was to be kept.
    - ``text``: ``perplexity`` of plain passages. ``truthfulqa``: MC1 and MC2 (:mod:`soul.benchmarks.truthfulqa`).
      Zero-shot tasks are the benchmark ``lm_eval``'s.

    Which text is asked about depends on these settings alone, the tokenizer's name among them, and not on the model
    that is measured: models are compared on the same words, a retrained one or one with another tokenizer too.
    Intervals are over passages, of which several prompts count as one.

    Args:
        book: The text to be forgotten: a plain text file, in which Project Gutenberg's frame is left out.
        kept: A text to be kept; empty for none.
        text: Plain passages, see :func:`soul.data.plain.plain_text`; empty for none.
        truthfulqa: Source of TruthfulQA, see :class:`soul.benchmarks.truthfulqa.TruthfulQA`; empty for none.
        tokenizer: Whose tokens are counted: a model as in ``model.path``; that of the model to be measured.
        prompts: Lengths of the prompts of ``forget`` in tokens.
        asked: Lengths, among ``prompts``, that are also asked for in a chat.
        kept_prompts: Lengths of the prompts of ``kept``.
        continuation: Tokens to go on for.
        first: Passages of the book left out at its start, such as a title page.
        limit: Passages of the book, and of the kept text; None for all there are.
        kept_first: Passages of the kept text left out at its start.
        text_limit: Most plain passages.
        truthfulqa_limit: Most questions of TruthfulQA, picked by ``seed``; None for all.
        seed: Seed of that pick and of the intervals.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Copyright(book="alice.txt").prompts
        [50, 100, 200, 300]
    """

    version: ClassVar[int] = 3  # 3: plain text that no run looks at; TruthfulQA's full stops
    citation: ClassVar[str] = "Task of SOUL, Jia et al. 2024, arXiv 2404.18239, after Eldan and Russinovich, 2310.02238"
    private_text: ClassVar[bool] = True
    local: ClassVar[dict[str, str]] = {
        "book": "gutenberg_pd/Alice-s-Adventures-in-Wonderland_11.txt",
        "kept": "gutenberg_pd/The-Wonderful-Wizard-of-Oz_55.txt",
        "text": "wikitext2/wiki.test.tokens",
        "truthfulqa": "truthfulqa/TruthfulQA.csv",
    }

    book: str
    kept: str = ""
    text: str = "general:heldout_text"
    truthfulqa: str = ""
    tokenizer: str = "smollm2-135m"
    prompts: list[int] = dataclasses.field(default_factory=lambda: [50, 100, 200, 300])
    asked: list[int] = dataclasses.field(default_factory=lambda: [100])
    kept_prompts: list[int] = dataclasses.field(default_factory=lambda: [200])
    continuation: int = 200
    first: int = 0
    limit: int | None = 50
    kept_first: int = 0
    text_limit: int = 64
    truthfulqa_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.book:
            raise ValueError("the copyright benchmark needs a text to be forgotten (book=), a plain text file")
        lengths = [*self.prompts, *self.kept_prompts]
        if not self.prompts or (self.kept and not self.kept_prompts) or min(lengths) < 1:
            raise ValueError(f"prompts and kept_prompts are lengths of 1 token or more, not {lengths}")
        if not set(self.asked) <= set(self.prompts):
            raise ValueError(f"asked must be among prompts {self.prompts}, not {self.asked}")
        for name in ("continuation", "text_limit", "limit", "truthfulqa_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if self.first < 0 or self.kept_first < 0:
            raise ValueError(f"first and kept_first must be 0 or more, not {self.first} and {self.kept_first}")

    def passages(self, kept: bool = False) -> list[Passage]:
        """Cut the book, or the kept text, into its passages.

        Raises:
            ValueError: A text or the tokenizer cannot be read, or the text is too short.
        """
        from soul.pretrained import load_tokenizer  # which needs transformers, unlike the name of a benchmark

        tokenizer: Any = load_tokenizer(self.tokenizer)
        source = self.kept if kept else self.book
        return cut_passages(
            book_text(source),
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            prompts=self.kept_prompts if kept else self.prompts,
            continuation=self.continuation,
            first=self.kept_first if kept else self.first,
            limit=self.limit,
            name=Path(source).stem,
        )

    def splits(self) -> dict[str, list[Example]]:
        """Cut the texts and load what else is asked.

        Raises:
            ValueError: A source cannot be read, a text is too short, or sacrebleu is not installed.
        """
        overlap.need_sacrebleu()  # said now rather than when all is generated
        passages = self.passages()
        found = {f"forget_{n}": [p.example(n) for p in passages] for n in self.prompts}
        found |= {f"asked_{n}": [p.example(n, asked=True) for p in passages] for n in self.asked}
        if self.kept:
            kept = self.passages(kept=True)
            found |= {f"kept_{n}": [p.example(n) for p in kept] for n in self.kept_prompts}
        if self.text:
            found["text"] = plain_text(self.text, self.text_limit)
        if self.truthfulqa:
            found[truthfulqa.SPLIT] = truthfulqa.questions(self.truthfulqa, self.truthfulqa_limit, self.seed)
        return found

    def asks(self) -> dict[str, Ask]:
        """Return continuations of the length asked for; likelihoods alone of text and TruthfulQA."""
        written = Ask(likelihood=False, max_new_tokens=self.continuation)
        names = [f"forget_{n}" for n in self.prompts] + [f"asked_{n}" for n in self.asked]
        names += [f"kept_{n}" for n in self.kept_prompts] if self.kept else []
        asks = dict.fromkeys(names, written)
        if self.text:
            asks["text"] = Ask(generate=False)
        if self.truthfulqa:
            asks[truthfulqa.SPLIT] = Ask(generate=False, tokens=True)
        return asks

    def missing(self) -> dict[str, str]:
        """Return the parts for which no source is given."""
        return {
            name: f"no source is given ({name}=)" for name in ("kept", "text", "truthfulqa") if not getattr(self, name)
        }

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows.

        Raises:
            ValueError: There are no rows with continuations of the book.
        """
        del reference
        scores: list[Score] = []
        for side, better in _SIDES.items():
            found = {name: of for name, of in rows.items() if name.startswith(f"{side}_") and of}
            for name, of in found.items():
                scores += self._overlap(name, of, better)
            if len(found) > 1:
                scores += self._overlap(side, [row for of in found.values() for row in of], better)
        if not any(score.split.startswith("forget") for score in scores):
            raise ValueError(
                f"copyright scores need rows of {', '.join(f'forget_{n}' for n in self.prompts)}; got none"
            )
        if rows.get("text"):
            scores.append(perplexity_score(rows["text"], "text", seed=self.seed))
        if rows.get(truthfulqa.SPLIT):
            scores += truthfulqa.multiple_choice(rows[truthfulqa.SPLIT], self.seed)
        return scores

    def _overlap(self, split: str, rows: Sequence[Row], better: str) -> list[Score]:
        missing = [row["id"] for row in rows if "generated" not in row]
        if missing:
            raise ValueError(f"{split}: {len(missing)} rows have no continuation (evaluation.generate is off)")
        pairs = [(row.get("generated", ""), row["answer"].strip()) for row in rows]
        rouge = [overlap.rouge(*pair) for pair in pairs]
        columns = {
            "rougeL_recall": [r["rougeL_recall"] for r in rouge],
            "rougeL_f1": [r["rougeL_f1"] for r in rouge],
            "bleu": [overlap.bleu(*pair) for pair in pairs],
        }
        groups = [row["subject"] for row in rows]
        return [
            bootstrap_mean(
                values,
                metric=metric,
                split=split,
                seed=self.seed,
                better=better,
                groups=groups,
                within=(0.0, 100.0) if metric == "bleu" else SHARE,
            )
            for metric, values in columns.items()
        ]
