"""Asking the hub, without a minute of retries where it cannot be reached."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any


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
