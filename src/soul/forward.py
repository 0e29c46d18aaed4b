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
        states_ND: Output of the decoder block that was asked for, at the positions the logits come from.
        reference_NV: The reference's logits of a view's answer tokens, by view; what the objective asked for.
        reference_ND: The reference's states of a view's answer tokens, by view; likewise.
    """

    logits_NV: torch.Tensor
    hidden_ND: torch.Tensor
    targets_N: torch.Tensor
    row_N: torch.Tensor
    view_B: torch.Tensor
    key_B: torch.Tensor
    states_ND: torch.Tensor | None = None
    reference_NV: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    reference_ND: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def token_logps(self) -> torch.Tensor:
        """Return ``log p(answer token)`` (N,), in fp32 at least."""
        logits = self.logits_NV if self.logits_NV.dtype == torch.float64 else self.logits_NV.float()
        return -nn.functional.cross_entropy(logits, self.targets_N, reduction="none")

    def wide_logits(self, view: str) -> torch.Tensor:
        """Return the logits (n, V) of a view's answer tokens, in fp32 at least."""
        return wide(self.logits_NV[self.select(view)])

    def states(self, view: str) -> torch.Tensor:
        """Return the states (n, D) of a view's answer tokens, in fp32 at least."""
        assert self.states_ND is not None, "the forward pass was not asked for the states of a block"
        return wide(self.states_ND[self.select(view)])

    def select(self, view: str) -> torch.Tensor:
        """Return the answer tokens (bool, N) of the rows that play the role ``view``."""
        return (self.view_B == VIEWS.index(view))[self.row_N]

    def sum_rows(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum token values over each row: (N,) -> (B,)."""
        return torch.zeros(len(self.view_B), dtype=values_N.dtype, device=values_N.device).index_add(
            0, self.row_N, values_N
        )


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return values in fp32, or in float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


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


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks, first one first, whatever the architecture calls them.

    Raises:
        ValueError: The model has no list of as many blocks as its configuration says.
    """
    inner = unwrap(model)
    depth = getattr(getattr(inner, "config", None), "num_hidden_layers", None)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"cannot tell the decoder blocks of {type(inner).__name__} (num_hidden_layers: {depth})")


@contextlib.contextmanager
def block_on(model: nn.Module, layer: int | None) -> Iterator[list[torch.Tensor]]:
    """Yield the list that catches the output (B, T, D) of decoder block ``layer``; nothing where that is None."""
    caught: list[torch.Tensor] = []
    if layer is None:
        yield caught
        return

    def keep(_module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor]) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_blocks(model)[layer].register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def forward_answers(model: nn.Module, batch: Mapping[str, torch.Tensor], layer: int | None = None) -> Answers:
    """Run the model once and return what it says at the answer positions.

    Position ``t-1`` predicts token ``t``, so the head runs at the positions before each answer token.

    Args:
        model: A causal language model, wrapped or not.
        batch: From :func:`soul.data.batches.collate_rows`.
        layer: Decoder block whose output is wanted as well, from 0.

    Example:
        >>> answers = forward_answers(model, batch)  # doctest: +SKIP
        >>> answers.token_logps().sum()  # doctest: +SKIP
    """
    mask = batch["answer_mask"]
    keep = torch.zeros_like(mask)
    keep[:, :-1] = mask[:, 1:]
    with head_on(model, keep) as caught, block_on(model, layer) as blocks:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    states = blocks[0][keep] if blocks else None
    return Answers(out.logits, caught[0], batch["input_ids"][mask], rows[mask], batch["view"], batch["key"], states)
