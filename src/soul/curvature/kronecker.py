"""Kronecker-factored curvature of linear layers: what goes in, and what comes back.

:mod:`soul.curvature.inverses` divides by it.

For a linear layer ``y = W a`` the gradient of one position is ``g a^T`` with ``g`` the gradient at ``y``, and the
Gauss-Newton block of ``vec W`` is ``sum_t E[(g_t a_t^T)(g_t a_t^T)^T]`` plus terms between positions. K-FAC (arXiv
1503.05671; for layers shared over positions, "expand", arXiv 2311.00636) keeps::

    F ~ A (x) G,    A = mean_t a_t a_t^T  [I, I],    G = sum_t E[g_t g_t^T]  [O, O]
    F^-1 vec(D) = vec(G^-1 D A^-1)

``g`` is the gradient of a random cotangent with ``E[r r^T] = sum_i w_i (diag p - p p^T)``
(:mod:`soul.curvature.estimators`), so ``G`` needs no labels and is in nats: ``1/2 tr(D^T G D A)`` is the KL a change
``D`` of the weights is predicted to cost. A bias is one more input that is always 1.

The first half of a LoRA adapter, ``y = B (A x)``, has ``g_A = B^T g_B`` and so ``G_A = B^T G_B B``. It is 0 before the
first step, where ``B`` is, and grows with the square of ``B``: it is made of ``G_B`` and ``B`` as it is when asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from soul import processes
from soul.curvature.seen import Seen
from soul.types import LostModelError

Layer = nn.Linear | Conv1D
"""A layer with Kronecker factors: ``y = W a + b``; GPT-2's ``Conv1D`` keeps ``W`` transposed, ``[I, O]``."""

LARGEST = 16_384
"""Widest side of a factor: a 49,152-wide one (a vocabulary) would take 9.7 GB."""


def linear_layers(model: nn.Module, largest: int = LARGEST, *, outputs: bool = True) -> dict[str, Layer]:
    """Return the trainable linear layers that have Kronecker factors, by the name of the module.

    Left out are the language-model head, layers whose weight another module shares (a tied embedding), and layers with
    a factor wider than ``largest``: of their inputs, or of their ``outputs`` where there are such factors.
    """
    return {name: layer for name, layer in _candidates(model).items() if widest(layer, outputs) <= largest}


def too_wide(model: nn.Module, largest: int = LARGEST, *, outputs: bool = True) -> dict[str, Layer]:
    """Return the layers that :func:`linear_layers` leaves out for their width alone.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 9))
        >>> list(too_wide(model, 4)), list(too_wide(model, 4, outputs=False))
        (['1'], [])
    """
    return {name: layer for name, layer in _candidates(model).items() if widest(layer, outputs) > largest}


def widest(layer: Layer, outputs: bool) -> int:
    """Return the wider side of a layer's factors: of its inputs, or of its ``outputs`` where there are such factors."""
    fan_out, fan_in = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
    return max(fan_in, fan_out if outputs else 0)


def _candidates(model: nn.Module) -> dict[str, Layer]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                users[id(p)] = users.get(id(p), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and module.weight.requires_grad
        and users[id(module.weight)] == 1
    }


