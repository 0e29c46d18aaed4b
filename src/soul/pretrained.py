"""What is loaded besides the language model: its tokenizer alone, and classifiers that judge what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from soul.data import hub
from soul.intact import check_sizes, check_tokenizer, json_object
from soul.models import locate, reason_of


def load_tokenizer(path: str, revision: str = "", *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights.

    Args:
        path: As :attr:`soul.models.ModelSpec.path`.
        revision: As :attr:`soul.models.ModelSpec.revision`.
        trust_remote_code: Run code that comes with the model; without it what needs some is refused, and nobody asked.

    Raises:
        ValueError: Nothing can be loaded from there.

    Example:
        >>> load_tokenizer("smollm2-135m").eos_token  # doctest: +SKIP
        '<|im_end|>'
    """
    try:
        with hub.no_retries():
            where = locate(path, revision)
            check_tokenizer(Path(where.tokenizer))
            return AutoTokenizer.from_pretrained(
                where.tokenizer, trust_remote_code=trust_remote_code, **where.tokenizer_pinned
            )
    except Exception as error:  # as in soul.models: the libraries raise what they like
        raise ValueError(f"cannot load a tokenizer from {path!r}: {reason_of(path, error, revision)}") from error


def load_text_classifier(path: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a sequence classifier, in eval mode, and its tokenizer.

    Args:
        path: A hub id such as ``"unitary/toxic-bert"``, or a local folder.

    Raises:
        ValueError: Nothing can be loaded from there, or weights are missing.
    """
    hf_logging.disable_progress_bar()
    try:
        with hub.no_retries():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as in soul.models: the libraries raise what they like
        raise ValueError(f"cannot load a classifier from {path!r}: {reason_of(path, error)}") from error
    model, found = loaded
    if found["missing_keys"]:  # a language model without a trained head would answer at random
        raise ValueError(
            f"cannot load a classifier from {path!r}: its head is missing there; give a trained classifier"
        )
    return model.eval(), tokenizer


def load_text_encoder(path: str, *, download: bool = True) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an encoder of sentences, in eval mode, and its tokenizer.

    Args:
        path: A hub id or a local folder.
        download: Fetch from the hub what is not on this machine.

    Raises:
        ValueError: Nothing can be loaded from there, or weights are missing.
    """
    hf_logging.disable_progress_bar()
    try:
        with hub.no_retries():
            loaded: Any = AutoModel.from_pretrained(
                path,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=not download,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=not download, trust_remote_code=False)
    except Exception as error:  # as in soul.models: the libraries raise what they like
        raise ValueError(f"cannot load a sentence encoder from {path!r}: {reason_of(path, error)}") from error
    model, found = loaded
    if any(not name.startswith("pooler.") for name in found["missing_keys"]):  # means are taken, not pooled states
        raise ValueError(f"cannot load a sentence encoder from {path!r}: weights are missing there")
    return model.eval(), tokenizer


def load_config(path: str, revision: str = "", *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration without its weights; a GGUF file is converted once, as for a run.

    Args:
        path: As :attr:`soul.models.ModelSpec.path`.
        revision: As :attr:`soul.models.ModelSpec.revision`.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: There is no configuration.
    """
    try:
        with hub.no_retries():
            where = locate(path, revision)
            file = Path(where.base) / "config.json"
            if file.is_file():
                check_sizes(json_object(file), str(file))
            return AutoConfig.from_pretrained(where.base, trust_remote_code=trust_remote_code, **where.pinned)
    except Exception as error:  # as in soul.models: the libraries raise what they like
        raise ValueError(f"cannot load a configuration from {path!r}: {reason_of(path, error, revision)}") from error


def empty_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Return the causal language model of a configuration on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
