"""One pass over memory for each elementwise rule, compiled on first use by numba; imported only where that is there.

A kernel works in place on flat pieces and returns a sum where its rule needs one, else 0. bf16, which numpy does not
know, comes as its bits in ``uint16``; all arithmetic is in fp32, sums in float64. Scalars are ``float32``, since numba
would else compute in float64. ``key`` and ``start`` name the noise that weights are rounded with, see :mod:`_rounding`.
"""

# ruff: noqa: ARG001 - numba compares the signatures of an overload and what it stands for

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

F, U = np.float32, np.uint32
ZERO, ONE = F(0), F(1)
INFINITE = U(0x7F800000)
# Products and sums may be fused, as torch's kernels do.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
# Sums over coordinates may be taken in any order, else they are taken one by one.
SUMMING: dict[str, Any] = OPTIONS | {"fastmath": {"contract", "reassoc"}}


def compiled(function: Callable[..., float], options: dict[str, Any] = OPTIONS) -> Any:
    """Return ``function`` compiled, kept on disk where there is a folder to write to."""
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder
        return njit(**options)(function)


def summing(function: Callable[..., float]) -> Any:
    """Return what :func:`compiled` does, of a function that returns a sum."""
    return compiled(function, SUMMING)


def load(a: Any, i: int) -> Any:
    """Return entry ``i`` as fp32."""
    raise NotImplementedError


def store(a: Any, i: int, value: Any) -> None:
    """Write fp32 ``value`` to entry ``i``, rounded to nearest even."""
    raise NotImplementedError


def store_weight(a: Any, i: int, value: Any, key: Any, start: Any) -> None:
    """Write fp32 ``value`` to entry ``i`` of a weight, rounded by the noise of ``key``; to nearest where that is 0."""
    raise NotImplementedError


def _is_bf16(a: Any) -> bool:
    return a.dtype == types.uint16


# numba widens every sum of integers to 64 bits; U() brings it back to what wraps around, and fills whole vectors.


@njit
def _noise(key: Any, at: Any) -> Any:
    x = U(at ^ key)
    x = U(U(x ^ U(x >> U(16))) * U(0x7FEB352D))
    x = U(U(x ^ U(x >> U(15))) * U(0x846CA68B))
    return U(U(x ^ U(x >> U(16))) & U(0xFFFF))


@njit
def _even(bits: Any) -> Any:
    return U(U(0x7FFF) + U(U(bits >> U(16)) & U(1)))


@njit
def _rounded(bits: Any, more: Any) -> Any:
    size = U(bits & U(0x7FFFFFFF))
    more = U(more * U(size < INFINITE))  # more than infinity is not a number
    nan = U(U(size > INFINITE) << U(6))  # and what is none may have lost the bits that say so
    return np.uint16(U(U(U(bits + more) >> U(16)) | nan))


# What follows has no annotations: numba compares those of both signatures.


@overload(load)
def _load(a, i):
    if _is_bf16(a):
        return lambda a, i: U(U(a[i]) << U(16)).view(F)
    return lambda a, i: a[i]


@overload(store)
def _store(a, i, value):
    def rounded(a, i, value):
        bits = F(value).view(U)
        a[i] = _rounded(bits, _even(bits))

    def exact(a, i, value):
        a[i] = value

    return rounded if _is_bf16(a) else exact


@overload(store_weight)
def _store_weight(a, i, value, key, start):
    def rounded(a, i, value, key, start):
        bits = F(value).view(U)
        a[i] = _rounded(bits, _noise(key, U(start + U(i))) if key != U(0) else _even(bits))

    def exact(a, i, value, key, start):
        a[i] = value

    return rounded if _is_bf16(a) else exact


@njit
def _lerp(a: Any, b: Any, w: Any) -> Any:
    return a + w * (b - a) if w < F(0.5) else b - (b - a) * (ONE - w)  # as torch's, exact at both ends


@njit
def _positive(x: Any) -> Any:
    return ZERO if x < ZERO else x  # nan stays


@njit
def _sign(x: Any) -> Any:
    return ONE if x > ZERO else (-ONE if x < ZERO else ZERO)


@njit
def _clip(u: Any, bound: Any) -> Any:
    return bound if u > bound else (-bound if u < -bound else u)


@compiled
def average(g: Any, m: Any, w: Any, sign: Any) -> float:
    """``m <- lerp(m, g, w)``."""
    for i in range(m.size):
        store(m, i, _lerp(load(m, i), sign * load(g, i), w))
    return 0.0


@compiled
def sophia(
    p: Any, g: Any, m: Any, h: Any, w: Any, sign: Any, slope: Any, floor: Any,
    keep: Any, lr: Any, key: Any, start: Any,
) -> float:  # fmt: skip
    """Take in the gradient and step by the clipped ratio."""
    for i in range(p.size):
        mi = _lerp(load(m, i), sign * load(g, i), w)
        store(m, i, mi)
        u = _clip(mi / (slope * _positive(load(h, i)) + floor), ONE)
        store_weight(p, i, load(p, i) * keep - lr * u, key, start)
    return 0.0


