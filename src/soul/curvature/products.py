"""Gradients and curvature of the mean token loss over fixed micro-batches: what the inverses are built from.

For the mean cross-entropy ``sum_i w_i loss_i`` over answer tokens, ``w_i = 1/N``, with the logits' Jacobians ``J_i``
and ``p_i = softmax(z_i)``, the Gauss-Newton matrix is ``G = sum_i w_i J_i^T (diag p_i - p_i p_i^T) J_i`` (arXiv
1412.1193, section 8): the curvature of the loss with the model linearised, never negative, and the second derivative of
``KL(p_before || p_theta)`` where it is 0. So ``1/2 d^T G d`` is what a small change ``d`` costs in KL.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from soul.curvature.estimators import ggn_cotangent
from soul.curvature.vectors import Vector, norm, wide
from soul.data.batches import Batch, collate_rows, length_batches
from soul.data.templates import Encoded
from soul.forward import forward_answers

Take = Callable[[str, torch.Tensor], None]
Jvp = Literal["auto", "forward", "double_backward", "difference"]


def micro_batches(rows: Sequence[Encoded], pad_id: int, max_tokens: int = 1024) -> list[Batch]:
    """Return ``rows`` as batches of similar length with at most ``max_tokens`` padded tokens each."""
    groups = length_batches([len(row) for row in rows], max_tokens)
    return [collate_rows([rows[i] for i in group], pad_id=pad_id) for group in groups]


def single_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return every row as a batch of its own, without padding."""
    rows = []
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            rows.append({key: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for key, v in batch.items()})
    return rows


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_answers(batches: Sequence[Batch]) -> int:
    """Count the answer tokens of all batches."""
    return sum(int(batch["answer_mask"].sum()) for batch in batches)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a while: it is noise that no estimate of curvature knows of."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def backward(
    output: torch.Tensor, cotangent: torch.Tensor | None, params: Mapping[str, torch.Tensor], take: Take
) -> None:
    """Send ``cotangent`` backward; each gradient, in fp32 at least, goes to ``take`` as soon as it is there.

    No gradient is kept, so that what ``take`` accumulates is the only buffer of the size of the parameters. Gradients
    that the parameters held before are dropped.
    """

    def hand(name: str, p: torch.Tensor) -> None:
        grad, p.grad = p.grad, None
        assert grad is not None
        take(name, wide(grad))

    handles = []
    for name, p in params.items():
        p.grad = None
        handles.append(p.register_post_accumulate_grad_hook(functools.partial(hand, name)))
    try:
        output.backward(gradient=cotangent, inputs=list(params.values()))
    finally:
        for handle in handles:
            handle.remove()


def add_to(total: Vector) -> Take:
    """Return a ``take`` that sums gradients into ``total``."""

    def take(name: str, grad: torch.Tensor) -> None:
        if name in total:
            total[name].add_(grad)
        else:
            total[name] = grad

    return take


def loss_gradient(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, Vector]:
    """Return the mean negative log-likelihood of the answer tokens (nats a token) and its gradient.

    Example:
        >>> nll, gradient = loss_gradient(model, micro_batches(rows, pad_id=0))  # doctest: +SKIP
    """
    params, count, nll = trainable(model), count_answers(batches), 0.0
    total: Vector = {}
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss = -forward_answers(model, on_device(model, batch)).token_logps().sum() / count
            nll += float(loss.detach())
            backward(loss, None, params, add_to(total))
    return nll, total


