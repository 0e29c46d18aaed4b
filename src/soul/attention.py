"""Attention over short sequences in bf16 on a CPU: the fused forward pass, a backward pass that suits short ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LONGEST = 96
"""Positions up to which the backward pass here is the faster one (``benchmarks/attention.py``)."""

_fused: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention


class ShortAttention(TorchFunctionMode):
    """Within it, gradients of half-precision attention over short sequences on a CPU are plain products.

    PyTorch's fused backward pass on CPUs works through blocks made for long sequences: of a training step of short
    answers with bf16 products it takes a quarter. In fp32 it is as fast as this one, and left. With
    ``S = scale Q K^T + mask``, ``P = softmax(S)`` and ``O = P V``, and ``dO`` the gradient of the output:

        dV = P^T dO,   dP = dO V^T,   dS = P * (dP - rowsum(dP * P)),   dQ = scale dS K,   dK = scale dS^T Q

    all of it in fp32, so that nothing is coarser than in the fused pass. The forward pass stays the fused one and keeps
    ``Q, K, V`` alone; ``P`` is a few megabytes of one layer at a time. Attention with dropout, on other devices, over
    longer sequences, where PyTorch was told not to take the fused kernel (``sdpa_kernel``), or of which no gradient is
    asked is left as it is.

    Not for models under gradient checkpointing, which runs blocks again outside of it.

    Args:
        longest: Positions up to which it is done.

    Example:
        >>> q = torch.randn(1, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True)
        >>> with ShortAttention():
        ...     torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        >>> q.grad.shape
        torch.Size([1, 2, 5, 4])
    """

    def __init__(self, longest: int = LONGEST) -> None:
        super().__init__()
        self.longest = longest

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the one function."""
        if func is _fused:
            return _attention(self.longest, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    longest: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    ours = (
        kind in (torch.bfloat16, torch.float16)
        and query.device.type == "cpu"
        and query.ndim == key.ndim == value.ndim == 4
        and max(query.shape[-2], key.shape[-2]) <= longest
        and not dropout_p
        # the CPU's kernel goes by it too; compiled code cannot ask
        and (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled())
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and not (attn_mask is not None and attn_mask.requires_grad)
    )
    if not ours:
        return _fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = (x.to(kind) for x in (query, key, value))  # as autocast does for the fused one
    return _short_attention(
        query, key, value, attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale, enable_gqa
    )


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients; several query heads may share one of keys and values."""
    batch, heads, length, _ = query.shape
    shared = key.shape[1]

    def by_key(x: torch.Tensor) -> torch.Tensor:
        """(B, H, L, D) to (B, shared heads, heads for each x L, D): one product for all that share a key."""
        return x.float().reshape(batch, shared, heads // shared * length, x.shape[-1])

    with torch.autocast("cpu", enabled=False):
        q, k, v, d_out = by_key(query), key.float(), value.float(), by_key(grad)
        scores = (q @ k.mT).view(batch, heads, length, -1) * scale
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        shares = scores.softmax(-1)
        if mask is not None:
            # a row that sees nothing gives zeros, as the fused pass does; nan of any other cause stays
            shares = shares.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
        d_shares = (d_out @ v.mT).view_as(shares)
        d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True)) * scale
        d_scores, shares = (x.view(batch, shared, -1, x.shape[-1]) for x in (d_scores, shares))
        d_query = (d_scores @ k).view_as(query)
        found = d_query, d_scores.mT @ q, shares.mT @ d_out
    d_query, d_key, d_value = (d.to(x.dtype).contiguous() for d, x in zip(found, (query, key, value), strict=True))
    return d_query, d_key, d_value


@torch.library.custom_op("soul::short_attention", mutates_args=())
def _short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    grouped: bool,
) -> torch.Tensor:
    """An operation of its own, so that compiled code calls it as it is."""
    with torch.autocast("cpu", enabled=False):
        found = _fused(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous().transpose(1, 2)  # which is how the fused pass leaves it


# likewise
_short_attention_gradients = torch.library.custom_op("soul::short_attention_gradients", _gradients, mutates_args=())


@_short_attention.register_fake
def _(query: torch.Tensor, *_rest: object) -> torch.Tensor:
    batch, heads, length, width = query.shape
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


@_short_attention_gradients.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - the hook's shape
    query, key, value, mask, ctx.causal, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key, value, mask)


def _back(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, mask = ctx.saved_tensors
    # to be differentiated again is what operations of our own cannot be
    gradients: Any = _gradients if torch.is_grad_enabled() else _short_attention_gradients
    return (*gradients(query, key, value, mask, ctx.causal, ctx.scale, grad), None, None, None, None)


_short_attention.register_autograd(_back, setup_context=_keep)
