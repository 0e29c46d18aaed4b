"""What rules without coupling between coordinates share: fp32 state, one sweep through memory, refusals, numbers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from soul.optim._metrics import Sampled, step_metrics, systematic_views
from soul.optim._shards import local, summed_numbers
from soul.optim._state import exact_state
from soul.optim.base import UpdateRule

# An update in place on flat pieces: (p, g, *slots, u, t), with u and t scratch space; g must not be written to.
Kernel = Callable[..., None]
# From the slots, and space for the result, to the step before the learning rate: p <- p - lr u.
Direction = Callable[..., torch.Tensor]

# A step is bound by memory: a piece that stays in the cache between a kernel's operations is read from memory once.
CPU_CHUNK_PER_THREAD = 131_072
# Elsewhere whole tensors are fastest; the bound keeps the scratch space of a large embedding small.
DEVICE_CHUNK = 1 << 26


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless ``low <= value < high``."""
    if not low <= value < high:
        raise ValueError(f"{name} must be at least {low} and below {high}, not {value}")


def check_above(name: str, value: float, bound: float) -> None:
    """Raise ValueError unless ``value > bound``."""
    if not value > bound:
        raise ValueError(f"{name} must be above {bound}, not {value}")


def check_common(lr: float, weight_decay: float, **betas: float) -> None:
    """Raise ValueError where a learning rate, a weight decay or a decay rate of an average makes no sense."""
    check_above("lr", lr, 0.0)
    check_between("weight_decay", weight_decay, 0.0, float("inf"))
    for name, beta in betas.items():
        check_between(name, beta, 0.0, 1.0)


def check_last_group(rule: torch.optim.Optimizer, *refused: str) -> None:
    """Take the parameter group added last out again and raise ValueError where it asks for what no rule here can do."""
    group, name = rule.param_groups.pop(), type(rule).__name__
    for setting in refused:
        if group.get(setting):
            raise ValueError(f"{name} does not support {setting}=True: leave it out")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"{name} needs real floating-point parameters, not {p.dtype}")
    rule.param_groups.append(group)


def check_gradient(rule: torch.optim.Optimizer, gradient: torch.Tensor | None) -> None:
    """Raise ValueError where a gradient is sparse."""
    if gradient is not None and gradient.layout != torch.strided:
        raise ValueError(
            f"{type(rule).__name__} needs dense gradients, not {gradient.layout}: build embeddings with sparse=False"
        )


def move(p: torch.Tensor, u: torch.Tensor, group: dict[str, Any]) -> None:
    """Do ``p <- p (1 - lr wd) - lr u`` in place, without waiting for the device that a tensor ``lr`` lives on."""
    lr, weight_decay = host_scalar(group["lr"]), group["weight_decay"]
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    if isinstance(lr, torch.Tensor):
        p.addcmul_(u, lr, value=-1)
    else:
        p.add_(u, alpha=-lr)


def host_scalar(value: Any) -> Any:
    """Return a number, or a 0-dim tensor where reading it would wait for a device."""
    return float(value) if not isinstance(value, torch.Tensor) or value.device.type == "cpu" else value