@compiled
def sophia_behind(
    p: Any, m: Any, h: Any, slope: Any, floor: Any, scale: Any, bound: Any,
    keep: Any, lr: Any, key: Any, start: Any,
) -> float:  # fmt: skip
    """Step where the gradient has been taken in before: the ratio times ``scale``, within ``bound``."""
    for i in range(p.size):
        u = _clip(scale * (load(m, i) / (slope * _positive(load(h, i)) + floor)), bound)
        store_weight(p, i, load(p, i) * keep - lr * u, key, start)
    return 0.0


@summing
def sophia_square(g: Any, m: Any, h: Any, w: Any, sign: Any, slope: Any, floor: Any) -> float:
    """Take in the gradient and return the sum of the ratio's squares."""
    total = 0.0
    for i in range(m.size):
        mi = _lerp(load(m, i), sign * load(g, i), w)
        store(m, i, mi)
        u = mi / (slope * _positive(load(h, i)) + floor)
        total += u * u
    return total


@summing
def sophia_cost(g: Any, m: Any, h: Any, w: Any, sign: Any, slope: Any, floor: Any) -> float:
    """Take in the gradient and return the sum of ``h`` times the ratio's squares."""
    total = 0.0
    for i in range(m.size):
        mi = _lerp(load(m, i), sign * load(g, i), w)
        store(m, i, mi)
        hi = _positive(load(h, i))
        u = mi / (slope * hi + floor)
        total += hi * u * u
    return total


@compiled
def soul_release(
    p: Any, g: Any, m: Any, h: Any, b1: Any, w1: Any, b2: Any, w2: Any, sign: Any, slope: Any, floor: Any,
    keep: Any, lr: Any, key: Any, start: Any,
) -> float:  # fmt: skip
    """The released code's step: the squared gradient, momentum twice, the clipped ratio."""
    for i in range(p.size):
        gi = sign * load(g, i)
        hi = b2 * load(h, i) + w2 * gi * gi
        mi = b1 * load(m, i) + w1 * gi
        mi = b1 * mi + w1 * gi
        store(h, i, hi)
        store(m, i, mi)
        store_weight(p, i, load(p, i) * keep - lr * _clip(mi / (slope * hi + floor), ONE), key, start)
    return 0.0


@compiled
def adamw_retain(
    p: Any, g: Any, m: Any, v: Any, w: Any, sign: Any, slope: Any, floor: Any, eps: Any, m_share: Any,
    keep: Any, lr: Any, key: Any, start: Any,
) -> float:  # fmt: skip
    """Take in the gradient and divide by the root of the retain gradients' squares."""
    for i in range(p.size):
        mi = _lerp(load(m, i), sign * load(g, i), w)
        store(m, i, mi)
        u = mi / (m_share * (np.sqrt(slope * _positive(load(v, i)) + floor) + eps))
        store_weight(p, i, load(p, i) * keep - lr * u, key, start)
    return 0.0


@compiled
def signum(p: Any, g: Any, m: Any, w: Any, sign: Any, keep: Any, lr: Any, key: Any, start: Any) -> float:
    """Step by the sign of the momentum."""
    for i in range(p.size):
        mi = _lerp(load(m, i), sign * load(g, i), w)
        store(m, i, mi)
        store_weight(p, i, load(p, i) * keep - lr * _sign(mi), key, start)
    return 0.0


@compiled
def lion(p: Any, g: Any, m: Any, w1: Any, w2: Any, sign: Any, keep: Any, lr: Any, key: Any, start: Any) -> float:
    """Step by the sign of the blend, then take in the gradient."""
    for i in range(p.size):
        gi, mi = sign * load(g, i), load(m, i)
        store_weight(p, i, load(p, i) * keep - lr * _sign(_lerp(mi, gi, w1)), key, start)
        store(m, i, _lerp(mi, gi, w2))
    return 0.0


@summing
def refresh(g: Any, h: Any, b2: Any, w2: Any) -> float:
    """``h <- b2 h + (1 - b2) g^2``; return the sum of the positive parts."""
    total = 0.0
    for i in range(h.size):
        gi = load(g, i)
        hi = b2 * load(h, i) + w2 * gi * gi
        store(h, i, hi)
        total += _positive(hi)
    return total


@summing
def refresh_by_estimate(g: Any, h: Any, w2: Any) -> float:
    """``h <- lerp(h, estimate, 1 - b2)``; return the sum of the positive parts."""
    total = 0.0
    for i in range(h.size):
        hi = _lerp(load(h, i), load(g, i), w2)
        store(h, i, hi)
        total += _positive(hi)
    return total
