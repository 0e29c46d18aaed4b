"""Data that crosses a boundary between rooms, and the legend of tensor shapes.

Shape suffixes used across the library: ``B`` rows of a batch, ``T`` tokens of the longest row, ``N`` answer
tokens of a batch (all rows, concatenated in row order), ``V`` vocabulary, ``D`` hidden width. So ``logits_NV``
holds one row of logits for each answer token and nothing for prompt or padding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    import torch


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Endings of files with rows."""
TEXT_SUFFIXES = (".txt", ".md")
"""Endings of documents."""


class LostModelError(ValueError):
    """A loss or a direction is no longer a number: settings that a person may change, or a contest's result."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One item: what the model is asked, and what it should (or should no longer) answer.

    Attributes:
        prompt: The user's turn; empty for plain text.
        answer: The text whose likelihood counts.
        id: Stable name of the item inside its set.
        chat: True where the model's chat template applies; False for a plain continuation of ``prompt``.
        history: Earlier turns as ``(role, content)``, a system turn first if there is one.
        paraphrased_prompt: The same question in other words, if known.
        paraphrased_answer: The same answer in other words, if known.
        wrong_answers: False answers of the same form (TOFU's "perturbed answers").
        subject: Whom or what the item is about, for reports.
        ends: False where the answer is a piece cut out of something longer, so that nothing ends after it. A plain
            text without a prompt is one in any case.
        joined: True where a plain continuation follows ``prompt`` as it stands, even within a word; else a space comes
            between two words.
    """

    prompt: str
    answer: str
    id: str = ""
    chat: bool = True
    history: tuple[tuple[str, str], ...] = ()
    paraphrased_prompt: str | None = None
    paraphrased_answer: str | None = None
    wrong_answers: tuple[str, ...] = ()
    subject: str = ""
    ends: bool = True
    joined: bool = dataclasses.field(default=False, repr=False)  # digests of contests' records are of the repr


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is measured on each example of a split; a :class:`Row` holds the answers.

    Attributes:
        likelihood: Mean NLL of the answer, of its paraphrase and of the wrong answers.
        generate: A greedy answer and its ROUGE-L recall, where there is a prompt and evaluation generates at all.
        max_new_tokens: Longest generated or sampled answer; 0 for the evaluation's own limit.
        whole: Lift that limit to the tokens of the split's longest true answer, so that any of them can be recited.
        compared: Answers are held against the true one, and marked where they were cut shorter (``Row.truncated``).
        tokens: Log-probability, greedy match and Min-K++ value of each token of the answer.
        gradient_norm: L2 norm of the gradient of the answer's mean NLL, one example after another: slow.
        samples: Sampled answers an example.
        temperature: Divides the logits before sampling.
        top_p: Sample from the fewest tokens that hold this share of the probability; 1 for all.
        seed: With split, example id and number of the sample it decides every draw.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> Ask(generate=False, tokens=True).samples
        0
    """

    likelihood: bool = True
    generate: bool = True
    max_new_tokens: int = 0
    whole: bool = False
    compared: bool = True
    tokens: bool = False
    gradient_norm: bool = False
    samples: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be above 0, not {self.temperature}; for greedy answers use generate")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


class Row(TypedDict):
    """What evaluation measured on one :class:`Example`; one JSON line of a run's record.

    Likelihoods are mean negative log-likelihoods in nats a token, end-of-turn token included, computed in fp32. ``nll``
    is nan and ``tokens`` 0 where likelihoods were not asked for (:class:`Ask`).

    ``of`` is a digest of the example, by which rows of an earlier sitting are told from those of other data.

    ``token_logps`` holds ``log p`` of each answer token, ``token_matches`` 1 where it is the most likely one (teacher
    forcing), ``token_z`` its Min-K++ value (:func:`soul.token_scores.token_scores`). ``ends`` says whether the last of
    these tokens is the end of turn, which is no part of the answer.

    ``truncated`` is there where a limit made a number lower than the model deserves, and names what was cut:
    ``likelihood``, an answer that lost its end before it was measured; ``generated`` or ``samples``, what the model had
    not ended when it had fewer tokens than the true answer; ``prompt``, one of lm-eval's that lost its beginning.
    """

    id: str
    subject: str
    prompt: str
    answer: str
    of: NotRequired[str]
    nll: float
    tokens: int
    paraphrased_nll: NotRequired[float]
    wrong_nll: NotRequired[list[float]]
    generated: NotRequired[str]
    rougeL_recall: NotRequired[float]
    token_logps: NotRequired[list[float]]
    token_matches: NotRequired[list[int]]
    token_z: NotRequired[list[float]]
    ends: NotRequired[bool]
    gradient_norm: NotRequired[float]
    samples: NotRequired[list[str]]
    truncated: NotRequired[list[str]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A number that can be trusted: its value, how many items it comes from, and its interval.

    Attributes:
        metric: Name of the metric, e.g. ``"probability"``.
        split: The set it was computed on, e.g. ``"forget"``; empty for an aggregate of several.
        value: The point estimate.
        n: Items behind it.
        low: Lower end of the interval.
        high: Upper end of the interval.
        method: How the interval was made, e.g. ``"bootstrap(2000)"`` or, over groups of items,
            ``"bootstrap(2000, 20 groups, widened)"`` (in older records plain percentiles, without the last word);
            ``"none"`` where no interval exists.
        level: Coverage of the interval.
        seed: Seed of the interval's randomness.
        better: ``"higher"``, ``"lower"`` or ``""`` where it depends on the reader's question.
    """

    metric: str
    split: str
    value: float
    n: int
    low: float = math.nan
    high: float = math.nan
    method: str = "none"
    level: float = 0.95
    seed: int = 0
    better: str = ""

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval} (n={self.n})"


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss as a sum and a count, so that whoever accumulates divides once.

    Attributes:
        total: Scalar tensor, the sum over items (tokens or sequences) of this micro-batch.
        count: Items in this micro-batch.
        weight: Factor of the term's mean in the loss.
    """

    total: torch.Tensor
    count: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LossOut:
    """What an objective returns: named terms, kept apart.

    Example:
        >>> import torch
        >>> out = LossOut({"retain": Term(torch.tensor(6.0), 3), "forget": Term(torch.tensor(-4.0), 2)})
        >>> float(out.loss())
        0.0
        >>> float(out.loss({"retain": 6, "forget": 2}))
        -1.0
    """

    terms: dict[str, Term]

    def loss(self, counts: dict[str, int] | None = None) -> torch.Tensor:
        """Return ``sum_k weight_k * total_k / count_k``, with counts of the whole window where given."""
        parts = [
            term.weight * term.total / max(1, counts[name] if counts else term.count)
            for name, term in self.terms.items()
        ]
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result
