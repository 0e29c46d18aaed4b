"""One forward pass over a batch, with the language-model head on answer positions only."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from soul.data.batches import VIEWS


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model says at the answer positions of a batch.

    Attributes:
        logits_NV: Logits of each answer token, in the dtype the model computes in.
        hidden_ND: Last hidden states that the head was applied to.
        targets_N: The answer tokens.
        row_N: Row of the batch each answer token belongs to.
        view_B: Role of each row.
        key_B: Name of each row's content.
    """

    logits_NV: torch.Tensor
    hidden_ND: torch.Tensor
    targets_N: torch.Tensor
    row_N: torch.Tensor
    view_B: torch.Tensor
    key_B: torch.Tensor

    def token_logps(self) -> torch.Tensor:
        """Return ``log p(answer token)`` (N,), in fp32 at least."""
        logits = self.logits_NV if self.logits_NV.dtype == torch.float64 else self.logits_NV.float()
        return -nn.functional.cross_entropy(logits, self.targets_N, reduction="none")

    def select(self, view: str) -> torch.Tensor:
        """Return the answer tokens (bool, N) of the rows that play the role ``view``."""
        return (self.view_B == VIEWS.index(view))[self.row_N]

    def sum_rows(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum token values over each row: (N,) -> (B,)."""
        return torch.zeros(len(self.view_B), dtype=values_N.dtype, device=values_N.device).index_add(
            0, self.row_N, values_N
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers such as DistributedDataParallel."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model


def head_of(model: nn.Module) -> nn.Module:
    """Return the language-model head.

    Raises:
        ValueError: The model has none.
    """
    get = getattr(unwrap(model), "get_output_embeddings", None)
    head = get() if get else None
    if not isinstance(head, nn.Module):
        raise ValueError(f"{type(unwrap(model)).__name__} has no language-model head: give a causal language model")
    return head


@contextlib.contextmanager
def head_on(model: nn.Module, keep_BT: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Let the head see ``hidden[keep]`` (N, D) in place of (B, T, D); yields the list that catches what it saw.

    A hook rather than our own call of backbone and head, because it works for every architecture and under every
    wrapper (PEFT, DDP, FSDP), and keeps what a model does to its logits afterwards (scaling, soft caps).
    """
    caught: list[torch.Tensor] = []

    def pick(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        caught.append(args[0][keep_BT])
        return (caught[-1], *args[1:])

    handle = head_of(model).register_forward_pre_hook(pick)
    try:
        yield caught
    finally:
        handle.remove()


def forward_answers(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Answers:
    """Run the model once and return what it says at the answer positions.

    Position ``t-1`` predicts token ``t``, so the head runs at the positions before each answer token.

    Args:
        model: A causal language model, wrapped or not.
        batch: From :func:`soul.data.batches.collate_rows`.

    Example:
        >>> answers = forward_answers(model, batch)  # doctest: +SKIP
        >>> answers.token_logps().sum()  # doctest: +SKIP
    """
    mask = batch["answer_mask"]
    keep = torch.zeros_like(mask)
    keep[:, :-1] = mask[:, 1:]
    with head_on(model, keep) as caught:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return Answers(out.logits, caught[0], batch["input_ids"][mask], rows[mask], batch["view"], batch["key"])
