"""What membership attacks see of an answer: the probability of each of its tokens, and the gradient it asks for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from soul.data.batches import collate_rows, fitting, length_batches
from soul.data.templates import Encoded
from soul.forward import forward_answers

Count = Callable[[int, int], None]
_FLAT = 1e-9  # a standard deviation below it is rounding


class TokenScores(NamedTuple):
    """The tokens of one answer, end of turn included.

    Attributes:
        logps: ``log p(y_t | x, y_<t)``.
        matches: 1 where ``y_t`` is the most likely token after ``x, y_<t``, else 0.
        z: ``(log p(y_t) - mu_t) / sigma_t``, see :func:`standardise`.
    """

    logps: list[float]
    matches: list[int]
    z: list[float]


@torch.no_grad()
def token_scores(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, max_tokens: int = 4096, progress: Count | None = None
) -> list[TokenScores]:
    """Return log-probability, greedy match and Min-K++ value of each answer token, from one teacher-forced pass.

    The head is applied to answer positions only, and the vocabulary's distribution is looked at in pieces of 64
    positions. Plain text is all answer, so that its logits are made for all of a batch's positions at once.

    Args:
        model: A causal language model; it is run in its own dtype, without autocast.
        rows: Tokenised examples.
        pad_id: Token that fills rows up.
        max_tokens: Padded tokens in a batch, at most (:func:`soul.data.batches.fitting`).
        progress: Called with (done, of).
    """
    found: list[TokenScores | None] = [None] * len(rows)
    device = next(model.parameters()).device
    done = 0
    for picked in length_batches([len(row) for row in rows], fitting(max_tokens, device)):
        batch = collate_rows([rows[i] for i in picked], pad_id=pad_id)
        answers = forward_answers(model, {k: v.to(device) for k, v in batch.items()})
        logps, matches = answers.token_logps(), answers.logits_NV.argmax(-1) == answers.targets_N
        pieces = zip(answers.logits_NV.split(64), answers.targets_N.split(64), strict=True)
        z = torch.cat([standardise(logits, targets) for logits, targets in pieces])
        lengths = [rows[i].answer_length for i in picked]
        parts = (values.split(lengths) for values in (logps, matches.long(), z))
        for i, *three in zip(picked, *parts, strict=True):
            found[i] = TokenScores(*(values.tolist() for values in three))
        done += len(picked)
        if progress:
            progress(done, len(rows))
    return [scores for scores in found if scores is not None]


def standardise(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return ``z = (log p(y) - mu) / sigma`` (N,), the token's log-probability beside those the model deems likely.

    ``mu = sum_v p(v) log p(v)`` and ``sigma^2 = sum_v p(v) (log p(v) - mu)^2`` over the vocabulary (Min-K++, arXiv
    2404.02936). The variance is taken around the mean, in float64: the difference of two sums that public
    code takes cancels where the model is sure. 0 where all tokens are equally likely.

    Args:
        logits_NV: Logits (N, V), finite or -inf.
        targets_N: Tokens (N,).

    Example:
        >>> standardise(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.])
    """
    wide = torch.float32 if logits_NV.device.type == "mps" else torch.float64
    logps = logits_NV.to(wide).log_softmax(-1)
    shares = logps.exp()
    mean = (shares * logps).where(shares > 0, 0.0).sum(-1, keepdim=True)
    spread = (shares * (logps - mean).square()).where(shares > 0, 0.0).sum(-1).sqrt()
    above = logps.gather(-1, targets_N[:, None])[:, 0] - mean[:, 0]
    return torch.where((above.abs() < _FLAT) & (spread < _FLAT), 0.0, above / spread.clamp_min(_FLAT)).float()


def gradient_norms(model: Any, rows: Sequence[Encoded], *, progress: Count | None = None) -> list[float]:
    """Return ``|| d NLL(y|x) / d theta ||_2`` of each row, ``NLL`` the mean over answer tokens.

    Over all floating-point parameters, frozen ones too, tied ones once. One row at a time; squares are summed in fp32
    within a tensor and in float64 over tensors, whatever the weights' dtype. Gradients, flags and weights of the model
    stay as they were.

    Args:
        model: A causal language model; it is run in its own dtype, without autocast.
        rows: Tokenised examples.
        progress: Called with (done, of).
    """
    norms = []
    device = next(model.parameters()).device
    with _all_differentiable(model) as parameters, torch.enable_grad():
        for done, row in enumerate(rows, 1):
            answers = forward_answers(model, {k: v.to(device) for k, v in collate_rows([row]).items()})
            gradients = torch.autograd.grad(-answers.token_logps().mean(), parameters, allow_unused=True)
            squares = [float(torch.linalg.vector_norm(g, dtype=_wide(g))) ** 2 for g in gradients if g is not None]
            norms.append(math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan)
            if progress:
                progress(done, len(rows))
    return norms


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _all_differentiable(model: torch.nn.Module) -> Iterator[list[torch.nn.Parameter]]:
    """Let every floating-point parameter take part in autograd for a while."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    asked = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield parameters
    finally:
        for p, flag in zip(parameters, asked, strict=True):
            p.requires_grad_(flag)