@torch.no_grad()
def mean_nll(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean negative log-likelihood of the answer tokens, in nats a token."""
    with evaluating(model):
        sums = [-float(forward_answers(model, on_device(model, b)).token_logps().sum()) for b in batches]
    return sum(sums) / count_answers(batches)


def curvature_pass(
    model: nn.Module,
    batch: Batch,
    weight: float,
    take: Take,
    *,
    seed: Sequence[int],
    params: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Send one random cotangent backward: the gradient ``g`` has ``E[g g^T] = sum_i weight J_i^T H_i J_i``.

    Args:
        model: The model.
        batch: One micro-batch.
        weight: Weight of each of its answer tokens.
        take: Gets each parameter's part of ``g``.
        seed: Numbers that decide the draw.
        params: Parameters to differentiate by; all trainable ones by default.
    """
    with evaluating(model), torch.enable_grad():
        logits = forward_answers(model, on_device(model, batch)).logits_NV
        state = int(np.random.default_rng(list(seed)).integers(2**62))
        generator = torch.Generator(device=logits.device).manual_seed(state)
        weights = torch.full((len(logits),), weight, dtype=torch.float64, device=logits.device)
        cotangent = ggn_cotangent(logits, weights, generator)
        backward(logits, cotangent, trainable(model) if params is None else params, take)


class GaussNewton:
    """``v -> G v`` for the mean loss over the answer tokens of fixed batches.

    One product is a Jacobian-vector product ``t = J v``, the small matrix ``diag p - p p^T`` at each token, and a
    backward pass. ``J v`` comes from forward-mode differentiation, for which attention runs on torch's plain kernels;
    from a double backward pass; or from a central difference of two forward passes, for models with an operation that
    has neither. ``"auto"`` is the first where it works and the last elsewhere.

    Args:
        model: A causal language model; the matrix is over its trainable parameters.
        batches: From :func:`micro_batches`. Products are summed over them, each weighted by its answer tokens.
        jvp: How ``J v`` is had: ``auto``, ``forward``, ``double_backward`` or ``difference``.

    Raises:
        ValueError: Unknown ``jvp``, or no answer token in the batches.

    Example:
        >>> product = GaussNewton(model, batches)  # doctest: +SKIP
        >>> dot(v, product(v)) >= 0  # doctest: +SKIP
        True
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], jvp: Jvp = "auto") -> None:
        if jvp not in get_args(Jvp):
            raise ValueError(f"jvp must be one of {', '.join(get_args(Jvp))}, not {jvp!r}")
        self.model, self.batches, self.jvp = model, list(batches), jvp
        self.count = count_answers(self.batches)
        if not self.count:
            raise ValueError("curvature needs answer tokens, and the batches have none")

    def __call__(self, v: Vector) -> Vector:
        """Return ``G v``."""
        params, total = trainable(self.model), {}
        with evaluating(self.model), torch.enable_grad():
            for logits, tangent in self._tangents(v):
                backward(logits, self._middle(logits.detach(), tangent.detach()), params, add_to(total))
        return total

    def quadratic(self, v: Vector) -> float:
        """Return ``v^T G v``, without the backward passes."""
        total = 0.0
        with evaluating(self.model), torch.no_grad():
            for logits, tangent in self._tangents(v):
                total += float((wide(tangent) * self._middle(logits, tangent)).sum(dtype=torch.float64))
        return total

    def _middle(self, logits_NV: torch.Tensor, tangent_NV: torch.Tensor) -> torch.Tensor:
        """Return ``w (p * t - p (p . t))``."""
        p = torch.softmax(wide(logits_NV), dim=-1)
        scaled = p * wide(tangent_NV)
        return ((scaled - p * scaled.sum(-1, keepdim=True)) / self.count).to(logits_NV.dtype)

    def _tangents(self, v: Vector) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the logits of each batch, with their graph where gradients are on, and ``J v``."""
        eps: float | None = None
        for batch in self.batches:
            batch = on_device(self.model, batch)
            if self.jvp in ("auto", "forward"):
                try:
                    yield _forward_mode(self.model, batch, v)
                    continue
                except NotImplementedError as error:
                    if self.jvp == "forward":
                        raise ValueError(
                            f"this model cannot be differentiated in forward mode ({str(error).splitlines()[0]}): "
                            "set jvp to double_backward or difference"
                        ) from error
                    warnings.warn("no forward-mode derivative of this model; differences are used", stacklevel=3)
                    self.jvp = "difference"
            if self.jvp == "double_backward":
                yield _double_backward(self.model, batch, v)
            else:
                eps = eps or _step_size(self.model, batch, v)
                yield _difference(self.model, batch, v, eps)


class _Logits(nn.Module):
    """The model as a function of its parameters, for ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return forward_answers(self.model, batch).logits_NV


def _logits_at(model: nn.Module, params: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    return functional_call(_Logits(model), {f"model.{name}": p for name, p in params.items()}, (batch,))


def _forward_mode(model: nn.Module, batch: Batch, v: Vector) -> tuple[torch.Tensor, torch.Tensor]:
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        params = trainable(model)
        duals = {n: forward_ad.make_dual(params[n], value.to(params[n].dtype)) for n, value in v.items()}
        logits, tangent = forward_ad.unpack_dual(_logits_at(model, duals, batch))
    assert logits is not None
    return logits, torch.zeros_like(logits) if tangent is None else tangent


def _double_backward(model: nn.Module, batch: Batch, v: Vector) -> tuple[torch.Tensor, torch.Tensor]:
    """``J^T u`` is linear in a dummy ``u``, and the derivative of ``v . J^T u`` by ``u`` is ``J v``."""
    params = trainable(model)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = forward_answers(model, batch).logits_NV
        dummy = torch.zeros_like(logits, requires_grad=True)
        grads = torch.autograd.grad(logits, [params[n] for n in v], dummy, create_graph=True, materialize_grads=True)
        along = [value.to(g.dtype) for g, value in zip(grads, v.values(), strict=True)]
        (tangent,) = torch.autograd.grad(grads, dummy, along, retain_graph=True, materialize_grads=True)
    return logits, tangent.detach()


def _difference(model: nn.Module, batch: Batch, v: Vector, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(z(theta + eps v) - z(theta - eps v)) / (2 eps)``, in fp32 at least."""
    logits = forward_answers(model, batch).logits_NV
    with torch.no_grad():
        ends = [wide(_logits_at(model, _moved(model, v, side * eps), batch)) for side in (1, -1)]
    return logits, (ends[0] - ends[1]) / (2 * eps)


def _moved(model: nn.Module, v: Vector, eps: float) -> Vector:
    params = trainable(model)
    return {n: (params[n] + value * eps).to(params[n].dtype) for n, value in v.items()}


@torch.no_grad()
def _step_size(model: nn.Module, batch: Batch, v: Vector, aim: float = 0.01) -> float:
    """Return the ``eps`` at which logits move by about ``aim``: far above fp32 rounding, far below where they bend."""
    size = norm(v)
    if not size > 0:
        return 1.0
    weights = math.sqrt(sum(float(p.double().square().sum()) for p in trainable(model).values()))
    eps = 1e-3 * max(weights, 1e-6) / size
    for _ in range(3):  # the first guess can be off by orders of magnitude
        ends = [wide(_logits_at(model, _moved(model, v, side * eps), batch)) for side in (1, -1)]
        move = float((ends[0] - ends[1]).square().mean().sqrt()) / 2
        if not move > 0 or aim / 2 < move < aim * 2:
            break
        eps *= aim / move
    return eps


def on_device(model: nn.Module, batch: Batch) -> Batch:
    """Return ``batch`` where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
