"""One row of a data set, whatever its columns are called, to each :class:`~soul.types.Example` in it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from soul.types import Example

Columns = Mapping[str, Any]
_ROLES = ("system", "user", "assistant")
_UNREAD = ("context", "history", "instruction", "input")
"""Columns that belong to a prompt, and have no place in the forms that are understood."""


class _Names(TypedDict):
    id: str
    subject: str
    ends: bool


def to_examples(row: Columns, where: str) -> list[Example]:
    """Return the examples in ``row``, told by its columns (the first form of :data:`FORMS` that is complete).

    ``messages`` hold one for each assistant turn that follows a user's, with all turns before as its history; every
    other form holds one. Of a ``prompt`` and a ``completion`` that are lists of messages, the completion's turns count.

    Args:
        row: Columns and their values.
        where: File and line or row number, for messages.

    Raises:
        ValueError: No form of columns is complete, or a value is missing, empty or of the wrong type.

    Example:
        >>> [e.answer for e in to_examples({"question": "Who is Ada?", "answer": "A poet."}, "people.csv, row 1")]
        ['A poet.']
    """
    present = [columns for columns in FORMS if all(column in row for column in columns)]
    # Data sets that mix forms leave the columns of the others null.
    filled = [columns for columns in present if all(row[column] is not None for column in columns)]
    for columns in filled or present:
        unread = next((name for name in _UNREAD if len(columns) > 1 and not _is_blank(row.get(name))), "")
        if unread:
            raise ValueError(
                f"{where}: the column {unread!r} is part of what the model is asked, and is not understood beside "
                f"{' and '.join(columns)}: write it into the {next(iter(columns))}, give messages, or remove it"
            )
        found = FORMS[columns](row, where)
        return [found] if isinstance(found, Example) else found
    given = ", ".join(str(name) for name in row) or "none"
    forms = "; ".join(" + ".join(columns) for columns in FORMS)
    lower = {str(name).lower() for name in row}
    hint = " (column names are in lower case)" if any(lower.issuperset(columns) for columns in FORMS) else ""
    hint = " (columns of a CSV are parted by commas)" if len(row) == 1 and ";" in given else hint
    raise ValueError(f"{where}: no example in the columns found ({given}); understood are: {forms}{hint}")


def _question(row: Columns, where: str) -> Example:
    further = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")
    for name in row:
        if re.match("paraphras|perturb", str(name)) and name not in further and not _is_blank(row[name]):
            near = difflib.get_close_matches(str(name), further, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: the column {name!r:.60} is not understood: rename it to {near}, or remove it")
    wrong = row.get("perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else (wrong or [])
    if not isinstance(wrong, list | tuple):
        raise ValueError(f"{where}: perturbed_answer must be text or a list of texts, not {type(wrong).__name__}")
    return Example(
        prompt=_text(row["question"], "question", where),
        answer=_text(row["answer"], "answer", where),
        paraphrased_prompt=_optional(row, "paraphrased_question", where) or None,
        paraphrased_answer=_optional(row, "paraphrased_answer", where) or None,
        wrong_answers=tuple(_text(answer, "perturbed_answer", where) for answer in wrong),
        history=_system(row, where),
        **_names(row, where),
    )


def _response(row: Columns, where: str) -> Example:
    prompt, answer = _text(row["prompt"], "prompt", where), _text(row["response"], "response", where)
    return Example(prompt, answer, history=_system(row, where), **_names(row, where))


def _completion(row: Columns, where: str) -> Example | list[Example]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise ValueError(f"{where}: completion is empty; fill it in or remove the row")
        return _turns([*prompt, *completion], row, where, begin=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError(f"{where}: prompt and completion must both be text, or both be lists of messages")
    text = _text(prompt, "prompt", where, empty=True)
    _no_system(row, where)
    return Example(text, _text(completion, "completion", where), chat=False, **_names(row, where))


def _messages(row: Columns, where: str) -> list[Example]:
    return _turns(row["messages"], row, where)


def _turns(messages: Any, row: Columns, where: str, begin: int = 0) -> list[Example]:
    """Return an example for each answer to a user's turn from message ``begin`` on."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}, not {type(messages).__name__}")
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise ValueError(f"{where}: message {number} must have a role ({', '.join(_ROLES)}) and a content")
        content = _text(message.get("content"), f"the content of message {number}", where)
        turns.append((message["role"], content))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        ends = " and ".join(role for role, _ in turns[-2:]) or "nothing"
        raise ValueError(f"{where}: messages must end with a user turn and its assistant turn; they end with {ends}")
    system = _system(row, where)
    if system and turns[0][0] == "system" and turns[0] != system[0]:
        raise ValueError(f"{where}: the column 'system' and the system turn of the messages differ; remove one of them")
    if system and turns[0][0] != "system":
        turns, begin = [*system, *turns], begin + 1
    roles = [role for role, _ in turns]
    answers = [i for i in range(max(1, begin), len(turns)) if roles[i - 1 : i + 1] == ["user", "assistant"]]
    names = _names(row, where)
    found = [Example(turns[i - 1][1], turns[i][1], history=tuple(turns[: i - 1]), **names) for i in answers]
    if names["id"] and len(found) > 1:
        found = [dataclasses.replace(e, id=f"{names['id']}, answer {n}") for n, e in enumerate(found, 1)]
    return found


def _passage(row: Columns, where: str) -> Example:
    return Example("", _text(row["text"], "text", where), chat=False, **_names(row, where))


FORMS: dict[tuple[str, ...], Callable[[Columns, str], Example | list[Example]]] = {
    ("question", "answer"): _question,
    ("prompt", "response"): _response,
    ("prompt", "completion"): _completion,
    ("messages",): _messages,
    ("text",): _passage,
}
"""Columns that make examples, in the order in which they are looked for."""


def _names(row: Columns, where: str) -> _Names:
    number = row.get("id")
    # A numeric id is as good a name as any.
    name = str(number) if isinstance(number, int) and not isinstance(number, bool) else _optional(row, "id", where)
    ends = row.get("ends")
    if ends is not None and not isinstance(ends, bool):
        raise ValueError(f"{where}: ends must be true or false, not {ends!r:.60}")
    return {"id": name, "subject": _optional(row, "subject", where), "ends": ends is not False}


def _system(row: Columns, where: str) -> tuple[tuple[str, str], ...]:
    """Return the conversation's system turn, where a column of its own says one."""
    value = row.get("system")
    return () if _is_blank(value) else (("system", _text(value, "system", where)),)


def _is_blank(value: Any) -> bool:
    """Say whether a cell holds nothing; what tables leave empty may come as nan."""
    return value is None or value in ([], {}) or value != value or (isinstance(value, str) and not value.strip())


def _no_system(row: Columns, where: str) -> None:
    if _system(row, where):
        raise ValueError(
            f"{where}: the column 'system' belongs to a chat, and this is plain text: give messages, or remove it"
        )


def _optional(row: Columns, column: str, where: str) -> str:
    value = row.get(column)
    return "" if value is None else _text(value, column, where, empty=True)


def _text(value: Any, what: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what} must be text, not {type(value).__name__} ({value!r:.60})")
    if not empty and not value.strip():
        raise ValueError(f"{where}: {what} is empty; fill it in or remove the row")
    return value