class ElementwiseRule(UpdateRule, abc.ABC):
    """An update rule without coupling between coordinates; subclasses give the arithmetic as a kernel.

    State is kept, and all arithmetic done, in fp32 for parameters of lower precision (float64 for float64), also
    through ``load_state_dict``. The result is rounded to the parameter's dtype: bf16 weights without an fp32 master
    lose most updates far below 0.4 % of the weight, whatever the rule. Of a sharded parameter each process steps its
    shard; numbers about steps are then of all shards, and every process has to ask for them.

    Beside a rule's own settings, parameter groups take ``maximize`` (ascend; default false) and ``embedding`` (its
    coordinates are counted apart in :meth:`metrics`; default false). A learning rate may be a 0-dim tensor.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    _last: list[tuple[dict[str, Any], torch.Tensor, Any]]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "maximize": False, "embedding": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the rule's settings where it has none of its own.

        Raises:
            ValueError: Parameters that are not real floating-point, or ``differentiable`` or ``capturable``.
        """
        super().add_param_group(param_group)
        check_last_group(self, "differentiable", "capturable")

    @abc.abstractmethod
    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        """Return the update of one parameter, with its coefficients for the step that begins."""

    def _direction(self, group: dict[str, Any], p: torch.Tensor) -> Direction | None:
        """Return how the last step of ``p`` follows from its slots, where the rule can tell (for :meth:`metrics`)."""
        del group, p
        return None

    def _alike(self, group: dict[str, Any], p: torch.Tensor) -> tuple[Any, ...]:
        """Return what parameters must have in common to share one :meth:`_direction`."""
        return id(group), p.device, p.dtype, self.state[p]["step"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; parameters without a gradient stay as they are.

        Args:
            closure: Optional function that clears the gradients, computes the loss again, calls ``backward`` and
                returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = list(self._with_gradient())
        for _, p in moving:
            self._state_of(p)["step"] += 1
        rates = {id(group): _copy(group["lr"]) for group, _ in moving}  # a scheduler changes a tensor in place
        self._last = [(group, p, rates[id(group)]) for group, p in moving]
        self._advance(moving)
        return loss

    def _advance(self, moving: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        for group, p in moving:
            self._sweep(p, p.grad, self._kernel(group, p), negate=group["maximize"])

    def metrics(self) -> dict[str, float]:
        """Return numbers about the last step, from a sample of each group's coordinates (at most 131,072).

        ``win_rate``: the share of the coordinates with momentum whose step was not cut down to the bound of 1;
        ``win_rate_embedding``: the same of groups marked ``embedding``, which do not count in the first;
        ``cos_sign`` and ``cos_momentum``: the cosine between the step and the momentum's sign, and the momentum. They
        come from the state as it is: ask before the next step or refresh. Nothing where the rule has no bound.
        """
        samples: list[Sampled] = []
        for alike in self._last_alike().values():
            (group, first, lr), params = alike[0], [p for _, p, _ in alike]
            direction = self._direction(group, first)
            if direction is not None:
                slots = [torch.cat(systematic_views([self._slot(p, name) for p in params])) for name in self.slots]
                u = direction(*slots, torch.empty_like(slots[0]))
                weight = sum(local(p).numel() for p in params) / max(1, u.numel())
                samples.append(Sampled(u, slots[0], float(lr), weight, bool(group["embedding"]), first))
        return step_metrics(samples)

    @torch.no_grad()
    def win_rates(self) -> dict[torch.Tensor, float]:
        """Return the win rate of each parameter in the last step, over all its coordinates that have momentum.

        What :meth:`metrics` samples and sums, layer by layer, for who wants to look closer. Parameters without momentum
        are left out, and all of them where the rule has no bound on a coordinate.

        Example:
            >>> p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
            >>> optimizer = SoulRelease([p, q])
            >>> p.grad, q.grad = torch.tensor([1.0, 1e-4]), torch.zeros(2)
            >>> optimizer.step()
            >>> optimizer.win_rates()[p]
            0.5
        """
        out: dict[torch.Tensor, float] = {}
        for group, p, _ in getattr(self, "_last", []):
            direction, moving, clipped = self._direction(group, p), 0.0, 0.0
            for *slots, u in self._pieces(p) if direction is not None else ():
                assert direction is not None
                direction(*slots, u)
                moving += int((slots[0] != 0).sum())
                clipped += int((u.abs() >= 1).sum())
            moving, clipped = summed_numbers((moving, clipped), p)
            if moving:
                out[p] = 1 - clipped / moving
        return out

    def _last_alike(self) -> dict[tuple[Any, ...], list[tuple[dict[str, Any], torch.Tensor, Any]]]:
        out: dict[tuple[Any, ...], list[tuple[dict[str, Any], torch.Tensor, Any]]] = {}
        for group, p, lr in getattr(self, "_last", []):  # absent before the first step and after unpickling
            out.setdefault(self._alike(group, p), []).append((group, p, lr))
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over ``state_dict``, as copies and in the precision of the state."""
        with exact_state(self, _state_dtype):
            super().load_state_dict(state_dict)

    def _pieces(self, p: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the slots of ``p`` and space of their size, piece by piece, to look at."""
        size = _piece_size(p)
        slots = [self._slot(p, name) for name in self.slots]
        space = torch.empty(size, dtype=_state_dtype(p), device=p.device)
        for pieces in zip(*(slot.split(size) for slot in slots), strict=True):
            yield *pieces, space[: pieces[0].numel()]

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    check_gradient(self, p.grad)
                    yield group, p

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        """Return the state of ``p``, made on first use so that it follows parameters moved or sharded before."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in self.slots:
                state[name] = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.contiguous_format)
        return state

    def _slot(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """Return a slot of what this process has of ``p``, as a flat view."""
        return local(self.state[p][name]).view(-1)

    def _sweep(self, p: torch.Tensor, source: torch.Tensor | None, *kernels: Kernel, negate: bool = False) -> None:
        """Run ``kernels`` once over all coordinates of ``p`` and ``source`` (its gradient), piece by piece."""
        assert source is not None
        size = _piece_size(p)
        ours, dtype = local(p.detach()), _state_dtype(p)
        flat = ours.reshape(-1)  # a view where p is contiguous, a copy to write back where it is not
        pieces = [flat, local(source.detach()).reshape(-1), *(self._slot(p, name) for name in self.slots)]
        scratch = torch.empty(4, size, dtype=dtype, device=p.device)
        for p_piece, g_piece, *slots in zip(*(piece.split(size) for piece in pieces), strict=True):
            u, t, p_work, g_work = scratch[:, : p_piece.numel()].unbind()
            p_exact = p_piece if p_piece.dtype == dtype else p_work.copy_(p_piece)
            g_exact = g_piece if g_piece.dtype == dtype else g_work.copy_(g_piece)
            if negate:
                g_exact = torch.neg(g_exact, out=g_work)
            for kernel in kernels:
                kernel(p_exact, g_exact, *slots, u, t)
            if p_exact is not p_piece:
                p_piece.copy_(p_exact)
        if not ours.is_contiguous():
            ours.copy_(flat.view(ours.shape))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def piece_size(device: str) -> int:
    """Return the most coordinates that a sweep on ``device`` works on at a time."""
    return CPU_CHUNK_PER_THREAD * torch.get_num_threads() if device == "cpu" else DEVICE_CHUNK


def _piece_size(p: torch.Tensor) -> int:
    return min(piece_size(p.device.type), max(1, local(p).numel()))


def _state_dtype(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
