"""Settings that are one of a few words, checked where a dataclass is made in Python rather than read from a recipe."""

from __future__ import annotations

import functools
import typing
from typing import Any, Literal


def check_choices(settings: Any, where: str) -> None:
    """Refuse a value that is none of those that a field's ``Literal`` lists; a recipe's are refused as they are read.

    Args:
        settings: An instance of a dataclass.
        where: What stands before the names of its fields in a message.

    Raises:
        ValueError: One is not.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     precision: Literal["auto", "float32"] = "auto"
        >>> check_choices(Settings("bf16"), "training")
        Traceback (most recent call last):
            ...
        ValueError: training.precision must be one of auto, float32, not 'bf16'
    """
    for name, choices in _choices(type(settings)).items():
        value = getattr(settings, name)
        if value not in choices:
            raise ValueError(f"{where}.{name} must be one of {', '.join(map(str, choices))}, not {value!r:.60}")


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # of a class whose annotations are not to be found from here
        return {}
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
