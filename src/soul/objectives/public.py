"""What public code computes where it parts from its formula (``compat``): over positions that are no answers, mostly.

Each function returns what that code returns for one batch, as a term of one item: the rows of a view, padded to the
longest of them, go through the model alone. Over an accumulation window such terms are averaged, as there.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from soul.data.batches import VIEWS
from soul.forward import block_on, wide
from soul.reference import Reference
from soul.types import Term

Batch = dict[str, torch.Tensor]
CODES = ("open-unlearning", "soul", "muse")
"""Code whose KL on the retain set is none over answer tokens."""
TINY = 1e-12


def rows_of(batch: Batch, view: str) -> Batch:
    """Return the rows of a view, cut to the longest of them."""
    keep = batch["view"] == VIEWS.index(view)
    width = int(batch["attention_mask"][keep].sum(dim=1).max())
    return {name: value[keep][:, :width] if value.dim() == 2 else value[keep] for name, value in batch.items()}


def logits_of(model: nn.Module, rows: Batch) -> torch.Tensor:
    """Return logits (B, T, V) at all positions."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    return wide(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def states_of(model: nn.Module, rows: Batch, layer: int) -> torch.Tensor:
    """Return the output (B, T, D) of a decoder block at all positions."""
    with block_on(model, layer) as caught:
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False)
    return wide(caught[0])


def _both(model: nn.Module, rows: Batch, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of model and reference."""
    with reference.asking(model) as before:
        theirs = logits_of(before, rows)
    return logits_of(model, rows), theirs


def public_kl(code: str, model: nn.Module, batch: Batch, reference: Reference) -> Term:
    """Return KL on the retain rows as code has it: over prompts and padding too.

    ``open-unlearning``: ``KL(p_ref || p)``, mean over all positions. ``soul``: the cross-entropy ``H(p, p_ref)``, mean
    over all positions, which sharpens ``p`` rather than keeping it. ``muse``: ``sum exp(z_ref) (z_ref - z)`` of raw
    logits over the rows, which is no divergence.
    """
    ours, theirs = _both(model, rows_of(batch, "retain"), reference)
    positions = ours.shape[0] * ours.shape[1]
    if code == "muse":
        return Term(kl_div(ours, theirs, log_target=True, reduction="batchmean"), 1)
    if code == "soul":
        return Term(-(ours.softmax(dim=-1) * (theirs.softmax(dim=-1) + TINY).log()).sum() / positions, 1)
    p, q = theirs.log_softmax(dim=-1), ours.log_softmax(dim=-1)
    return Term(kl_div(q, p, log_target=True, reduction="sum") / positions, 1)


def public_npo(code: str, model: nn.Module, batch: Batch, reference: Reference, beta: float) -> Term:
    """Return NPO as code has it.

    ``soul``: one ratio for the batch, of mean losses over all its answer tokens. ``muse``: a ratio for each entry of
    the vocabulary at each position, of raw logits; the answer is not looked at.
    """
    rows = rows_of(batch, "forget")
    ours, theirs = _both(model, rows, reference)
    if code == "muse":
        return Term(-(2 / beta) * logsigmoid(beta * (theirs - ours)).mean(), 1)
    asked, targets = rows["answer_mask"][:, 1:], rows["input_ids"][:, 1:]
    losses = [cross_entropy(z[:, :-1][asked], targets[asked]) for z in (ours, theirs)]
    return Term(-(2 / beta) * logsigmoid(beta * (losses[0] - losses[1])), 1)


def public_undial(model: nn.Module, batch: Batch, reference: Reference, strength: float) -> Term:
    """Return UNDIAL's loss over all positions; where no answer is, the label -100 strikes at column ``V - 100``."""
    rows = rows_of(batch, "forget")
    ours, theirs = _both(model, rows, reference)
    labels = torch.where(rows["answer_mask"], rows["input_ids"], ours.shape[-1] - 100)[:, 1:]
    struck = torch.zeros_like(theirs[:, :-1]).scatter_(-1, labels[..., None], strength)
    target = (theirs[:, :-1] - struck).softmax(dim=-1)
    return Term(-(target * ours[:, :-1].log_softmax(dim=-1)).sum(dim=-1).mean(), 1)


def public_margin(model: nn.Module, batch: Batch) -> Term:
    """Return PDU's loss with the labels' mask not shifted: at answer tokens, not at the positions before them."""
    rows = rows_of(batch, "forget")
    logits = logits_of(model, rows)[rows["answer_mask"]]
    return Term((logits.amax(dim=-1) - logits.mean(dim=-1)).square().mean(), 1)


def public_states(code: str, model: nn.Module, batch: Batch, view: str, layer: int, target: torch.Tensor) -> Term:
    """Return RMU's mean squared error as code has it: divided by the width of the states.

    ``open-unlearning``: at answer tokens, not at the positions before them; the mean over rows of their sums ``S``
    times the mean of ``1/n`` over rows, since sums (B,) are divided by lengths (B, 1) and each row by all. ``wmdp``:
    mean over all positions, padding too.

    Args:
        code: Whose.
        model: The model.
        batch: A batch.
        view: Rows that count.
        layer: The decoder block.
        target: (D,), or (B, T, D).
    """
    rows = rows_of(batch, view)
    states = states_of(model, rows, layer)
    errors = (states - target.to(states.device, states.dtype)).square().mean(dim=-1)
    if code == "wmdp":
        return Term(errors.mean(), 1)
    mask = rows["answer_mask"]
    return Term(((errors * mask).sum(dim=1) / mask.sum(dim=1, keepdim=True)).mean(), 1)