def seen_through(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return, by the first half of each LoRA adapter, the second, which takes its outputs as they are.

    Example:
        >>> halves = {f"q.lora_{half}.default": nn.Linear(2, 2, bias=False) for half in "AB"}
        >>> seen_through(halves)
        {'q.lora_A.default': 'q.lora_B.default'}
    """
    second = {name: name.replace(".lora_A.", ".lora_B.") for name in layers if ".lora_A." in name}
    return {name: other for name, other in second.items() if other in layers}


def parent(name: str) -> str:
    """Return the module whose layers may be given the same input as this one; of an adapter, that of what it adapts.

    Example:
        >>> parent("attn.q"), parent("attn.q.lora_A.default"), parent("attn.q.lora_B.default")
        ('attn', 'attn', 'attn.q.lora_B')
    """
    return name.partition(".lora_A.")[0].rpartition(".")[0]


def pack(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return weight and bias (or their gradients) as one matrix ``[O, I]``; ``[O, I + 1]`` where there is a bias."""
    weight = weight.T if isinstance(layer, Conv1D) else weight
    if not is_biased(layer):
        return weight
    assert layer.bias is not None
    column = torch.zeros_like(layer.bias, dtype=weight.dtype) if bias is None else bias.to(weight.dtype)
    return torch.cat([weight, column[:, None]], dim=1)


def unpack(layer: Layer, matrix_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Undo :func:`pack`."""
    weight, bias = (matrix_OI[:, :-1], matrix_OI[:, -1]) if is_biased(layer) else (matrix_OI, None)
    return weight.T if isinstance(layer, Conv1D) else weight, bias


def is_biased(layer: Layer) -> bool:
    """Say whether a layer has a bias that is trained, for which ``A`` has a further input of 1."""
    return layer.bias is not None and layer.bias.requires_grad


BANDS, BANDED = 4, 256
"""Bands of a sum, and the width from which on it has them."""


@dataclasses.dataclass
class _Sum:
    """A sum of outer products over positions, since the last time it was taken in.

    It is symmetric, so that on a processor only blocks on and above the diagonal are added up, in bands of four, which
    takes two thirds of the time (``benchmarks/kronecker_pass.py``).
    """

    total: torch.Tensor | None = None
    positions: int = 0

    def add(self, rows_TD: torch.Tensor) -> None:
        if not len(rows_TD):  # of an expert that no token was sent to
            return
        width = rows_TD.shape[1]
        if self.total is None:
            self.total = rows_TD.new_zeros(width, width)
        with torch.autocast(rows_TD.device.type, enabled=False):  # a hook runs in its forward pass's precision
            for start, end in self._bands():
                self.total[start:end, start:].addmm_(rows_TD[:, start:end].T, rows_TD[:, start:])
        self.positions += len(rows_TD)

    def _bands(self) -> list[tuple[int, int]]:
        """Return the rows of each band of blocks; a single one where the whole is as fast."""
        assert self.total is not None
        width = len(self.total)
        parts = BANDS if self.total.device.type == "cpu" and width >= BANDED else 1
        return [(width * i // parts, width * (i + 1) // parts) for i in range(parts)]

    def add_up(self) -> None:
        """Complete the sum, below the diagonal too, and over all processes, which all have one of this layer."""
        assert self.total is not None
        for start, end in self._bands():
            self.total[end:, start:end] = self.total[start:end, end:].T
        if processes.count() > 1:
            positions = torch.tensor(self.positions, device=self.total.device)
            dist.all_reduce(self.total)
            dist.all_reduce(positions)
            self.positions = int(positions)


class KroneckerFactors:
    """The factors of a model's linear layers, watched by hooks while a context is open.

    Layers that are given the very same input (query, key and value; gate and up; the first halves of their adapters)
    share one ``A``.

    Args:
        model: The model; its layers are those of :func:`linear_layers`.
        outputs: Watch gradients too, for ``G``. Without it a forward pass suffices.
        largest: Widest side of a factor.

    Raises:
        ValueError: The model has no linear layer that can be factored.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> factors = KroneckerFactors(layer)
        >>> with factors.observing():
        ...     layer(torch.tensor([[1.0, 3.0]])).backward(torch.tensor([[2.0]]))
        >>> factors.absorb()
        >>> factors.inputs("0"), factors.outputs("0")
        (tensor([[1., 3.],
                [3., 9.]]), tensor([[4.]]))
    """

    def __init__(self, model: nn.Module, *, outputs: bool = True, largest: int = LARGEST) -> None:
        self.layers = linear_layers(model, largest, outputs=outputs)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no trainable linear layer of at most {largest} inputs"
                f"{' and outputs' if outputs else ''} beside its head, so Kronecker-factored curvature has nothing to "
                "work on; use sophia"
            )
        self.watches_outputs = outputs
        self.through = seen_through(self.layers)
        """First halves of LoRA adapters, with the second halves that their ``G`` is made of."""
        self.version = 0
        """Counts :meth:`absorb`, so that what is derived from the factors knows when it is stale."""
        self._a: dict[str, torch.Tensor] = {}
        self._g: dict[str, torch.Tensor] = {}
        self._same_input: dict[str, str] = {}
        self._a_sums: dict[str, _Sum] = {}
        self._g_sums: dict[str, _Sum] = {}
        self._seen = Seen()

    def inputs(self, name: str) -> torch.Tensor:
        """Return ``A`` of a layer, ``[I, I]``, in fp32 at least."""
        return self._a[self.input_of(name)]

    def outputs(self, name: str) -> torch.Tensor:
        """Return ``G`` of a layer, ``[O, O]``, in fp32 at least; of an adapter's first half, for ``B`` as it is now."""
        if name not in self.through:
            return self._g[name]
        g = self._g[self.through[name]]
        b = self.layers[self.through[name]].weight.detach().to(g.dtype)
        return b.T @ g @ b

    def knows(self, name: str) -> bool:
        """Say whether passes have shown a layer's factors: not where none went through it, as with some routers."""
        outputs = not self.watches_outputs or self.through.get(name, name) in self._g
        return self.input_of(name) in self._a and outputs

    def input_of(self, name: str) -> str:
        """Return the layer that keeps ``A`` for this one: itself, or the first of those with the same input."""
        return self._same_input.get(name, name)

    def bytes(self) -> int:
        """Return the least that the factors take or will take, in fp32.

        Which layers share an ``A`` shows when they run: here all those of one module with as many inputs do.

        Example:
            >>> KroneckerFactors(nn.Sequential(nn.Linear(2, 3))).bytes()  # the bias is a third input
            72
        """
        shapes = {name: pack(layer, layer.weight, layer.bias).shape for name, layer in self.layers.items()}
        inputs = {(parent(name), shape[1]) for name, shape in shapes.items()}
        outputs = [s[0] for n, s in shapes.items() if n not in self.through] if self.watches_outputs else []
        return 4 * (sum(width**2 for _, width in inputs) + sum(width**2 for width in outputs))

    @contextlib.contextmanager
    def observing(self, mask_BT: torch.Tensor | None = None) -> Iterator[None]:
        """Watch forward (and backward) passes; padding, where the mask is false, does not count.

        The inputs that gradient checkpointing computes again, within the backward pass, do not count twice.
        """
        mask = None if mask_BT is None else mask_BT.reshape(-1)
        handles = [layer.register_forward_hook(self._watch(name, mask)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen = Seen()

    def _watch(self, name: str, mask: torch.Tensor | None) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            assert isinstance(layer, (nn.Linear, Conv1D))
            x = args[0]
            again = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it
            other = self._seen.owner(x, is_biased(layer))
            if other is not None:
                self._same_input[name] = other
            elif not again:
                self._a_sums.setdefault(name, _Sum()).add(self._input_rows(layer, x, mask))
                self._seen.add(name, x, is_biased(layer))
            if self.watches_outputs and output.requires_grad and name not in self.through:
                output.register_hook(lambda grad: self._g_sums.setdefault(name, _Sum()).add(_real(_rows(grad), mask)))

        return hook

    @staticmethod
    def _input_rows(layer: Layer, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows = _real(_rows(x.detach()), mask)
        if is_biased(layer):
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        return rows

    @torch.no_grad()
    def absorb(self, share: float = 1.0) -> None:
        """Take in what was watched: ``A <- A + share (A_new - A)``, likewise ``G``; share 1 replaces the old.

        Micro-batches watched since the last call, in all processes, count as one pass: ``A`` is the mean over their
        positions and ``G`` the sum, whose weights are to sum to 1 over the pass. So a layer that saw nothing of a pass
        keeps its ``A``, and its ``G`` of that pass is 0. All processes call it together.

        Raises:
            ValueError: Nothing was watched.
            LostModelError: What was watched is not finite.
        """
        self._a_sums, self._g_sums = ({n: s for n, s in x.items() if s.positions} for x in (self._a_sums, self._g_sums))
        self._agree()
        if not self._a_sums:
            raise ValueError("no forward pass was watched: run one inside observing() before absorb()")
        for kept in (self._a_sums, self._g_sums):
            for name, found in sorted(kept.items()):  # in the same order everywhere
                found.add_up()
                assert found.total is not None
                check_finite(name, found.total)
        for name, found in self._a_sums.items():
            assert found.total is not None
            blend(self._a, name, found.total.div_(found.positions), share)
        for name, found in self._g_sums.items():
            assert found.total is not None
            blend(self._g, name, found.total, share)
        fade(self._g, self._g_sums, share)
        self._a_sums, self._g_sums = {}, {}
        self.version += 1

    def _agree(self) -> None:
        """Bring all processes to sums of the same layers: 0 where one saw nothing of a layer, as with some routers."""
        if processes.count() == 1:
            return
        both = (self._a_sums, self._g_sums)
        seen = [{n: (len(s.total), s.total.dtype) for n, s in sums.items() if s.total is not None} for sums in both]
        found = processes.gather((self._same_input, *seen))
        for _, *theirs in found:
            for sums, sizes in zip(both, theirs, strict=True):
                for name, (width, dtype) in sizes.items():
                    device = self.layers[name].weight.device
                    sums.setdefault(name, _Sum(torch.zeros(width, width, dtype=dtype, device=device)))
        self._same_input = {name: other for shares, *_ in reversed(found) for name, other in shares.items()}

    @torch.no_grad()
    def scramble(self, generator: torch.Generator) -> None:
        """Replace each factor ``M`` by ``Q M Q^T``, ``Q`` random and orthogonal: its spectrum in random directions."""
        for kept in (self._a, self._g):
            for name, matrix in sorted(kept.items()):  # whatever order they were found or loaded in
                noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
                basis, _ = torch.linalg.qr(noise)
                kept[name] = basis @ matrix @ basis.T
        self.version += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Return the factors by name: ``<layer>.inputs``, ``<layer>.outputs``, and ``<layer>.shares`` (see below).

        A layer without an ``A`` of its own has in ``shares`` the number of the layer that keeps it. Nothing is copied.
        """
        number = {name: i for i, name in enumerate(self.layers)}
        shares = {f"{n}.shares": torch.tensor(number[other]) for n, other in self._same_input.items()}
        factors = {f"{n}.inputs": a for n, a in self._a.items()} | {f"{n}.outputs": g for n, g in self._g.items()}
        return factors | shares

    def load_state(self, state: Mapping[str, torch.Tensor], *, copy: bool = True) -> None:
        """Take over the factors of another's :meth:`state`, as copies unless they are given away.

        Raises:
            ValueError: They are of layers this model does not have.
        """
        names = list(self.layers)
        self._a, self._g, self._same_input = {}, {}, {}
        for key, value in state.items():
            name, _, side = key.rpartition(".")
            if name not in self.layers:
                raise ValueError(f"these factors are of another model: it has a layer {name!r}, and this one does not")
            if side == "shares":
                self._same_input[name] = names[int(value)]
            elif side == "inputs" or name not in self.through:  # older states hold G of first halves
                check_finite(name, value)
                kept = self._a if side == "inputs" else self._g
                kept[name] = value.to(self.layers[name].weight.device, copy=copy)
        self.version += 1


def check_finite(name: str, factor: torch.Tensor) -> None:
    """Raise LostModelError where a factor is not finite, as one of infinite activations is."""
    if not math.isfinite(float(factor.diagonal().sum())):
        raise LostModelError(
            f"a curvature factor of the layer {name} is not finite: the weights are lost (lower optimizer.lr), or what "
            "the layer is given on the curvature's examples overflows (compute in fp32)"
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _real(rows_TD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows that are no padding; all of a layer that sees other positions than the batch's."""
    return rows_TD if mask is None or len(mask) != len(rows_TD) else rows_TD[mask]


def fade(kept: Mapping[str, torch.Tensor], seen: Collection[str], share: float) -> None:
    """Move by ``share`` of the way to 0, in place, what a pass said nothing of and is a sum over passes."""
    for name, value in kept.items():
        if name not in seen and share < 1:
            value.mul_(1 - share)


def blend(kept: dict[str, torch.Tensor], name: str, new: torch.Tensor, share: float) -> None:
    """Move what is kept under a name by ``share`` of the way to ``new``, in place; share 1 replaces it."""
    kept[name] = kept[name].lerp_(new, share) if name in kept and share < 1 else new
