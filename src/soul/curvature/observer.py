"""What curvature passes know of an update rule, and how they go backward for one that wants no gradients of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.pytorch_utils import Conv1D

_LINEAR = (nn.Linear, Conv1D)


class Observer(Protocol):
    """The side of an update rule that passes know (:class:`soul.optim.base.UpdateRule`)."""

    @property
    def needs_backward(self) -> bool:
        """Whether a pass must go backward."""
        ...

    @property
    def needs_gradients(self) -> bool:
        """Whether it wants what a pass leaves on the weights, and not only what goes through its layers."""
        ...

    def observing(self, mask_BT: torch.Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Return the context of one micro-batch."""
        ...

    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Take in what a refresh found."""
        ...

    def curvature_state(self) -> Mapping[str, torch.Tensor] | None:
        """Return what passes told the rule beyond estimates; None if there is no such thing."""
        ...

    def load_curvature_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Begin with such a state."""
        ...

    def derivation(self) -> str:
        """Name the settings that what is derived from that state depends on; empty for nothing worth keeping."""
        ...

    def derived(self) -> Mapping[str, torch.Tensor]:
        """Return what is derived from it."""
        ...

    def load_derived(self, state: Mapping[str, torch.Tensor]) -> None:
        """Begin with what was derived from the same state."""
        ...

    def scramble(self, seed: int) -> None:
        """Turn that state into random directions."""
        ...


@contextlib.contextmanager
def ends_of(model: nn.Module) -> Iterator[list[GradientEdge]]:
    """Collect, from a forward pass inside, where a backward pass may end that reaches the output of every linear layer.

    Gradients of linear layers' weights are a third of a backward pass and one more copy of the weights, which a rule
    that looks at what comes to the layers' outputs does without. ``torch.autograd.grad(logits, ends, cotangent)`` goes
    all the ways that lead to an end. These are what anything else can need a gradient for: the outputs of embeddings,
    the trainable parameters of modules that are neither, and the outputs of linear layers whose input needs none. They
    are kept as places in the graph, which stay what they are where an output is changed in place.

    Yields:
        The list, which is complete after the forward pass.
    """
    apart = (nn.Embedding, *_LINEAR)
    others = (module for module in model.modules() if not isinstance(module, apart))
    found = {p: None for module in others for p in module.parameters(recurse=False)}  # once each, in order
    ends: list[GradientEdge] = [get_gradient_edge(p) for p in found if p.requires_grad]

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        forward = torch._C._current_graph_task_id() == -1  # and not a checkpoint's second one
        given = isinstance(module, _LINEAR) and bool(args) and args[0].requires_grad
        if forward and output.requires_grad and not given:
            ends.append(get_gradient_edge(output))

    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, apart)]
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()


def is_reentrant(model: nn.Module) -> bool:
    """Say whether checkpoints are of the kind that knows :meth:`torch.Tensor.backward` alone."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", False)
        for module in model.modules()
    )
