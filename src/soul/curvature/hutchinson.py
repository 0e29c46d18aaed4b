"""The diagonal of a loss's Hessian, from products of the Hessian with vectors of random signs."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

Loss = Callable[[], torch.Tensor]

STEP = 2.0**-10
"""Size of a difference's step relative to the weights. The difference's error goes as its square, until rounding in
fp32 (in which many models compute norms whatever their weights) takes over: together least near here."""

# What torch says where a kernel, an autograd function or a checkpoint cannot be differentiated twice.
_NOT_TWICE = (
    "derivative for",
    "derivative of",
    "is not implemented",
    "differentiate twice",
    "double backward",
    "incompatible with .grad()",
)


def hutchinson_diagonal(
    loss: Loss, params: Sequence[torch.Tensor], generator: torch.Generator, *, differences: bool = False
) -> list[torch.Tensor]:
    """Return ``v * (H v)`` with random signs ``v``: an unbiased estimate of the diagonal of the Hessian ``H``.

    ``E[v_i sum_j H_ij v_j] = H_ii`` as ``E[v_i v_j] = 0`` for ``i != j`` and ``v_i^2 = 1`` (Hutchinson 1990; Sophia-H,
    arXiv 2305.14342, algorithm 1, draws normal ``v``, whose fourth moment adds ``2 H_ii^2`` to the variance). The
    Hessian is that of the loss with its true labels; unlike the Gauss-Newton matrix it is not positive, and neither is
    the estimate: variance ``sum_{j != i} H_ij^2`` does not shrink where ``H_ii`` does. It is to be averaged with its
    sign. What an update rule makes of a negative average is the rule's affair: Sophia counts it as no curvature, so
    that ``max(rho h, 0) + damping`` divides and the coordinate takes a step of full length (``max(gamma h, eps)``
    in the paper).

    Products come from differentiating twice, with attention on the path that can be; where something else cannot be
    differentiated twice they are central differences of gradients.

    Args:
        loss: Computes the loss anew, the same at each call: no dropout.
        params: What the loss is differentiated by: every leaf that takes gradients.
        generator: Source of the signs; it may live on another device.
        differences: Take differences at once, where second derivatives would be wrong without a sign of it.

    Returns:
        One tensor for each of ``params``; the parameters and their ``grad`` are left as they were.

    Raises:
        ValueError: Only differences are possible, and a parameter's precision is below fp32.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hutchinson_diagonal(lambda: (x**3).sum(), [x], torch.Generator().manual_seed(0))  # 6 x
        [tensor([ 6., 12.])]
    """
    signs = [_signs(p, generator) for p in params]
    products = None if differences else _differentiated_twice(loss, params, signs)
    if products is None:
        products = difference_product(loss, params, signs)
    return [product.mul_(sign) for product, sign in zip(products, signs, strict=True)]


def hessian_product(loss: Loss, params: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return ``H v`` by differentiating ``grad . v``; the vectors do not depend on the parameters.

    Raises:
        RuntimeError: Something in the loss cannot be differentiated twice.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_product(lambda: x[0] * x[1], [x], [torch.tensor([1.0, 0.0])])
        [tensor([0., 1.])]
    """
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), _own_gradients(params):
        first = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
        dots = [(g * v).sum() for g, v in zip(first, vectors, strict=True) if g.requires_grad]
        if dots:  # else the loss is linear
            # Not autograd.grad: it walks only where params are to be found, and what cannot be differentiated twice
            # (once_differentiable) is cut off from them, so that a wrong product would come back without an error.
            torch.stack(dots).sum().backward()
        return _taken(params)


def difference_product(
    loss: Loss, params: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return ``(grad(theta + h v) - grad(theta - h v)) / 2h``, which is ``H v`` up to ``O(h^2)``.

    The step is ``h = STEP rms(theta) / rms(v)``. Gradients come from ``backward()``, which works where nothing else
    does (reentrant checkpoints, fused attention).

    Raises:
        ValueError: A parameter's precision is below fp32: the step would be lost in its rounding.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> difference_product(lambda: x[0] * x[1], [x], [torch.tensor([1.0, 0.0])])[0].round(decimals=3)
        tensor([0., 1.])
    """
    low = sorted({str(p.dtype) for p in params if p.dtype not in (torch.float32, torch.float64)})
    if low:
        raise ValueError(
            f"the hutchinson estimator needs differences of gradients here, which weights in {', '.join(low)} are too "
            "coarse for; use model.dtype=float32, or the estimator ggn"
        )
    step = STEP * (_rms(params) or 1.0) / (_rms(vectors) or 1.0)
    kept = [p.detach().clone() for p in params]
    sides = []
    try:
        with torch.enable_grad(), _own_gradients(params):
            for shift in (step, -step):
                with torch.no_grad():
                    for p, value, v in zip(params, kept, vectors, strict=True):
                        p.copy_(torch.add(value, v, alpha=shift))
                loss().backward()
                sides.append(_taken(params))
    finally:
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)  # adding and subtracting would not lead back to the same bytes
    return [above.sub_(below).div_(2 * step) for above, below in zip(*sides, strict=True)]


def _differentiated_twice(
    loss: Loss, params: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> list[torch.Tensor] | None:
    """Return ``H v``, or None where something cannot be differentiated twice."""
    try:
        return hessian_product(loss, params, vectors)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(words in str(error) for words in _NOT_TWICE):
            raise
        log.info("no second derivative (%s): taking differences of gradients", str(error).splitlines()[0])
        return None


@contextlib.contextmanager
def _own_gradients(params: Sequence[torch.Tensor]) -> Iterator[None]:
    """Lend the parameters' ``grad``, empty, and put back what was there."""
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def _taken(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients, zero where there are none, and clear them."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in params]
    for p in params:
        p.grad = None
    return grads


def _signs(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(0, 2, p.shape, generator=generator, device=generator.device, dtype=torch.int8)
    return bits.mul_(2).sub_(1).to(p.device, p.dtype)


def _rms(tensors: Sequence[torch.Tensor]) -> float:
    total = sum(float(t.detach().square().sum(dtype=torch.float64)) for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))
