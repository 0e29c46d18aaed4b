"""Estimators of a diagonal curvature: what one pass sends backward, and what the square of its gradient then means.

For a mean loss ``sum_i w_i loss_i`` over answer tokens, with logits ``z_i(theta)``, their Jacobian ``J_i`` and
``p_i = softmax(z_i)``, the Gauss-Newton matrix (equal to the true Fisher matrix for the cross-entropy) is::

    G = sum_i w_i J_i^T (diag p_i - p_i p_i^T) J_i

Draw for each token a vector ``s_i`` with ``E[s_i] = 0`` and ``E[s_i s_i^T] = diag p_i - p_i p_i^T``, send
``r_i = sqrt(w_i) s_i`` backward from the logits, and the gradient is ``g = sum_i sqrt(w_i) J_i^T s_i``. Then::

    E[g g^T] = sum_i w_i J_i^T E[s_i s_i^T] J_i + sum_{i != j} sqrt(w_i w_j) J_i^T E[s_i] E[s_j]^T J_j = G

The cross terms vanish because tokens draw independently and with mean zero, so ``g * g`` is an unbiased estimate of
the diagonal of ``G`` for any weights. The square root is what makes it so: with ``w_i`` itself the tokens would be
weighted by ``w_i^2``, which only for equal weights a single factor (Sophia's batch size) can mend.

One square has a relative standard deviation near ``sqrt(2)`` however many tokens it is of. Squares of ``M``
micro-batches, *added up* with weights that sum to 1 over all of them, have ``sqrt(2 / M)`` for the same work; adding
the gradients before squaring is unbiased too, but stays at ``sqrt(2)``.

:data:`ESTIMATORS` says for each name what it needs, so that nobody has to ask for names:

==================== ======================================= ==============================================
name                 diagonal of                             by
==================== ======================================= ==============================================
``ggn``              Gauss-Newton matrix                     :func:`ggn_cotangent`
``gnb``              Gauss-Newton matrix                     :func:`gnb_cotangent`: labels the model draws
``empirical``        empirical Fisher matrix of the tokens   :func:`empirical_cotangent`: the true labels
``hutchinson``       Hessian; may be negative                :func:`~soul.curvature.hutchinson.hutchinson_diagonal`
``squared_gradient``  none: the squared mean gradient         :func:`gradient_cotangent`: what Adam averages
``objective_squared`` none: the squared training gradient    what SOUL's released code does; needs no pass
==================== ======================================= ==============================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch

from soul.curvature.hutchinson import hutchinson_diagonal

EstimatorName = Literal["ggn", "gnb", "empirical", "hutchinson", "squared_gradient", "objective_squared"]


class Cotangent(Protocol):
    """What is sent backward from the logits of the answer tokens, so that the gradient's square is an estimate."""

    def __call__(
        self,
        logits_NV: torch.Tensor,
        weights_N: torch.Tensor,
        generator: torch.Generator,
        targets_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the cotangent ``[N, V]``, in the dtype of the logits."""
        ...


class Diagonal(Protocol):
    """What makes an estimate, of any sign, from the loss itself."""

    def __call__(
        self,
        loss: Callable[[], torch.Tensor],
        params: Sequence[torch.Tensor],
        generator: torch.Generator,
        *,
        differences: bool = False,
    ) -> list[torch.Tensor]:
        """Return the diagonal for each of ``params``; by ``differences`` of gradients if told so."""
        ...


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What an estimator needs; with neither function it needs no pass and takes the training gradient's square.

    Attributes:
        cotangent: Sent backward from the logits; the square of the gradient is the estimate, 0 or more.
        diagonal: Makes the estimate from the loss itself, by derivatives of its own; any sign.
        noisy: The cotangent draws noise, of which every example has its own: it is asked example by example. One that
            draws none is asked once for a whole micro-batch, whose total weight it may look at.
    """

    cotangent: Cotangent | None = None
    diagonal: Diagonal | None = None
    noisy: bool = True

    @property
    def shows_layers(self) -> bool:
        """Whether sums over positions of ``g g^T``, as factors are, mean what the square of the whole gradient does.

        They leave out the products of different positions, which only noise of each one's own takes out of the other.
        """
        return self.cotangent is not None and self.noisy

    @property
    def needs_pass(self) -> bool:
        """Whether the model has to be run for it."""
        return self.cotangent is not None or self.diagonal is not None


@torch.no_grad()
def ggn_cotangent(
    logits_NV: torch.Tensor,
    weights_N: torch.Tensor,
    generator: torch.Generator,
    targets_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``r = sqrt(w) (sqrt(p) * eps - p (sqrt(p) . eps))`` with random signs ``eps``.

    ``E[eps eps^T] = I`` gives ``E[r r^T] = w (diag p - p p^T - p p^T + p p^T sum(p)) = w (diag p - p p^T)`` exactly. No
    label is drawn, so the noise does not grow where the model is sure: on memorised answers sampled labels are nearly
    always the expected ones, and :func:`gnb_cotangent` is then nearly always almost 0, and rarely huge.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Source of the signs; it may live on another device than the logits.
        targets_N: Not looked at.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, or a negative weight.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> ggn_cotangent(logits, torch.ones(1), torch.Generator().manual_seed(0)).abs()
        tensor([[0.7071, 0.7071]])
    """
    del targets_N
    root_NV, scale_N = _prepare(logits_NV, weights_N)
    root_NV.sqrt_()
    signs_NV = _random_signs(root_NV, generator)
    cotangent_NV = torch.copysign(root_NV, signs_NV, out=signs_NV)
    dot_N = cotangent_NV.sum(-1)  # sqrt(p) . eps
    # two buffers of N x V in all: the roots become the probabilities again
    cotangent_NV.addcmul_(root_NV.square_(), dot_N[:, None], value=-1)
    return cotangent_NV.mul_(scale_N[:, None]).to(logits_NV.dtype)


@torch.no_grad()
def gnb_cotangent(
    logits_NV: torch.Tensor,
    weights_N: torch.Tensor,
    generator: torch.Generator,
    targets_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``r = sqrt(w) (p - onehot(y))`` with labels ``y`` drawn from ``p`` (Gauss-Newton-Bartlett).

    The estimator of Sophia-G (arXiv 2305.14342, algorithm 2): ``E[onehot(y)] = p`` and
    ``E[onehot(y) onehot(y)^T] = diag p`` give ``E[r r^T] = w (diag p - p p^T)``.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Source of the labels; it may live on another device than the logits.
        targets_N: Not looked at.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, or a negative weight.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> gnb_cotangent(logits, torch.ones(1), torch.Generator().manual_seed(0)).abs()
        tensor([[0.5000, 0.5000]])
    """
    del targets_N
    cotangent_NV, scale_N = _prepare(logits_NV, weights_N)
    labels_N = _sample(cotangent_NV, generator)
    cotangent_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N] -= 1
    return cotangent_NV.mul_(scale_N[:, None]).to(logits_NV.dtype)


@torch.no_grad()
def empirical_cotangent(
    logits_NV: torch.Tensor,
    weights_N: torch.Tensor,
    generator: torch.Generator,
    targets_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``r = sqrt(w) eps (p - onehot(y))`` with the true labels ``y`` and one random sign ``eps`` a token.

    True labels' gradients do not have mean zero, so without signs the square of their sum would also hold the
    products of different tokens (that is what squaring a training gradient gives). Independent signs remove these in
    expectation, and one backward pass estimates exactly the empirical Fisher matrix *of tokens*::

        E[g g^T] = sum_i w_i J_i^T (p_i - onehot(y_i)) (p_i - onehot(y_i))^T J_i

    It is neither the Hessian nor the Gauss-Newton matrix (arXiv 1905.12558): at a token that the model gives
    probability ``q`` it goes as ``(1 - q)^2`` where the curvature goes as ``q (1 - q)``, too small where the model is
    sure and too large where it is wrong.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Source of the signs; it may live on another device than the logits.
        targets_N: The true labels.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, a negative weight, or no labels.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> empirical_cotangent(logits, torch.ones(1), torch.Generator().manual_seed(0), torch.tensor([1])).abs()
        tensor([[0.5000, 0.5000]])
    """
    cotangent_NV, scale_N = _errors(logits_NV, weights_N, targets_N, "empirical")
    signs_N = torch.copysign(scale_N, _random_signs(scale_N, generator))
    return cotangent_NV.mul_(signs_N[:, None]).to(logits_NV.dtype)


@torch.no_grad()
def gradient_cotangent(
    logits_NV: torch.Tensor,
    weights_N: torch.Tensor,
    generator: torch.Generator,
    targets_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``r = w (p - onehot(y)) / sqrt(W)`` with the true labels ``y`` and ``W = sum w``: the gradient itself.

    With ``g`` the gradient of the micro-batch's mean loss the square is ``W g * g``, and those of a refresh add up to
    their mean, as Adam's second moment (arXiv 1412.6980) averages squared gradients of batches. It holds the products
    of different tokens that :func:`empirical_cotangent` removes, so it depends on the batch's size and is no curvature.

    The tokens are to be those of a whole micro-batch. Asked example by example, as passes did before
    :attr:`Estimator.noisy`, the square is ``(sum_r sqrt(W_r) g_r)^2`` over examples ``r``: ``R`` times as large for
    ``R`` examples of one length, and short answers weigh too much. Earlier runs of ``adamw_retain`` divided by that.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        generator: Not asked.
        targets_N: The true labels.

    Returns:
        ``[N, V]``, in the dtype of the logits; computed in fp32 at least.

    Raises:
        ValueError: Shapes that do not fit, a negative weight, or no labels.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> gradient_cotangent(logits, torch.ones(1), torch.Generator(), torch.tensor([1]))
        tensor([[ 0.5000, -0.5000]])
    """
    del generator
    cotangent_NV, scale_N = _errors(logits_NV, weights_N, targets_N, "squared_gradient")
    total = scale_N.square().sum().clamp(min=torch.finfo(scale_N.dtype).tiny)
    return cotangent_NV.mul_((scale_N.square() / total.sqrt())[:, None]).to(logits_NV.dtype)


def _errors(
    logits_NV: torch.Tensor, weights_N: torch.Tensor, targets_N: torch.Tensor | None, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``p - onehot(y)``, ``[N, V]``, and the ``[N]`` roots of the weights."""
    if targets_N is None or targets_N.shape != weights_N.shape:
        raise ValueError(
            f"the {name} estimator needs the labels [N] of {len(logits_NV)} tokens, not "
            f"{'none' if targets_N is None else list(targets_N.shape)}"
        )
    cotangent_NV, scale_N = _prepare(logits_NV, weights_N)
    cotangent_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] -= 1
    return cotangent_NV, scale_N


ESTIMATORS: dict[str, Estimator] = {
    "ggn": Estimator(cotangent=ggn_cotangent),
    "gnb": Estimator(cotangent=gnb_cotangent),
    "empirical": Estimator(cotangent=empirical_cotangent),
    "squared_gradient": Estimator(cotangent=gradient_cotangent, noisy=False),
    "hutchinson": Estimator(diagonal=hutchinson_diagonal),
    "objective_squared": Estimator(),
}
assert set(ESTIMATORS) == set(get_args(EstimatorName))


def backward_curvature(
    logits_NV: torch.Tensor,
    weights_N: torch.Tensor,
    estimator: str,
    generator: torch.Generator,
    targets_N: torch.Tensor | None = None,
) -> None:
    """Send a random cotangent backward, so that each ``p.grad ** 2`` estimates a diagonal curvature.

    Gradients add to what ``p.grad`` holds: clear it before, do not clip it, and let
    :meth:`soul.optim.base.UpdateRule.update_curvature` take it in. Dropout must be off, since it would be noise that
    the estimate does not know of.

    Args:
        logits_NV: Logits of the answer tokens that count, and of no others, with their graph.
        weights_N: Weight of each token in the mean loss, 0 or more; they sum to 1 over the window.
        estimator: A name in :data:`ESTIMATORS` that has a cotangent.
        generator: Source of randomness.
        targets_N: The true labels, for estimators that look at them.

    Raises:
        ValueError: Unknown or unfit estimator, shapes that do not fit, or a negative weight.

    Example:
        >>> theta = torch.zeros(1, 2, requires_grad=True)
        >>> backward_curvature(theta * 1.0, torch.ones(1), "gnb", torch.Generator().manual_seed(0))
        >>> theta.grad**2  # here exact: the diagonal of diag p - p p^T at p = 1/2
        tensor([[0.2500, 0.2500]])
    """
    kind = ESTIMATORS.get(estimator)
    if kind is None or kind.cotangent is None:
        fit = ", ".join(name for name, other in ESTIMATORS.items() if other.cotangent)
        problem = "unknown curvature estimator" if kind is None else "no single backward pass gives the estimator"
        raise ValueError(f"{problem} {estimator!r}; give one of: {fit}")
    logits_NV.backward(gradient=kind.cotangent(logits_NV, weights_N, generator, targets_N))


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


def _random_signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers whose signs are independent and fair, shaped like ``like``; their size means nothing."""
    # several times faster than Bernoulli draws; exactly fair, as 0 counts as positive in [-1, 1)
    noise = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    return noise.uniform_(-1, 1, generator=generator).to(like.device)


def _sample(p_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one index ``[N]`` a row, drawn from ``p_NV``: the first of exponential clocks with rates ``p`` to ring."""
    clocks_NV = torch.empty(p_NV.shape, dtype=p_NV.dtype, device=generator.device).exponential_(generator=generator)
    clocks_NV = clocks_NV.to(p_NV.device)
    return torch.div(p_NV, clocks_NV, out=clocks_NV).argmax(-1)
