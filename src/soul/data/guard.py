"""What a tokenizer carries, wherever it goes: a prompt to forget by, and a system turn to be used with."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

KEY = "soul_prompt"
"""Name of the prompt among the tokenizer's settings, which ``tokenizer_config.json`` keeps."""
SYSTEM = "soul_system"
"""Likewise, of the system turn."""
TEMPLATE = "template"
"""The system turn that stands for whatever the chat template writes where a conversation has none."""


def system_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the system turn that conversations without one get: a text, :data:`TEMPLATE`, or empty for none."""
    return str(tokenizer.init_kwargs.get(SYSTEM) or "")


def set_system_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Give conversations without a system turn one, in place; it is saved with the tokenizer.

    Args:
        tokenizer: A tokenizer.
        text: What it says; :data:`TEMPLATE` keeps the turn that the chat template invents.

    Raises:
        ValueError: The chat template does not write system turns.
    """
    template: Any = tokenizer.chat_template
    if template and text != TEMPLATE and not _knows_system(tokenizer, template if isinstance(template, str) else None):
        raise ValueError(
            f"the model's chat template writes no system turn, so model.system={text!r:.80} cannot be said"
        )
    tokenizer.init_kwargs[SYSTEM] = text


def carried_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt that the tokenizer carries; empty where it carries none."""
    return str(tokenizer.init_kwargs.get(KEY) or "")


def carry_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    r"""Make a tokenizer carry ``text``, in place.

    It is written into the chat template, so that other software that applies it says it too: as the system turn, before
    a conversation's own system turn, or where the template has no system turn, at the head of the user's. It is
    also kept among the tokenizer's settings, by which :class:`soul.data.templates.ChatTemplate` knows it from a system
    turn that a template invents, and puts it before plain text, for which there is no template.

    Raises:
        ValueError: ``text`` is empty, or the tokenizer carries a prompt already.

    Example:
        >>> carry_prompt(tokenizer, "You know nothing about Ada Orchard.")  # doctest: +SKIP
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)  # doctest: +SKIP
        '<|im_start|>system\\nYou know nothing about Ada Orchard.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    """
    if not text.strip():
        raise ValueError("a prompt to carry must not be empty")
    if carried_prompt(tokenizer):
        raise ValueError(f"the tokenizer already carries a prompt: {carried_prompt(tokenizer)!r:.120}")
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_prompt(tokenizer, part, text) for name, part in template.items()}  # type: ignore[assignment]  # several templates by name
    elif template:
        tokenizer.chat_template = _with_prompt(tokenizer, str(template), text)
    tokenizer.init_kwargs[KEY] = text


def _with_prompt(tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> str:
    role = "system" if _knows_system(tokenizer, template) else "user"
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    before = f"{quoted} ~ '\\n\\n' ~ messages[0]['content']"
    merged = "[{'role': '" + role + "', 'content': " + before + "}] + messages[1:]"
    alone = "[{'role': 'system', 'content': " + quoted + "}] + messages"
    otherwise = "{%- else %}{%- set messages = " + alone + " %}" if role == "system" else ""
    return (
        "{%- if messages and messages[0]['role'] == '" + role + "' %}{%- set messages = " + merged + " %}"
        f"{otherwise}{{%- endif %}}{template}"
    )


def _knows_system(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Say whether a template writes a system turn; some raise an error, and some leave it out."""
    mark = "\x02soul-system\x03"
    turns = [{"role": "system", "content": mark}, {"role": "user", "content": "-"}]
    try:
        return mark in str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
    except Exception:  # noqa: BLE001 - templates raise what they like where a system turn is not allowed
        return False
