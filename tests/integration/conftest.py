"""The real language model, for the few tests that need one."""

from __future__ import annotations

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
