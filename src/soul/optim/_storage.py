"""In what precision an elementwise rule keeps its averages and writes weights, and what rounding loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from soul.optim.base import OptimizerSpec

StateDtype = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "stochastic"]

NOTICEABLE = 0.5
"""Share of weights that move below which a person is told."""


def check_storage(state_dtype: str, rounding: str) -> None:
    """Raise ValueError for what does not exist."""
    for name, value, kinds in (("state_dtype", state_dtype, StateDtype), ("rounding", rounding, Rounding)):
        if value not in get_args(kinds):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class StoredSpec(OptimizerSpec):
    """What all elementwise rules can be asked for beside their own settings.

    Attributes:
        state_dtype: Precision that averages are kept in between steps; ``bfloat16`` halves their memory.
        rounding: How bf16 weights are written: to the ``nearest`` number, which drops small updates, or ``stochastic``,
            up or down so that the mean is exact.
    """

    state_dtype: StateDtype = "float32"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_storage(self.state_dtype, self.rounding)

    def own_settings(self) -> dict[str, Any]:
        """Return the settings that are the rule's own."""
        return {name: value for name, value in self.settings().items() if name not in ("state_dtype", "rounding")}

    @property
    def slot_dtype(self) -> torch.dtype | None:
        """What averages are kept in; None for the precision of the step."""
        return torch.bfloat16 if self.state_dtype == "bfloat16" else None


def exact_dtype(p: torch.Tensor) -> torch.dtype:
    """Return what a step of ``p`` is computed in: fp32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def check_rounding(group: dict[str, Any]) -> None:
    """Raise ValueError where weights cannot be rounded as the group asks."""
    found = {p.dtype for p in group["params"]} - {torch.float32, torch.float64, torch.bfloat16}
    if group["rounding"] == "stochastic" and found:
        raise ValueError(
            f"rounding=stochastic is for bf16 weights (and has nothing to do for wider ones), not for {found.pop()}"
        )


def noise_key(step: int, index: int) -> int:
    """Return what the noise of a tensor at a step is drawn from; never 0, which stands for none.

    Example:
        >>> noise_key(1, 0) != noise_key(1, 1) != noise_key(2, 0)
        True
    """
    return _mixed(_mixed(step) ^ (index + 1)) or 1


def _mixed(x: int) -> int:
    """Return 32 bits mixed well (the finalizer "lowbias32" of Chris Wellons' hash-prospector, public domain)."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & mask
    x = (x ^ (x >> 15)) * 0x846CA68B & mask
    return x ^ (x >> 16)


def round_by_noise(values: torch.Tensor, out: torch.Tensor, key: int, start: int) -> None:
    """Write fp32 ``values`` to bf16 ``out``: up or down with the probabilities that make the mean exact.

    16 random bits are added below the bits that bf16 keeps, and the rest is cut off. They are a hash of ``key`` and the
    place of a coordinate, counted from ``start``, so that they depend on neither device nor pieces.
    """
    at = torch.arange(start, start + values.numel(), device=values.device)
    x = ((at & 0xFFFFFFFF) ^ key).to(torch.int32)  # int32 wraps around where 32 bits would
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    bits = values.contiguous().view(torch.int32) + ((x ^ (x >> 16)) & 0xFFFF)
    out.copy_(torch.where(values.isfinite(), (bits & -65536).view(torch.float32), values))


def drops_updates(group: dict[str, Any], p: torch.Tensor) -> bool:
    """Say whether small updates of ``p`` are lost, and this is a step of the full learning rate to see it by."""
    if p.dtype not in (torch.bfloat16, torch.float16) or group["rounding"] == "stochastic":
        return False
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
        return False  # reading it would wait
    return float(lr) >= 0.99 * float(group.get("initial_lr", lr)) > 0  # schedulers leave the peak there


def moved_share(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], momentum: Sequence[torch.Tensor]
) -> float | None:
    """Return the share of weights with momentum that a step changed; None where none has any.

    With rounding to nearest these are the weights whose update was half the distance to their neighbour, or more.
    """
    moving = sum(int((m != 0).sum()) for m in momentum)
    pairs = zip(before, after, momentum, strict=True)
    moved = sum(int(((a != b) & (m != 0)).sum()) for b, a, m in pairs)
    return moved / moving if moving else None


def lost_updates(share: float, lr: float, dtype: torch.dtype, *, stochastic: bool = True) -> str:
    """Say what a share of weights that move means; ``stochastic``, where the rule knows that rounding."""
    way = "set optimizer.rounding=stochastic, or keep" if stochastic else "keep"
    return (
        f"{str(dtype).removeprefix('torch.')} weights: only {share:.1%} of them moved in a step at learning rate "
        f"{lr:g}, since the updates of the others are less than half the distance to the next number and are dropped; "
        f"{way} the weights in fp32 (model.dtype=float32)"
    )
