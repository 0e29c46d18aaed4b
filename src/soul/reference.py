"""The reference model, without a second copy of it wherever that can be had."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from soul.data.batches import collate_rows, length_batches
from soul.data.templates import Encoded
from soul.forward import Answers, forward_answers, head_of


@dataclasses.dataclass
class Reference:
    """What the objective may ask about the model as it was before unlearning.

    Attributes:
        logps: Cached sequence log-probabilities ``log p_ref(answer | prompt)`` by content key.
        hidden: Cached last hidden states (n, D) at answer positions by content key.
        head: A frozen copy of the language-model head, which turns ``hidden`` into logits.
        live: Asks a model (adapters off, or a frozen copy) instead of the caches.
    """

    logps: dict[int, float] = dataclasses.field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    head: nn.Module | None = None
    live: Callable[[], Any] | None = None

    def sequence_logps(self, answers: Answers) -> torch.Tensor:
        """Return ``log p_ref`` summed over each row's answer tokens, (B,); rows not cached are 0."""
        values = [self.logps.get(key, 0.0) for key in answers.key_B.tolist()]
        dtype = torch.float64 if answers.logits_NV.dtype == torch.float64 else torch.float32
        return torch.tensor(values, dtype=dtype, device=answers.logits_NV.device)

    def logits(self, model: nn.Module, batch: dict[str, torch.Tensor], answers: Answers, view: str) -> torch.Tensor:
        """Return the reference's logits at the answer positions of ``view``, (n, V)."""
        with torch.no_grad():
            if self.live is not None:
                with self.live() as reference:
                    return forward_answers(reference or model, batch).logits_NV[answers.select(view)]
            assert self.head is not None, "the objective did not declare that it needs distributions"
            rows = answers.row_N[answers.select(view)].unique_consecutive().tolist()
            hidden = torch.cat([self.hidden[int(answers.key_B[row])] for row in rows])
            weight = next(self.head.parameters())
            return self.head(hidden.to(weight.device, weight.dtype))


def build_reference(
    model: nn.Module,
    *,
    logps: Sequence[Encoded] = (),
    distributions: Sequence[Encoded] = (),
    mode: str = "cache",
    pad_id: int = 0,
    max_tokens: int = 4096,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Reference:
    """Ask the model, as it is now, everything the objective will need to know about it later.

    Args:
        model: The model before unlearning.
        logps: Rows whose sequence log-probability is needed (NPO, DPO).
        distributions: Rows whose full next-token distributions are needed (KL).
        mode: ``"cache"``; ``"adapter_off"`` for distributions from a PEFT model with its adapters off; ``"copy"`` for a
            frozen second copy of the model.
        pad_id: Padding token.
        max_tokens: Padded tokens in a forward pass.
        autocast: The precision training runs in: both sides of a log-ratio must be rounded alike.

    Raises:
        ValueError: Unknown mode, or ``adapter_off`` on a model without adapters.
    """
    if mode not in ("cache", "adapter_off", "copy"):
        raise ValueError(f"reference mode must be cache, adapter_off or copy, not {mode!r}")
    reference = Reference()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    wanted = {row.key: row for row in [*logps, *distributions]}
    keep_hidden = {row.key for row in distributions} if mode == "cache" else set()
    rows = list(wanted.values())
    with torch.no_grad(), autocast():
        for group in length_batches([len(row) for row in rows], max_tokens):
            batch = {k: v.to(device) for k, v in collate_rows([rows[i] for i in group], pad_id=pad_id).items()}
            answers = forward_answers(model, batch)
            for key, value in zip(
                answers.key_B.tolist(), answers.sum_rows(answers.token_logps()).tolist(), strict=True
            ):
                reference.logps[key] = value
            for i, key in enumerate(answers.key_B.tolist()):
                if key in keep_hidden:
                    reference.hidden[key] = answers.hidden_ND[answers.row_N == i].cpu().clone()
    model.train(was_training)
    if distributions:
        _add_distributions(reference, model, mode)
    return reference


def _add_distributions(reference: Reference, model: nn.Module, mode: str) -> None:
    if mode == "cache":
        reference.head = copy.deepcopy(head_of(model)).requires_grad_(False)
    elif mode == "copy":
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        reference.live = lambda: contextlib.nullcontext(frozen)
    else:
        disable = getattr(model, "disable_adapter", None)
        if disable is None:
            raise ValueError("reference mode adapter_off needs a model with adapters (adapter: {r: 8, ...})")
        reference.live = disable
