"""A folder with a tiny model and its data to run commands in; the real model, for the few tests that need one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, into which the real model is converted once."""
    return tmp_path_factory.mktemp("soul-cache")


@pytest.fixture
def real(real_cache: Path, share_of_cores: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That cache in use, and all cores that no other worker has, which a model of this size is worth."""
    monkeypatch.setenv("SOUL_CACHE", str(real_cache))
    threads = torch.get_num_threads()
    torch.set_num_threads(share_of_cores)
    yield real_cache
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path, make_model, tokenizer, forget_set, retain_set, monkeypatch) -> Path:
    """The folder commands run in, with ``model``, ``forget.jsonl`` and ``retain.jsonl``."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        lines = (json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    return tmp_path
