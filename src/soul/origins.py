"""What a run is made of, by digests: a path says where something was, not what.

``origins.json`` in a run's folder holds them. A run that goes on, or is finished, is held against what its paths lead
to now; without this the same command on a changed file would give the record of what the file held before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soul.intact import check_adapter_files
from soul.models import source_of
from soul.stored import check_format, sha256, write_json
from soul.strict import json_value, read_text
from soul.types import Example

ORIGINS = "origins.json"
_PARTS = (".safetensors", ".gguf", ".model", ".jinja", ".py")
"""Suffixes of the files that a model, its tokenizer and its code are read from; a card beside them may change."""
_VERSIONED, _VERSION = ("config.json", "generation_config.json"), "transformers_version"
"""Files that say which version wrote them, which changes nothing."""
_NAMED = (
    *_VERSIONED,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "adapter_config.json"),
)


@dataclasses.dataclass(frozen=True)
class Origins:
    """What a run is made of.

    Attributes:
        data: By name (``forget``, ``retain`` ...), how many items there are and the digest of their content.
        model: By file, its size, the time of its last change and its digest; empty where the model is not local.
        commit: The hub's commit of a model that is not local, as :attr:`soul.models.Location.commit`.
    """

    data: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    model: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    commit: str = ""

    def check(self, out: Path, sources: Mapping[str, str]) -> None:
        """Make sure that what is known of the run in ``out`` is what it would be made of now.

        Only what both know is compared: a run by an earlier version has no file, and a source that is gone or that only
        the hub has is not looked at again.

        Args:
            out: The run's folder.
            sources: What each set, and ``model``, was read from, for the message.

        Raises:
            ValueError: Data or model have changed since.
        """
        earlier = read_origins(out)
        if earlier is None:
            return
        changed = {
            name: f"{was['items']} items then, {self.data[name]['items']} now"
            for name, was in earlier.data.items()
            if name in self.data and self.data[name]["digest"] != was["digest"]
        }
        ours, theirs = ({n.partition("/")[0] == "base" for n in model} for model in (self.model, earlier.model))
        there = ours & theirs  # a model, or an adapter's base, that is gone is not looked at again
        both = {n for n in earlier.model.keys() | self.model.keys() if (n.partition("/")[0] == "base") in there}
        files = [n for n in sorted(both) if _digest_in(earlier.model, n) != _digest_in(self.model, n)]
        if files:
            changed["model"] = f"{', '.join(files[:3])}{' ...' if len(files) > 3 else ''}"
        elif earlier.commit and self.commit and earlier.commit != self.commit:
            changed["model"] = f"commit {_short(earlier.commit)} then, {_short(self.commit)} now"
        if changed:
            said = " and ".join(f"{name} {sources.get(name, '')} ({how})" for name, how in changed.items())
            raise ValueError(
                f"{out} holds what was done with other content: {said} changed since it began. Choose another --out, "
                f"or delete that folder{self._way_back(earlier) if [*changed] == ['model'] else ''}"
            )

    def _way_back(self, earlier: Origins) -> str:
        """Say how to go on where the hub has what was begun with: where the repository named moved, not a base."""
        (named, _, below), (now, _, below_now) = (o.commit.partition("+") for o in (earlier, self))
        if earlier.model or self.model or named == now or below != below_now:
            return ""
        return f"; model.revision={named} goes on with what was begun"

    def write(self, out: Path) -> None:
        """Keep it in a run's folder."""
        write_json(out / ORIGINS, {"format": 1, **dataclasses.asdict(self)})


def read_origins(out: Path) -> Origins | None:
    """Return what a run was made of; None where its folder does not say.

    Raises:
        ValueError: The file is damaged.
    """
    file = out / ORIGINS
    if not file.is_file():
        return None
    tree = json_value(read_text(file), str(file))
    try:
        check_format("origins", tree, file)
        data, model = ({str(k): dict(v) for k, v in tree[name].items()} for name in ("data", "model"))
        _ = [(item["items"], item["digest"]) for item in data.values()]
        _ = [(item["bytes"], item["modified"], item["sha256"]) for item in model.values()]
        return Origins(data, model, str(tree["commit"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r:.80}): delete it, and what changed is not noticed") from error


def began_with(out: Path, revision: str) -> bool:
    """Say whether a revision is the hub's commit that the model of a run in ``out`` was, whatever its recipe names."""
    earlier = read_origins(out) if revision else None
    return earlier is not None and not earlier.model and earlier.commit.partition("+")[0] == revision


def _short(commit: str) -> str:
    return "+".join(f"{part:.12}" for part in commit.split("+"))


def commit_of(model: Any) -> str:
    """Return the hub's commit that a loaded model came from, as :attr:`soul.models.Location.commit`."""
    return str(getattr(model.config, "_commit_hash", None) or "")


def of_items(items: Sequence[Example] | Sequence[str]) -> dict[str, Any]:
    """Return the number of items and the digest of their content, in order.

    Fields at their defaults are left out, so that a field that examples gain later changes no digest.

    Example:
        >>> of_items(["a"])["items"], of_items(["a"]) == of_items(["b"])
        (1, False)
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item if isinstance(item, str) else _content(item), sort_keys=True).encode() + b"\n")
    return {"items": len(items), "digest": digest.hexdigest()}


def _content(example: Example) -> dict[str, Any]:
    fields = dataclasses.fields(example)
    values = {f.name: getattr(example, f.name) for f in fields}
    return {f.name: values[f.name] for f in fields if f.default is dataclasses.MISSING or values[f.name] != f.default}


def of_model(path: str, known: Origins | None = None) -> dict[str, dict[str, Any]]:
    """Return size, time of the last change and SHA-256 of each file that a local model is read from.

    Args:
        path: As :class:`soul.models.ModelSpec` has it; an adapter's base is looked at too, where it is on this machine.
        known: Digests from before, which are taken over for files whose size and time are the same.

    Returns:
        By the file's name; nothing where ``path`` leads to nothing on this machine.
    """
    try:
        place = source_of(path)
    except ValueError:  # a run without a model yet, say
        return {}
    files = {file.name: file for file in _files(place)}
    with contextlib.suppress(ValueError):  # a base that is gone, of an adapter that is still there
        if place and (place / "adapter_config.json").is_file():
            files |= {f"base/{file.name}": file for file in _files(source_of(check_adapter_files(place)[0]))}
    was = known.model if known else {}
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        marks = pool.map(lambda item: _mark(item[1], was.get(item[0])), files.items())
        return dict(zip(files, marks, strict=True))


def _files(place: Path | None) -> list[Path]:
    if place is None or place.is_file():
        return [place] if place else []
    found = (f for f in sorted(place.iterdir()) if f.is_file() and f.name[0] != ".")
    return [f for f in found if f.suffix in _PARTS or f.name in _NAMED or f.name.endswith(".index.json")]


def _mark(file: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    stat = file.stat()
    here = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
    if known and all(known[name] == value for name, value in here.items()):
        return dict(known)
    if file.name in _VERSIONED:
        with contextlib.suppress(ValueError, AttributeError):
            found = {k: v for k, v in json_value(read_text(file), "", lenient=True).items() if k != _VERSION}
            return {**here, "sha256": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}
    return {**here, "sha256": sha256(file)}


def _digest_in(model: Mapping[str, Mapping[str, Any]], name: str) -> str:
    return model[name]["sha256"] if name in model else ""
