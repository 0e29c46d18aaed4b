"""From a checked export to the hub."""

from __future__ import annotations

import json
from pathlib import Path

from soul.data import hub
from soul.export import CARD, MARKER, carried, read_marker
from soul.models import OFFLINE

_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json", "pytorch_model*", "adapter_*"]


def check_push(repo: str) -> None:
    """Make sure that a push can be tried, before anything is written.

    Raises:
        ValueError: ``repo`` is no ``owner/name``, there is no token, or the hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push {repo}: {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"--push needs owner/name, not {repo!r}")
    if not get_token():
        raise ValueError("--push needs a token of the hub: set HF_TOKEN, or give `hf auth login`")
    if not hub.reachable():
        raise ValueError("--push: the hub cannot be reached; export without it, and give the same command later")


def check_carried(run: Path) -> None:
    """Make sure that what a run's tokenizer says before every question may be shown.

    Raises:
        ValueError: It carries a prompt or a system turn, which whoever has the model can read.
    """
    found = " and ".join(f"a {what} ({name})" for name, what in carried(run / "model").items())
    if found:
        raise ValueError(
            f"{run}: its tokenizer carries {found}, which everybody who has the model can read, names in it too: "
            "export it without --push, or give --show-data"
        )


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an export to the hub, its card as it is now, and return its address.

    Args:
        folder: A folder that :func:`export` made.
        repo: ``owner/name``; made if it is not there.
        private: Make a new repository private, and refuse one that is there and public.

    Raises:
        ValueError: The folder was not checked, is an adapter for a model that is not on the hub, or the hub refuses.
    """
    from huggingface_hub import HfApi

    check_push(repo)
    if not (folder / MARKER).is_file():
        raise ValueError(f"{folder} holds no checked export: make it with `soul export RUN --out {folder}`")
    files = read_marker(folder)["files"]
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else ""
    if base in OFFLINE or Path(base).is_absolute():
        raise ValueError(
            f"the adapter in {folder} belongs to {base}, which is not on the hub, so nobody else could load it: export "
            "without --adapter"
        )
    api = HfApi(library_name="soul-unlearning")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # to one that is there, `private` says nothing
            raise ValueError(f"{repo} is there already and public: give --public, or another name.")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload with soul export",
            allow_patterns=[*files, CARD, MARKER],  # and nothing that came into the folder since
            # of an earlier model: what a loader would take together with these, and a card that says nothing of them
            delete_patterns=[*_WEIGHTS, *([] if (folder / CARD).is_file() else [CARD])],
        )
    except (OSError, ValueError) as error:  # what the hub refuses, and what the network does
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot push to {repo}: {reason} The export in {folder} is whole.") from error
    return f"https://huggingface.co/{repo}"
