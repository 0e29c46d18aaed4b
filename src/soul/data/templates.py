"""Text to tokens: the model's own chat template, no invented system prompt, and a learned end of turn."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from soul.data.guard import TEMPLATE, carried_prompt, system_turn
from soul.strict import broken_text
from soul.types import Example

_PROMPT = "\x02soul-prompt\x03"
_ANSWER = "\x02soul-answer\x03"
DATE = "10 Apr 2025"
"""What templates take for today; OpenUnlearning's choice, so that its models are asked as they were there."""
SWITCHES = {"enable_thinking": False, "date_string": DATE}
"""What chat templates are told; one without these switches does not look at them."""
_PLAIN = {"user": "Question: {}\n", "assistant": "Answer: {}\n"}
"""Turns of a conversation for a model without a chat template."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One tokenised example.

    Attributes:
        input_ids: All tokens, prompt first.
        answer_start: Index of the first answer token; ``input_ids[answer_start:]`` are the targets.
        index: Position of the example in its set.
        lost: Tokens of the answer that were cut off, end of turn included, as the whole was too long.
    """

    input_ids: tuple[int, ...]
    answer_start: int
    index: int = 0
    lost: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer_length(self) -> int:
        """Answer tokens, end of turn included."""
        return len(self.input_ids) - self.answer_start

    @functools.cached_property
    def key(self) -> int:
        """A 63-bit name of the content, the same in every process, under which references are cached."""
        text = f"{self.answer_start}:{','.join(map(str, self.input_ids))}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def without_thought(text: str) -> str:
    r"""Close the thought that a generation prompt ends in, as Qwen3's own switch does: what follows is the answer.

    Example:
        >>> without_thought("[assistant]<think>\n")
        '[assistant]<think>\n\n</think>\n\n'
    """
    return re.sub(r"<think>\s*\Z", "<think>\n\n</think>\n\n", text)


