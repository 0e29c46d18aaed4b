"""What rules with Kronecker factors take in memory and arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from soul.curvature.inverses import ROUNDED, WIDE
from soul.curvature.kronecker import KroneckerFactors, is_biased, pack, parent
from soul.curvature.seen import Seen
from soul.optim.cost import RuleCost, multiplies_bf16

Kind = Literal["inputs", "both", "eigen"]


def kronecker_cost(
    params: Sequence[torch.Tensor],
    model: nn.Module,
    kind: Kind,
    *,
    largest: int,
    diagonal: bool,
    every: int,
    damping: float = 1.0,
    rounds_on: str = "",
) -> RuleCost:
    """Return the cost of a rule over the layers ``[O, I]`` of ``model``, in fp32 where nothing else is said.

    Kept: momentum ``O I`` of each layer; ``A`` (``I^2``, one for all layers with the same input) and ``G`` (``O^2``);
    and what is derived from them. ``inputs`` keeps the inverse of ``A``; ``both`` the inverses of both, in bf16 where
    they are multiplied in it; ``eigen`` two bases a layer and ``O I`` moments.

    A step holds the moves of all layers at once, since their common length decides how far each goes: ``O I``. A pass
    holds a second set of factors, and of moments, while it sums them up.

    Args:
        params: The trainable parameters.
        model: The model; its layers are those of :func:`soul.curvature.kronecker.linear_layers`.
        kind: What divides by the factors.
        largest: Widest side of a factor.
        diagonal: Other parameters are stepped by their diagonal curvature.
        every: Steps from one move to the next.
        damping: Of ``both``; with little of it inverses are never rounded.
        rounds_on: Of ``both``, the device that multiplies in bf16 if it can; empty where products are exact.
    """
    factors = KroneckerFactors(model, outputs=kind != "inputs", largest=largest)
    layers = {name: pack(layer, layer.weight, layer.bias).shape for name, layer in factors.layers.items()}
    shapes = [(o, i) for o, i in layers.values()]
    inputs = [layers[name][1] for name in _with_inputs_of_their_own(model, factors)]
    outputs = [o for n, (o, _) in layers.items() if n not in factors.through] if factors.watches_outputs else []
    weights = sum(o * i for o, i in shapes)
    rest = sum(p.numel() for p in params) - weights
    rounded = bool(rounds_on) and multiplies_bf16(rounds_on) and damping >= ROUNDED
    squares = sum(width**2 for width in inputs + outputs)
    derived = {
        "inputs": 4 * squares,
        "both": sum(width**2 * (2 if rounded and width >= WIDE else 4) for width in inputs + outputs),
        "eigen": 4 * sum(i * i + o * o + o * i for o, i in shapes),
    }[kind]
    seen_through = [layers[n] for n in factors.through.values()]  # B^T G B, at every step
    one_side = sum(2 * o * i * i for o, i in shapes)
    both_sides = sum(2 * o * i * (o + i) for o, i in shapes + seen_through)
    return RuleCost(
        state=4 * weights + (8 * rest if diagonal else 0),
        whole=4 * squares + derived,
        step=4 * weights + 16 * max(o * i for o, i in shapes),
        refresh=4 * (squares + (weights if kind == "eigen" else 0)),
        traffic=sum(3 * p.numel() * p.itemsize for p in params) + 24 * weights,
        products={"inputs": one_side, "both": both_sides, "eigen": 2 * both_sides}[kind] // every,
        per_position=2 * squares,
        derivation=(9 if kind == "eigen" else 1) * sum(width**3 for width in inputs + outputs),
        backward=kind != "inputs" or diagonal,
        gradients=kind == "eigen" or diagonal,
    )


def _with_inputs_of_their_own(model: nn.Module, factors: KroneckerFactors) -> list[str]:
    """Return the layers that keep an ``A``: who is given the same input shows in a forward pass without numbers.

    Where the model cannot be run so, all layers of one module with as many inputs are taken to share one.
    """
    bare: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        bare[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(model, bare)  # which is told that the tensors are copied already
    twin.eval()  # as in passes, where dropout gives what it is given
    own: list[str] = []
    seen = Seen()

    def note(name: str, biased: bool) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            if seen.owner(args[0], biased) is None:
                own.append(name)
                seen.add(name, args[0], biased)

        return hook

    for name, layer in factors.layers.items():
        twin.get_submodule(name).register_forward_pre_hook(note(name, is_biased(layer)))
    try:
        with torch.no_grad():
            twin(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
    except Exception:  # noqa: BLE001 - a model that is not called like a language model, or looks at numbers
        modules = {(parent(name), layer.weight.shape[1]): name for name, layer in factors.layers.items()}
        return list(modules.values())
    return own
