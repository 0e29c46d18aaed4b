"""What stands in for a retain set that was not given: the model's own samples, and everyday requests."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from soul.data.general import general_chat
from soul.data.overlap import near_duplicates, text_of
from soul.data.templates import ChatTemplate
from soul.generation import sample_answers
from soul.stored import check_format
from soul.strict import json_value, read_text
from soul.types import Ask, Example

Anchors = Literal["both", "samples", "general", "none"]
OPENERS = (
    "The", "In the", "When", "It is", "One of the", "A", "For many years", "Most people", "There are", "At first",
    "During the", "This", "If you", "After", "Although", "People who", "On the other hand", "Many", "As a result",
    "How",
)  # fmt: skip
"""How plain text begins that the model is left to go on with."""
NEW_TOKENS = 64
SAME = 0.6
"""Share of common shingles from which a sample says what is to be forgotten."""
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A stand-in for the retain set.

    Attributes:
        general: Everyday requests with their answers.
        samples: The model's own words.
        identity: A digest of what the samples depend on.
    """

    general: tuple[Example, ...]
    samples: tuple[Example, ...]
    identity: str = ""

    @property
    def examples(self) -> list[Example]:
        """All that anchors the model."""
        return [*self.general, *self.samples]

    def sources(self) -> dict[str, int]:
        """Return how many came from where."""
        found = {"general:chat": len(self.general), "samples": len(self.samples)}
        return {name: count for name, count in found.items() if count}

    def summary(self) -> str:
        """Say in a sentence what stood in."""
        parts = {"general:chat": "everyday requests (general:chat)", "samples": "samples of the model itself"}
        said = " and ".join(f"{count} {parts[name]}" for name, count in self.sources().items())
        return f"no retain set was given: {said} stood in for it, and nothing else says what is to be kept"

    def record(self) -> dict[str, Any]:
        """Return what a continued run needs to be anchored by the same bytes."""
        return {"format": 1, "of": self.identity, "samples": [_plain(e) for e in self.samples]}


def stand_in(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    anchors: Anchors,
    count: int,
    *,
    seed: int = 0,
    max_length: int = 1024,
    file: Path | None = None,
    of: str = "",
    progress: Progress | None = None,
) -> StandIn:
    """Return examples that anchor a model for which there is no retain set.

    ``general`` are the built-in everyday requests with their answers. ``samples`` are the model's own words, before it
    is changed, at temperature 1: half answers to these requests, half plain text begun with a word or two. What they
    keep is the model's behaviour, as far as it shows there; a sample that says what is to be forgotten is left out.

    Args:
        model: The model before unlearning.
        tokenizer: Its tokenizer.
        forget: What no sample may say.
        anchors: ``both``, ``samples`` or ``general``.
        count: Samples to take.
        seed: Seed of the samples, each of which depends on it and on its own name alone.
        max_length: Longest sequence.
        file: Where they are kept; what was kept for the same settings is read back, so that a continued run is anchored
            by the same bytes.
        of: The model's name, by which kept samples are told from those of another.
        progress: Called with (what, done, of).

    Raises:
        ValueError: ``anchors`` is ``none``, or nothing is left.
    """
    if anchors == "none":
        raise ValueError("this run needs a retain set: give data.retain, or let data.anchors be both")
    general = general_chat() if anchors in ("both", "general") else []
    identity = hashlib.blake2b(repr((of, seed, count, [text_of(e) for e in forget])).encode(), digest_size=16)
    own: list[Example] = []
    if anchors in ("both", "samples"):
        own = _read(file, identity.hexdigest()) or samples(
            model, tokenizer, forget, count, seed=seed, max_length=max_length, progress=progress
        )
    if not (general or own):
        raise ValueError("none of the model's samples can be used: give data.retain, or set data.anchors to general")
    return StandIn(tuple(general), tuple(own), identity.hexdigest())


def samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    count: int,
    *,
    seed: int = 0,
    max_length: int = 1024,
    progress: Progress | None = None,
) -> list[Example]:
    """Sample answers and plain text from the model, at most ``count``; empty ones and forget items are left out.

    An answer that is cut off ends with its last whole sentence, since an end of turn is learned after it.
    """
    template, was_training = ChatTemplate(tokenizer, max_length), model.training
    asked = [Example(e.prompt, "", id=f"chat {i}") for i, e in enumerate(general_chat())]
    begun = [Example(text, "", id=f"text {i}", chat=False) for i, text in enumerate(OPENERS)]
    wanted = [e for pool, part in ((asked, count - count // 2), (begun, count // 2)) for e in _cycle(pool, part)]
    model.eval()
    try:
        answers = sample_answers(
            model,
            template,
            [template.prompt_ids(e) for e in wanted],
            [e.id for e in wanted],
            Ask(samples=1, seed=seed),
            max_new_tokens=NEW_TOKENS,
            rows=32,
            progress=(lambda done, of: progress("sampling from the model", done, of)) if progress else None,
        )
    finally:
        model.train(was_training)
    made = [_example(e, found[0].text, tokenizer) for e, found in zip(wanted, answers, strict=True)]
    kept = [e for e in made if e is not None]
    said = {p.retain for p in near_duplicates([text_of(e) for e in forget], [text_of(e) for e in kept], SAME)}
    return [e for i, e in enumerate(kept) if i not in said]


def _cycle(pool: Sequence[Example], count: int) -> list[Example]:
    """Return the first ``count`` of the pool, walked through again and again, each time under another name."""
    laps = range(-(-count // len(pool)))
    return [dataclasses.replace(e, id=f"{e.id}, sample {lap}") for lap in laps for e in pool][:count]


def _example(asked: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    if not asked.chat:  # a passage, after which no end is learned
        return Example("", f"{asked.prompt} {text}", id=asked.id, chat=False) if text else None
    if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= NEW_TOKENS - 1:  # type: ignore[arg-type]  # a list
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
        text = text[: ends[-1]] if ends else text
    return dataclasses.replace(asked, answer=text) if text.strip() else None


def _plain(example: Example) -> dict[str, Any]:
    return {name: getattr(example, name) for name in ("prompt", "answer", "id", "chat")}


def _read(file: Path | None, identity: str) -> list[Example]:
    if file is None or not file.is_file():
        return []
    try:
        found = json_value(read_text(file), str(file))
        check_format("anchors", found, file)
        return [Example(**row) for row in found["samples"]] if found["of"] == identity else []
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is broken ({error}): delete it, and samples are taken anew") from error