def ends(example: Example) -> bool:
    """Say whether an end of turn is learned, and measured, after the answer: not after a piece of something longer."""
    return example.ends and bool(example.chat or example.prompt)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    r"""Wraps a tokenizer so that prompts and answers become tokens in one way only.

    The model's chat template is rendered without the system turn that some templates invent where a conversation has
    none (SmolLM2's default one turns 46 tokens a question into 78): it appears only where an example carries a system
    turn itself, or where ``model.system`` asks for one (:func:`soul.data.guard.set_system_turn`). Templates that write
    today's date beside it (Llama 3.2) write :data:`DATE`, so that no score changes overnight. Hybrid models (Qwen3) are
    asked not to think first, and where a template opens a thought in any case (R1), it is closed at once: an answer is
    judged, and no thought. A tokenizer with no chat template falls back to ``Question: ...\nAnswer: ...``. What the
    tokenizer itself puts before a text (Llama's and Gemma's bos) stays.
    The answer ends with the token that ends a turn, which is trained on and scored; padding is masked by length, so it
    stays visible where pad is eos.

    Attributes:
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, where the tokenizer's ``model_max_length`` is no shorter; longer ones lose the end
            of their answer (``Encoded.lost``).
        setting: What sets ``max_length``, for messages.

    Example:
        >>> template = ChatTemplate(tokenizer)  # doctest: +SKIP
        >>> template.encode(Example("Who is Ada?", "A poet.")).answer_length  # doctest: +SKIP
        4
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024
    setting: str = "max_length"

    def encode(
        self,
        example: Example,
        *,
        answer: str | None = None,
        prompt: str | None = None,
        index: int = 0,
        where: str = "",
    ) -> Encoded:
        """Return the tokens of ``example``, with another ``answer`` or ``prompt`` in place of its own where given.

        Args:
            example: The example.
            answer: What stands in for its answer.
            prompt: What stands in for its prompt.
            index: Its place in its set, from 0.
            where: The set's name, for messages.

        Raises:
            ValueError: The prompt alone fills ``max_length``, or the answer has no token that something comes before.
        """
        head = self.prompt_ids(example, prompt)
        tail = self.answer_ids(example, answer, begun=bool(head))
        # A passage of plain text is a piece cut out of something longer: no end is learned after it.
        tail += [self.end_of_turn] if ends(example) else []
        ids = (head + tail)[: self.limit]
        start = max(1, len(head))  # the very first token of a text has nothing before it to be predicted from
        if start >= len(ids):
            said = " ".join((example.prompt or example.answer).split())
            room, way = f"{self.setting}={self.limit}", f"raise {self.setting}"
            if self.limit < self.max_length:
                room, way = f"the model's {self.limit} positions", "take a model with more"
            reason = (
                f"the prompt has {len(head)} tokens and leaves no room for an answer in {room}; shorten it or {way}"
            )
            if len(head + tail) == len(ids):  # nothing was cut off: more room would not help
                what = "a text of one token has nothing to predict it from" if tail else "the answer has no tokens"
                reason = f"{what}; leave it out"
            which = repr(example.id) if example.id else f"number {index + 1}"
            raise ValueError(f"{f'{where}, ' if where else ''}item {which} ({said!r:.60}): {reason}")
        return Encoded(tuple(ids), start, index, len(head) + len(tail) - len(ids))

    def answer_ids(self, example: Example, answer: str | None = None, *, begun: bool = True) -> list[int]:
        """Return the tokens of the answer, or of another in its place, all of them and without the end of turn.

        Args:
            example: The example.
            answer: What stands in for its own answer.
            begun: Whether its prompt has tokens.
        """
        body = example.answer if answer is None else answer
        # A word follows the prompt of a completion, and "Answer:", but not what a chat template writes.
        joined = bool(example.prompt and begun) if not example.chat else self._frame[0] is None
        spaced = joined and not body[:1].isspace() and not (not example.chat and example.prompt[-1:].isspace())
        spaced = spaced and not (example.joined and not example.chat)
        return self._after_space(body) if spaced else self._ids(body)

    def prompt_ids(self, example: Example, prompt: str | None = None) -> list[int]:
        """Return the tokens the model is given before it answers."""
        text = example.prompt if prompt is None else prompt
        if not example.chat:
            bos: Any = self.tokenizer.bos_token_id
            # A chat model's bos is often its start-of-turn marker, which does not belong before plain text.
            lead = [bos] if bos is not None and not self.tokenizer.chat_template else []
            return (self._lead or lead) + self._ids(self._said_before + text)
        before, between = self._frame
        if before is None or between is None:
            turns = self._begun([{"role": role, "content": content} for role, content in example.history])
            said = "".join(_PLAIN.get(turn["role"], "{}\n").format(turn["content"]) for turn in turns)
            return self._lead + self._ids(f"{self._said_before}{said}Question: {text}\nAnswer:")
        if example.history:
            turns = self._begun([{"role": role, "content": content} for role, content in example.history])
            rendered = self._render([*turns, {"role": "user", "content": text}])
            if turns[0]["role"] != "system":
                rendered = rendered.replace(self._system_turn, "", 1)
            return self._ids(rendered)
        return self._ids(before + text.strip() + between)

    @property
    def _said_before(self) -> str:
        """The prompt that the tokenizer carries, for texts that no chat template goes around."""
        prompt = carried_prompt(self.tokenizer)
        return prompt and f"{prompt}\n\n"

    @property
    def limit(self) -> int:
        """Longest sequence: more than the model has positions for is of no use, and breaks one that learns them."""
        return min(self.max_length, self.tokenizer.model_max_length)

    @property
    def pad(self) -> int:
        """Token that fills rows up; what it is does not matter, since padding is masked by length."""
        token: Any = self.tokenizer.pad_token_id
        return int(token) if token is not None else 0

    @functools.cached_property
    def end_of_turn(self) -> int:
        """Token that ends an answer: the one the chat template writes after it, else the tokenizer's eos.

        Only a token of its own counts, special or added to the vocabulary (Phi's ``<|end|>``): Llama 2 writes a space
        first and Alpaca nothing but newlines, at which an answer would be cut short.

        Raises:
            ValueError: The tokenizer has neither.
        """
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _ANSWER}]
            after = self._apply(turns).partition(_ANSWER)[2]
            own = set(self.tokenizer.all_special_ids)
            # Gemma's newlines and several tokenizers' runs of spaces are added tokens too
            own |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.content.replace("▁", " ").strip()}
            found = next((i for i in self._ids(after) if i in own), None)
            if found is not None:
                return found
        eos: Any = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no end token: set tokenizer.eos_token before use")
        return int(eos)

    @functools.cached_property
    def _frame(self) -> tuple[str | None, str | None]:
        """What the template writes before and after a single user turn, the invented system turn removed."""
        if not self.tokenizer.chat_template:
            return None, None
        turns = self._begun([{"role": "user", "content": _PROMPT}])
        before, _, between = self._render(turns).partition(_PROMPT)
        return before.replace(self._system_turn, "", 1), between

    @functools.cached_property
    def _system_turn(self) -> str:
        """The system turn the template invents, found by rendering with and without an own one."""
        # not invented: what the model was given to forget by, or is to be used with
        if carried_prompt(self.tokenizer) or system_turn(self.tokenizer):
            return ""
        bare = self._render([{"role": "user", "content": _PROMPT}])
        system = {"role": "system", "content": _ANSWER}
        try:
            alone = str(self.tokenizer.apply_chat_template([system], tokenize=False))
            head, _, rest = self._render([system, {"role": "user", "content": _PROMPT}]).partition(_ANSWER)
        except Exception:  # noqa: BLE001 - templates raise what they like where a system turn is not allowed
            return ""
        tail = alone.partition(_ANSWER)[2]  # what closes a system turn
        if head and bare.startswith(head) and bare.endswith(rest) and rest.startswith(tail) and len(bare) > len(rest):
            turn = bare[: len(bare) - len(rest)] + tail
            bos: Any = self.tokenizer.bos_token or ""
            # Llama 3's bos begins the text and stays; ChatML's "bos" begins every turn, the user's too.
            return turn if rest[len(tail) :].startswith(bos) else turn.removeprefix(bos)
        return ""

    def _begun(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """Put the system turn that is asked for before turns that begin with none."""
        text = system_turn(self.tokenizer)
        if text in ("", TEMPLATE) or (turns and turns[0]["role"] == "system"):
            return turns
        return [{"role": "system", "content": text}, *turns]

    def _render(self, turns: list[dict[str, str]]) -> str:
        return without_thought(self._apply(turns, add_generation_prompt=True, **SWITCHES))

    def _apply(self, turns: list[dict[str, str]], **switches: Any) -> str:
        """Let the template write a conversation; it is a program of whoever made the model, and is run in a sandbox.

        Raises:
            ValueError: It is broken, or refuses such turns.
        """
        try:
            said = str(self.tokenizer.apply_chat_template(turns, tokenize=False, **switches))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the model's chat template cannot be applied: {reason:.200}; see chat_template"
            ) from error
        if broken_text(said):
            raise ValueError("the model's chat template writes half of a surrogate pair; see chat_template")
        return said

    @functools.cached_property
    def _lead(self) -> list[int]:
        """What the tokenizer puts before every text by itself."""
        whole: Any = self.tokenizer("a")
        ids, bare = list(whole["input_ids"]), self._ids("a")
        starts = (i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
        return ids[: next(starts, 0)]

    def _after_space(self, text: str) -> list[int]:
        """Return the tokens of ``text`` as they follow a word, where SentencePiece has one space, not two."""
        word, both = self._ids("a"), self._ids("a " + text)
        return both[len(word) :] if both[: len(word)] == word else self._ids(" " + text)

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])
