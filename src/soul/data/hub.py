"""Asking the hub, without a minute of retries where it cannot be reached."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"
"""The file by which a repository, or a folder, is an adapter."""


def reachable() -> bool:
    """Say whether the hub's name can be looked up; a proxy is trusted to reach it."""
    if urllib.request.getproxies():
        return True
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(address).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def no_retries() -> Iterator[None]:
    """Within it, an unreachable hub means the cache at once; otherwise nothing changes.

    The hub's clients would try for a minute before they look into their cache. They read ``HF_HUB_OFFLINE`` when they
    are imported, which may be long past, so what they made of it is set for the while.

    Example:
        >>> with no_retries():
        ...     pass  # from_pretrained("owner/name")
    """
    if reachable():
        yield
        return
    from huggingface_hub import constants

    clients: list[Any] = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [client.HF_HUB_OFFLINE for client in clients]
    for client in clients:
        client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value


def file_of(repo: str, name: str, revision: str = "") -> Path | None:
    """Return a file of a model's repository in this machine's cache, where it is put if it can be had.

    Args:
        repo: A hub id.
        name: The file.
        revision: A branch, a tag or a commit; the newest by default.

    Returns:
        None where there is no such file, revision or repository, or no way to it: who loads the model says why.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    with contextlib.suppress(OSError, EntryNotFoundError, HFValidationError):
        return Path(hf_hub_download(repo, name, revision=revision or None))
    return None


def commit_of(repo: str, revision: str = "") -> str:
    """Return the commit that a revision of a model's repository is; empty where that cannot be found out.

    The cache keeps each commit's files in a folder of its name, with every version of the hub's client.
    """
    for name in ("config.json", ADAPTER):
        file = file_of(repo, name, revision)
        if file is not None and file.parent.parent.name == "snapshots":
            return file.parent.name
    return ""


def adapter_of(repo: str, revision: str = "") -> Path | None:
    """Return the folder in the cache with the files of an adapter; None where the repository is none, as far as known.

    Raises:
        OSError: It is one, and its files cannot be had.
    """
    from huggingface_hub import snapshot_download

    if file_of(repo, ADAPTER, revision) is None:
        return None
    wanted = ["adapter_*", "*.json", "*.jinja", "*.txt", "*.model"]  # no states of its training, no merged weights
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]))
