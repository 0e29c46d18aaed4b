"""What a model began as: the first of a line of runs, with its licence."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from pathlib import Path

from soul.data import hub
from soul.inputs import ancestors
from soul.models import OFFLINE
from soul.origins import read_origins
from soul.strict import read_text, yaml_tree


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a model began as.

    Attributes:
        base: Its hub id; empty where it was a local folder or file.
        licence: Its licence as its card names it; empty where unknown.
        dequantized: Whether it was read from a GGUF file, whose weights are near the base's and not equal to them.
    """

    base: str = ""
    licence: str = ""
    dequantized: bool = False


def lineage(path: str, revision: str = "", run: Path | None = None) -> Lineage:
    """Return what the model at ``path``, or the first of a line of runs there, began as.

    Args:
        path: As :attr:`soul.models.ModelSpec.path`.
        revision: As :attr:`soul.models.ModelSpec.revision`.
        run: The run that it was given to, which knows whether it was a folder that is gone by now.

    Raises:
        ValueError: A run's recipe or ``origins.json`` is damaged.

    Example:
        >>> lineage("smollm2-135m").base
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    line = [*ancestors(path)]
    if line:
        run, first = line[-1]
        path, revision = first.model.path, first.model.revision
    made = read_origins(run) if run else None
    was_local = path not in OFFLINE and made is not None and bool(made.model)  # as a hub id it would have no files here
    gguf = path.endswith(".gguf") or (path in OFFLINE and importlib.util.find_spec(OFFLINE[path][0]) is not None)
    path = OFFLINE[path][1] if path in OFFLINE else path
    local = Path(path).expanduser()
    named = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".gguf")
    if named or was_local or local.exists():
        return Lineage("", _licence(local / "README.md"), gguf)
    with hub.no_retries():
        card = hub.file_of(path, "README.md", revision)
    return Lineage(path, _licence(card) if card else "", gguf)


def _licence(card: Path) -> str:
    """Return the licence that the YAML head of a model card names."""
    with contextlib.suppress(ValueError):  # no card, or one that says nothing
        text = read_text(card)
        head = yaml_tree(text.split("---")[1], str(card)) if text.startswith("---") else None
        if isinstance(head, dict) and isinstance(head.get("license"), str):
            return head["license"]
    return ""
