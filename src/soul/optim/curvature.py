"""Curvature passes: one backward pass whose squared gradients estimate the diagonal Gauss-Newton matrix without bias.

For a mean loss ``sum_i w_i loss_i`` over answer tokens, with logits ``z_i(theta)``, their Jacobian ``J_i`` and
``p_i = softmax(z_i)``, the Gauss-Newton matrix (equal to the true Fisher matrix for the cross-entropy) is::

    G = sum_i w_i J_i^T (diag p_i - p_i p_i^T) J_i

Draw for each token a vector ``s_i`` with ``E[s_i] = 0`` and ``E[s_i s_i^T] = diag p_i - p_i p_i^T``, send
``r_i = sqrt(w_i) s_i`` backward from the logits, and the gradient is ``g = sum_i sqrt(w_i) J_i^T s_i``. Then::

    E[g g^T] = sum_i w_i J_i^T E[s_i s_i^T] J_i + sum_{i != j} sqrt(w_i w_j) J_i^T E[s_i] E[s_j]^T J_j = G

The cross terms vanish because tokens draw independently and with mean zero, so ``g * g`` is an unbiased estimate of
the diagonal of ``G`` for any weights. The square root is what makes it so: with ``w_i`` itself the tokens would be
weighted by ``w_i^2``, which only for equal weights a single factor (Sophia's batch size) can mend. Several
micro-batches may add up in ``p.grad`` before the square is taken, if the weights sum to 1 over all of them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Estimator = Literal["ggn", "gnb"]


@torch.no_grad()
def ggn_cotangent(logits_NV: torch.Tensor, weights_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ``r = sqrt(w) (sqrt(p) * eps - p (sqrt(p) . eps))`` with random signs ``eps``.

    ``E[eps eps^T] = I`` gives ``E[r r^T] = w (diag p - p p^T - p p^T + p p^T sum(p)) = w (diag p - p p^T)`` exactly. No
    label is drawn, so the noise does not grow where the model is sure: on memorised answers sampled labels are nearly
    always the expected ones, and :func:`gnb_cotangent` is then nearly always almost 0, and rarely huge.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Source of the signs; it may live on another device than the logits.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, or a negative weight.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> ggn_cotangent(logits, torch.ones(1), torch.Generator().manual_seed(0)).abs()
        tensor([[0.7071, 0.7071]])
    """
    root_NV, scale_N = _prepare(logits_NV, weights_N)
    root_NV.sqrt_()
    signs_NV = _random_signs(root_NV, generator)
    cotangent_NV = torch.copysign(root_NV, signs_NV, out=signs_NV)
    dot_N = cotangent_NV.sum(-1)  # sqrt(p) . eps
    # two buffers of N x V in all: the roots become the probabilities again
    cotangent_NV.addcmul_(root_NV.square_(), dot_N[:, None], value=-1)
    return cotangent_NV.mul_(scale_N[:, None]).to(logits_NV.dtype)


@torch.no_grad()
def gnb_cotangent(logits_NV: torch.Tensor, weights_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ``r = sqrt(w) (p - onehot(y))`` with labels ``y`` drawn from ``p`` (Gauss-Newton-Bartlett).

    The estimator of Sophia-G (arXiv 2305.14342, algorithm 2): ``E[onehot(y)] = p`` and
    ``E[onehot(y) onehot(y)^T] = diag p`` give ``E[r r^T] = w (diag p - p p^T)``.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Source of the labels; it may live on another device than the logits.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, or a negative weight.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> gnb_cotangent(logits, torch.ones(1), torch.Generator().manual_seed(0)).abs()
        tensor([[0.5000, 0.5000]])
    """
    cotangent_NV, scale_N = _prepare(logits_NV, weights_N)
    labels_N = _sample(cotangent_NV, generator)
    cotangent_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N] -= 1
    return cotangent_NV.mul_(scale_N[:, None]).to(logits_NV.dtype)


def backward_curvature(
    logits_NV: torch.Tensor, weights_N: torch.Tensor, estimator: Estimator, generator: torch.Generator
) -> None:
    """Send a random cotangent backward, so that each ``p.grad ** 2`` estimates the diagonal Gauss-Newton matrix.

    Gradients add to what ``p.grad`` holds: clear it before the first micro-batch, do not clip it, and let
    :meth:`soul.optim.base.UpdateRule.update_curvature` take it in. The model should be in eval mode, since dropout
    would be noise that the estimate does not know of.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others, with their graph.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        estimator: ``"ggn"`` (:func:`ggn_cotangent`) or ``"gnb"`` (:func:`gnb_cotangent`).
        generator: Source of randomness.

    Raises:
        ValueError: Unknown estimator, shapes that do not fit, or a negative weight.

    Example:
        >>> theta = torch.zeros(1, 2, requires_grad=True)
        >>> backward_curvature(theta * 1.0, torch.ones(1), "gnb", torch.Generator().manual_seed(0))
        >>> theta.grad**2  # here exact: the diagonal of diag p - p p^T at p = 1/2
        tensor([[0.2500, 0.2500]])
    """
    cotangents = {"ggn": ggn_cotangent, "gnb": gnb_cotangent}
    if estimator not in cotangents:
        raise ValueError(f"unknown curvature estimator {estimator!r}; known: {', '.join(get_args(Estimator))}")
    logits_NV.backward(gradient=cotangents[estimator](logits_NV, weights_N, generator))


def _prepare(logits_NV: torch.Tensor, weights_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a fresh ``[N, V]`` tensor of probabilities and the ``[N]`` roots of the weights."""
    if logits_NV.ndim != 2 or weights_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"curvature needs logits [N, V] and weights [N], not {list(logits_NV.shape)} and {list(weights_N.shape)}"
        )
    if bool((weights_N < 0).any()):
        raise ValueError("curvature needs weights of 0 or more; a term that is ascended has no positive curvature")
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    p_NV = torch.softmax(logits_NV, dim=-1, dtype=dtype)
    return p_NV, weights_N.to(device=p_NV.device, dtype=dtype).sqrt()


def _random_signs(like_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers whose signs are independent and fair, shaped like ``like_NV``; their size means nothing."""
    # several times faster than Bernoulli draws; exactly fair, as 0 counts as positive in [-1, 1)
    noise_NV = torch.empty(like_NV.shape, dtype=like_NV.dtype, device=generator.device)
    return noise_NV.uniform_(-1, 1, generator=generator).to(like_NV.device)


def _sample(p_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one index ``[N]`` a row, drawn from ``p_NV``: the first of exponential clocks with rates ``p`` to ring."""
    clocks_NV = torch.empty(p_NV.shape, dtype=p_NV.dtype, device=generator.device).exponential_(generator=generator)
    clocks_NV = clocks_NV.to(p_NV.device)
    return torch.div(p_NV, clocks_NV, out=clocks_NV).argmax(-1)
