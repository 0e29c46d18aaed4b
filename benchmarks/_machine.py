"""What a benchmark asks of a machine: its matrix-multiply peak, and the arithmetic that a path needs and does."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soul.machine import has_bf16

GEMM_SHAPES = ((2048, 2048, 2048), (1024, 1024, 1024), (512, 1536, 576))
"""(m, n, k): large squares, and one layer of a small model, which may stay in the cache and then is the fastest."""


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that its peak memory is its own, and return what it returns.

    The process is forked, which spares it the imports; the caller must not have computed anything with torch, since
    threads do not survive a fork.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def autocast() -> contextlib.AbstractContextManager[Any]:
    """Return the precision that ``training.precision: auto`` means here."""
    return torch.autocast("cpu", torch.bfloat16) if has_bf16() else contextlib.nullcontext()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def cpu_name() -> str:
    """Return what the processor calls itself."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return "unknown processor"


Now = Callable[[], float]
"""A clock in seconds: ``time.perf_counter``, or ``time.process_time`` where other programs keep the machine busy."""


def gemm_peak(dtype: torch.dtype, seconds: float, now: Now) -> float:
    """Return the best floating-point operations a second of ``x W^T`` in ``dtype``, over all shapes and repeats.

    Below a tenth of a second only the smallest shape is tried.
    """
    best = 0.0
    for m, n, k in GEMM_SHAPES if seconds >= 0.1 else GEMM_SHAPES[-1:]:
        x, w = torch.rand(m, k).to(dtype), torch.rand(n, k).to(dtype)
        end = now() + seconds / len(GEMM_SHAPES)
        for repeat in range(10_000):
            started = now()
            nn.functional.linear(x, w)
            ended = now()
            if repeat:  # the first chooses a kernel
                best = max(best, 2 * m * n * k / (ended - started))
            if repeat and ended > end:
                break
    return best


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Weights of a model that take part in matrix products.

    Attributes:
        body: Weights of all linear layers but the head; each costs 2 operations a token forward and 4 backward.
        head: Weights of the head, counted where it is applied.
    """

    body: int
    head: int

    @classmethod
    def of(cls, model: Any) -> Matrices:
        """Count the weights of a causal language model."""
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        return cls(sum(m.weight.numel() for m in linear), head.weight.numel())

    def operations(self, tokens: int, heads: int, *, training: bool) -> int:
        """Return ``f (body tokens + head heads)``, ``f`` = 6 in training (forward and backward), else 2.

        Attention scores (about 2 % at 60 tokens), norms and the softmax are left out.
        """
        return (6 if training else 2) * (self.body * tokens + self.head * heads)


class Work:
    """Counts the positions, padding included, that really go through a model's body and head."""

    def __init__(self, model: Any) -> None:
        self.body = self.head = 0
        model.get_input_embeddings().register_forward_hook(self._body)
        model.get_output_embeddings().register_forward_hook(self._head)

    def _body(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        self.body += out.shape[:-1].numel()

    def _head(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        self.head += out.shape[:-1].numel()

    def take(self) -> tuple[int, int]:
        """Return (body, head) since the last call."""
        counted = self.body, self.head
        self.body = self.head = 0
        return counted


@dataclasses.dataclass
class Step:
    """One training step, or one evaluation.

    Attributes:
        seconds: From the end of the step before to the end of this one.
        tokens: Real tokens, answers and prompts.
        answers: Answer tokens, the positions where a loss needs the head.
        body: Positions that went through the body, padding included.
        head: Positions that went through the head.
        parts: Seconds by part.
        cores: Processors it had, on average: fewer than threads where other programs were running.
    """

    seconds: float = 0.0
    tokens: int = 0
    answers: int = 0
    body: int = 0
    head: int = 0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    cores: float = 0.0


class Clock:
    """Times steps and their parts, and counts their work."""

    def __init__(self, work: Work, now: Now) -> None:
        self.work, self.now = work, now
        self.restart()

    def restart(self) -> None:
        """Begin a step now."""
        self.work.take()
        self.step, self._started, self._wall, self._cpu = Step(), self.now(), time.perf_counter(), time.process_time()

    def lap(self) -> Step:
        """End the step, return it and begin the next one."""
        step = self.step
        step.seconds = self.now() - self._started
        step.cores = (time.process_time() - self._cpu) / (time.perf_counter() - self._wall)
        step.body, step.head = self.work.take()
        self.restart()
        return step

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part of a step."""
        started = self.now()
        try:
            yield
        finally:
            self.step.parts[name] = self.step.parts.get(name, 0.0) + self.now() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, timed as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call
