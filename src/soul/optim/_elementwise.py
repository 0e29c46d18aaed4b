"""What rules without coupling between coordinates share: fp32 state, one sweep through memory, refusals, numbers."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from soul.optim import _fused, _paths
from soul.optim._checks import check_gradient, check_last_group
from soul.optim._metrics import Sampled, step_metrics, systematic_views
from soul.optim._paths import ListKernel, Moving, StepPath
from soul.optim._shards import local, start_of, summed_numbers
from soul.optim._state import exact_state
from soul.optim._storage import (
    NOTICEABLE,
    check_rounding,
    check_storage,
    drops_updates,
    exact_dtype,
    lost_updates,
    moved_share,
    noise_key,
    round_by_noise,
)
from soul.optim.base import UpdateRule

# An update in place on flat pieces: (p, g, *slots, u, t), with u and t scratch space; g must not be written to.
Kernel = Callable[..., None]
# From the slots, and space for the result, to the step before the learning rate: p <- p - lr u.
Direction = Callable[..., torch.Tensor]

# A step is bound by memory: a piece that stays in the cache between a kernel's operations is read from memory once.
CPU_CHUNK_PER_THREAD = 131_072
# Elsewhere whole tensors are fastest; the bound keeps the scratch space of a large embedding small.
DEVICE_CHUNK = 1 << 26


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


def sign(group: dict[str, Any]) -> float:
    """Return what a gradient is multiplied by."""
    return -1.0 if group["maximize"] else 1.0


def moves(group: dict[str, Any]) -> tuple[float, float]:
    """Return ``1 - lr wd`` and ``lr``, which the compiled kernels end with."""
    lr = float(group["lr"])
    return 1 - lr * group["weight_decay"], lr


class ElementwiseRule(UpdateRule, abc.ABC):
    """An update rule without coupling between coordinates; subclasses give the arithmetic as a kernel.

    All arithmetic is done in fp32 for parameters of lower precision (float64 for float64), and state is kept so, also
    through ``load_state_dict``; or in bf16 with ``state_dtype="bfloat16"``. The result is rounded to the parameter's
    dtype: bf16 weights lose most updates far below 0.4 % of the weight, whatever the rule, unless they are rounded with
    ``rounding="stochastic"``; the first step at the full learning rate warns of it. Of a sharded parameter each process
    steps its shard; numbers about steps are then of all shards, and every process has to ask for them.

    A step is computed in one of three ways that agree to float tolerance (:data:`soul.optim._paths.StepPath`), chosen
    by device, size and what is installed; :attr:`path`, or the environment variable ``SOUL_STEP``, forces one.

    Beside a rule's own settings, parameter groups take ``maximize`` (ascend; default false) and ``embedding`` (its
    coordinates are counted apart in :meth:`metrics`; default false). A learning rate may be a 0-dim tensor.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    _last: list[tuple[dict[str, Any], torch.Tensor, Any]]

    def __init__(
        self, params: Any, defaults: dict[str, Any], state_dtype: str = "float32", rounding: str = "nearest"
    ) -> None:
        check_storage(state_dtype, rounding)
        storage = {"state_dtype": state_dtype, "rounding": rounding}
        super().__init__(params, {**defaults, **storage, "maximize": False, "embedding": False})

    @property
    def path(self) -> StepPath:
        """How steps are computed; ``auto`` unless it was set here or by ``SOUL_STEP``."""
        return getattr(self, "_path", None) or _paths.wanted_path()

    @path.setter
    def path(self, path: str) -> None:
        self._path = _paths.checked(path)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the rule's settings where it has none of its own.

        Raises:
            ValueError: Parameters that are not real floating-point, or ``differentiable`` or ``capturable``.
        """
        super().add_param_group(param_group)
        check_last_group(self, "differentiable", "capturable")
        check_rounding(self.param_groups[-1])

    @abc.abstractmethod
    def _kernel(self, group: dict[str, Any], p: torch.Tensor) -> Kernel:
        """Return the update of one parameter, with its coefficients for the step that begins."""

    @abc.abstractmethod
    def _together(self, group: dict[str, Any], p: torch.Tensor) -> ListKernel:
        """Return the update of all parameters that are alike ``p``."""

    @abc.abstractmethod
    def _fused(self, group: dict[str, Any], p: torch.Tensor) -> _fused.Call:
        """Return the call of a compiled kernel that updates one parameter."""

    def _kernels(self, group: dict[str, Any], p: torch.Tensor) -> list[Kernel]:
        """Return what a step of ``p`` runs, one after the other on each piece."""
        return [self._kernel(group, p)]

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
        for group, p in moving:
            self._state_of(group, p)["step"] += 1
        self._keys = self._noise_keys(moving)
        rates = {id(group): _copy(group["lr"]) for group, _ in moving}  # a scheduler changes a tensor in place
        self._last = [(group, p, rates[id(group)]) for group, p in moving]
        watched = self._watched(moving)
        self._advance(moving)
        self._judge(watched)
        return loss

    def _noise_keys(self, moving: Moving) -> dict[torch.Tensor, int]:
        """Return what the noise of each tensor is drawn from that is not rounded to nearest at this step."""
        if all(group["rounding"] != "stochastic" for group in self.param_groups):
            return {}
        order = [p for group in self.param_groups for p in group["params"]]
        index = dict(zip(order, range(len(order)), strict=True))
        noisy = [p for group, p in moving if group["rounding"] == "stochastic" and p.dtype == torch.bfloat16]
        return {p: noise_key(self.state[p]["step"], index[p]) for p in noisy}

    def _watched(self, moving: Moving) -> tuple[Moving, list[torch.Tensor]]:
        """Return parameters that may lose updates, and a sample of them before a step; nothing after the first time."""
        low = [] if getattr(self, "_watching_is_over", False) else [x for x in moving if drops_updates(*x)]
        return low, [x.clone() for x in self._weights(low)]

    def _judge(self, watched: tuple[Moving, list[torch.Tensor]]) -> None:
        """Warn where few of the watched moved; a sharded parameter's process looks at its own part."""
        low, before = watched
        self._moved = None
        if not low:
            return
        self._watching_is_over = True
        momentum = systematic_views([self._slot(p, self.slots[0]) for _, p in low])
        self._moved = moved_share(before, self._weights(low), momentum)
        if self._moved is not None and self._moved < NOTICEABLE:
            group, p = low[0]
            warnings.warn(lost_updates(self._moved, float(group["lr"]), p.dtype), stacklevel=5)

    def _weights(self, members: Moving) -> list[torch.Tensor]:
        return systematic_views([local(p.detach()).reshape(-1) for _, p in members])

    def _advance(self, moving: Moving) -> None:
        self._move(moving)

    def _move(self, moving: Moving) -> None:
        """Update each parameter, in the way that serves it."""
        fused, rest = self._split(moving)
        _fused.run([self._fused(group, p) for group, p in fused])
        torch.autograd.graph.increment_version([p for _, p in fused])  # kernels write to memory that autograd watches
        alike: dict[tuple[Any, ...], Moving] = {}
        for group, p in rest:
            alike.setdefault(self._alike(group, p), []).append((group, p))
        for members in alike.values():
            (group, first), params = members[0], [p for _, p in members]
            if not _paths.together(self.path, [local(p) for p in params]):
                for p in params:
                    self._sweep(p, p.grad, *self._kernels(group, p), negate=group["maximize"])
                continue
            _paths.sweep_together(
                [local(p.detach()) for p in params],
                [local(p.grad.detach()) for p in params if p.grad is not None],
                [[self._slot(p, name) for p in params] for name in self.slots],
                self._together(group, first),
                limit=piece_size(first.device.type),
                dtype=exact_dtype(first),
                negate=group["maximize"],
                keys=[self._key(p) for p in params],
                starts=[self._start(p) for p in params],
            )

    def _split(
        self, moving: Moving, sources: Mapping[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[Moving, Moving]:
        """Return the members that compiled kernels take care of, and the others; gradients are the default sources."""
        if not moving or not _paths.fuses(
            self.path, [local(p) for group in self.param_groups for p in group["params"]]
        ):
            return [], moving
        out: tuple[Moving, Moving] = [], []
        for group, p in moving:
            source = p.grad if sources is None else sources[p]
            assert source is not None
            fits = _fused.fits(p, source, *(self.state[p][name] for name in self.slots))
            out[0 if fits else 1].append((group, p))
        return out

    def metrics(self) -> dict[str, float]:
        """Return numbers about the last step, from a sample of each group's coordinates (at most 131,072).

        ``win_rate``: the share of the coordinates with momentum whose step was not cut down to the bound of 1;
        ``win_rate_embedding``: the same of groups marked ``embedding``, which do not count in the first;
        ``cos_sign`` and ``cos_momentum``: the cosine between the step and the momentum's sign, and the momentum. They
        come from the state as it is: ask before the next step or refresh. Nothing where the rule has no bound.
        ``moved``, once, at the first step with the full learning rate: the share of 16-bit weights with momentum that
        changed, where they are rounded to nearest.
        """
        samples: list[Sampled] = []
        for alike in self._last_alike().values():
            (group, first, lr), params = alike[0], [p for _, p, _ in alike]
            direction = self._direction(group, first)
            if direction is not None:
                views = [systematic_views([self._slot(p, name) for p in params]) for name in self.slots]
                slots = [torch.cat(view).to(exact_dtype(first)) for view in views]
                u = direction(*slots, torch.empty_like(slots[0]))
                weight = sum(local(p).numel() for p in params) / max(1, u.numel())
                samples.append(Sampled(u, slots[0], float(lr), weight, bool(group["embedding"]), first))
        moved = getattr(self, "_moved", None)
        return step_metrics(samples) | ({} if moved is None else {"moved": moved})

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
        with exact_state(self, self._dtypes):
            super().load_state_dict(state_dict)
        for group in self.param_groups:  # of a state that was saved before they came into being
            for name in ("state_dtype", "rounding"):
                group.setdefault(name, self.defaults[name])

    def _dtypes(self) -> Callable[[torch.Tensor, str], torch.dtype]:
        groups = {p: group for group in self.param_groups for p in group["params"]}

        def dtype_of(p: torch.Tensor, name: str) -> torch.dtype:
            kept = groups[p].get("state_dtype", self.defaults["state_dtype"])
            return torch.bfloat16 if name in self.slots and kept == "bfloat16" else exact_dtype(p)

        return dtype_of

    def _pieces(self, p: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the slots of ``p`` and space of their size, piece by piece, to look at."""
        size = _piece_size(p)
        slots = [self._slot(p, name) for name in self.slots]
        space = torch.empty(size, dtype=exact_dtype(p), device=p.device)
        for pieces in zip(*(slot.split(size) for slot in slots), strict=True):
            yield *(piece.to(space.dtype) for piece in pieces), space[: pieces[0].numel()]

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    check_gradient(self, p.grad)
                    yield group, p

    def _state_of(self, group: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
        """Return the state of ``p``, made on first use so that it follows parameters moved or sharded before."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            dtype = torch.bfloat16 if group["state_dtype"] == "bfloat16" else exact_dtype(p)
            for name in self.slots:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        return state

    def _slot(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """Return a slot of what this process has of ``p``, as a flat view."""
        return local(self.state[p][name]).view(-1)

    def _key(self, p: torch.Tensor) -> int:
        """Return what the noise is drawn from that ``p`` is rounded with; 0 where it is rounded to nearest."""
        return getattr(self, "_keys", {}).get(p, 0)

    def _start(self, p: torch.Tensor) -> int:
        """Return where in its tensor's noise that of this process's part of ``p`` begins."""
        return start_of(p) if self._key(p) else 0

    def _sweep(self, p: torch.Tensor, source: torch.Tensor | None, *kernels: Kernel, negate: bool = False) -> None:
        """Run ``kernels`` once over all coordinates of ``p`` and ``source`` (its gradient), piece by piece."""
        assert source is not None
        size = _piece_size(p)
        ours, dtype = local(p.detach()), exact_dtype(p)
        flat = ours.reshape(-1)  # a view where p is contiguous, a copy to write back where it is not
        pieces = [flat, local(source.detach()).reshape(-1), *(self._slot(p, name) for name in self.slots)]
        scratch = torch.empty(4, size, dtype=dtype, device=p.device)
        key, start = self._key(p), self._start(p)
        for p_piece, g_piece, *kept in zip(*(piece.split(size) for piece in pieces), strict=True):
            u, t, p_work, g_work = scratch[:, : p_piece.numel()].unbind()
            p_exact = p_piece if p_piece.dtype == dtype else p_work.copy_(p_piece)
            g_exact = g_piece if g_piece.dtype == dtype else g_work.copy_(g_piece)
            if negate:
                g_exact = torch.neg(g_exact, out=g_work)
            slots = [piece.to(dtype) for piece in kept]
            for kernel in kernels:
                kernel(p_exact, g_exact, *slots, u, t)
            if p_exact is not p_piece:
                if key:
                    round_by_noise(p_exact, p_piece, key, start)
                else:
                    p_piece.copy_(p_exact)
            for piece, slot in zip(kept, slots, strict=True):
                if slot is not piece:
                    piece.copy_(slot)
            start += p_piece.numel()
        if not ours.is_contiguous():
            ours.copy_(flat.view(ours.shape))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def piece_size(device: str) -> int:
    """Return the most coordinates that a sweep on ``device`` works on at a time."""
    return CPU_CHUNK_PER_THREAD * torch.get_num_threads() if device == "cpu" else DEVICE_CHUNK


def _piece_size(p: torch.Tensor) -> int:
    return min(piece_size(p.device.type), max(1, local(p).numel()))
