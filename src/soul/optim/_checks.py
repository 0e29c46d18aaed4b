"""What update rules refuse, in the same words."""

from __future__ import annotations

import torch


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
