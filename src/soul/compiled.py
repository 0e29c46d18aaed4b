"""Decoder blocks compiled for training steps (torch.compile), and as they are everywhere else."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from soul.forward import decoder_blocks
from soul.quantized import is_quantized


class CompiledBlocks:
    """Within it, a model's decoder blocks run compiled; outside of it they run as they were written.

    All blocks share one compilation, made for any batch and length, so it takes seconds whatever the depth. What a step
    gains is what stands between matrix products: norms, activations, rotations and casts become one pass each. Where
    curvature or a reference is asked, hooks look into the blocks, which compiled code would not call: there they run
    as they are.

    Args:
        model: A causal language model; its blocks are left as they are until the first entry.

    Raises:
        ValueError: There is no C++ compiler, which code for CPUs needs; or the base is quantized.

    Example:
        >>> compiled = CompiledBlocks(model)  # doctest: +SKIP
        >>> with compiled:  # doctest: +SKIP
        ...     loss = step(model)
    """

    def __init__(self, model: Any) -> None:
        if is_quantized(model):
            raise ValueError("training.compile: a quantized base is not compiled; set one of the two aside")
        if next(model.parameters()).device.type == "cpu" and not _has_compiler():
            raise ValueError(
                "training.compile needs a C++ compiler on CPUs (g++ or clang++, or one named by CXX), and there is "
                "none: install one, or leave compile at false"
            )
        self.blocks: list[Any] = list(decoder_blocks(model))
        self.calls: list[Any] = []

    def __enter__(self) -> None:
        """Put the compiled blocks in place; they are compiled when they first run."""
        if not self.calls:
            for block in self.blocks:
                block.compile(dynamic=True)
                self.calls.append(block._compiled_call_impl)
        for block, call in zip(self.blocks, self.calls, strict=True):
            block._compiled_call_impl = call

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Put the blocks back.

        Raises:
            ValueError: They could not be compiled.
        """
        for block in self.blocks:
            block._compiled_call_impl = None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"training.compile: the decoder blocks could not be compiled ({first}); see to the C++ compiler, or "
                "leave compile at false"
            ) from error


def _has_compiler() -> bool:
    names = ("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *names) if name)
