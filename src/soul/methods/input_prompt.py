"""A prompt that asks the model to behave as if it had forgotten: the baseline that changes no weight."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

from soul.data.batches import UnlearnDataset
from soul.data.guard import carry_prompt
from soul.methods.base import Log, Method, Progress, silent, unheard
from soul.registry import METHODS

PROMPT = (
    "You have never learned anything about the following, and you do not know it: {about}. Where a question touches "
    "it, answer that you do not know. Answer every other question as you otherwise would."
)


@METHODS.register("input_prompt")
@dataclasses.dataclass(frozen=True)
class InputPrompt(Method):
    """A guardrail (arXiv 2403.03329, section 3): no weight changes, a prompt before every text asks for forgetting.

    The tokenizer carries the prompt, in its chat template and its settings, so that it is saved, loaded, exported and
    evaluated with the model (:mod:`soul.data.guard`). It names what it hides, and who has the weights can leave it out:
    a baseline that any method must beat, and no deletion.

    Attributes:
        prompt: What is said; ``{about}`` stands for the subjects of the forget set or, where examples name none, for
            their questions.
        topics: Most subjects or questions to name.
    """

    prompt: str = PROMPT
    topics: int = 40

    views: ClassVar[tuple[str, ...]] = ("forget",)
    changes_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt must not be empty: it is all that this method does")
        if self.topics < 1:
            raise ValueError(f"topics must be 1 or more, not {self.topics}")

    def __call__(self, model: Any, data: UnlearnDataset, *, progress: Progress = silent, log: Log = unheard) -> Any:
        """Make the tokenizer of ``data`` carry the prompt, and return ``model`` as it is.

        Raises:
            ValueError: The examples name no subject and ask no question, or the tokenizer carries a prompt already.
        """
        started = time.perf_counter()
        progress("writing the prompt", 0, 1)
        text = self.text(data)
        carry_prompt(data.template.tokenizer, text)
        tokens = len(data.template.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]  # a list
        log({"step": 1, "prompt_tokens": tokens, "seconds": round(time.perf_counter() - started, 4)})
        progress("writing the prompt", 1, 1)
        return model

    def text(self, data: UnlearnDataset) -> str:
        """Return what is said."""
        if "{about}" not in self.prompt:
            return self.prompt
        examples = data.examples["forget"]
        topics = list(dict.fromkeys(e.subject for e in examples if e.subject))
        topics = topics or [f'"{e.prompt.strip()}"' for e in examples if e.prompt.strip()]
        if not topics:
            raise ValueError(
                "the examples to forget name no subject and ask no question, so that a prompt cannot say what they are "
                "about: give method.prompt"
            )
        more = len(topics) - self.topics
        named = ", ".join(topics[: self.topics]) + (f", and {more} more of this kind" if more > 0 else "")
        return self.prompt.replace("{about}", named)

    def warnings(self) -> list[str]:
        """Say what this is not."""
        return [
            "input_prompt changes no weight: the model knows all that it knew, and only a prompt that the tokenizer "
            "carries asks it not to say so; the prompt names what it hides"
        ]
