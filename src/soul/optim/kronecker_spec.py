"""What recipes set of the rules with Kronecker-factored curvature."""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from soul.curvature.kronecker import LARGEST, KroneckerFactors, Layer, linear_layers, seen_through, too_wide
from soul.curvature.spec import CurvatureSpec
from soul.machine import memory_of
from soul.optim._checks import check_above, check_common
from soul.optim.base import CurvatureOptimizerSpec
from soul.optim.groups import embedding_ids
from soul.optim.kronecker import KroneckerRule, Others, Preconditioner

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class KroneckerSpec(CurvatureOptimizerSpec, abc.ABC):
    """What rules with Kronecker factors have in common.

    Attributes:
        lr: Longest step in the rule's metric.
        momentum: Decay of the average of gradients.
        decay: Decay of the factors a refresh.
        damping: Share of each factor's mean eigenvalue that is added to it.
        others: Parameters without factors (embeddings, head, norms, experts kept as one tensor, layers wider than
            ``max_dim``): ``frozen``, or by their ``diagonal`` curvature.
        max_dim: Widest side of a factor; a wider layer has none. Its factor takes ``4 max_dim^2`` bytes, with its
            inverse twice as many.
        every: Steps from one move to the next, which is longer then at the same rate of forgetting: dividing by the
            factors costs as much as a backward pass of a small batch, and few long steps lose little.
        curvature: When and from what the curvature is estimated; by default once, before the first step, and kept.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    decay: float = 0.95
    damping: float = 0.1
    others: Others = "frozen"
    max_dim: int = LARGEST
    every: int = 1
    curvature: CurvatureSpec = dataclasses.field(
        default_factory=lambda: CurvatureSpec(warm_start=8, interval=0, general_text=2)
    )

    watches_outputs: ClassVar[bool] = True
    """Whether there is a factor of what comes back to a layer's outputs, too."""
    needs_modules = True
    needs_whole = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self.lr, self.weight_decay, momentum=self.momentum, decay=self.decay)
        check_above("damping", self.damping, 0.0)
        for name in ("every", "max_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")

    @staticmethod
    def upgraded(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of an older recipe: ``turns``, in which layers divided one after the other, is gone."""
        if tree.get("turns", 1) != 1:
            raise ValueError("optimizer.turns is gone: optimizer.every saves as much time and forgets as well")
        return {name: value for name, value in tree.items() if name != "turns"}

    def curvature_settings(self) -> dict[str, Any]:
        """Return what factors found before the first step depend on: not damping, momentum or decay."""
        return {"others": self.others, "max_dim": self.max_dim}

    def rule(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        factors: KroneckerFactors,
        preconditioner: Preconditioner,
        newton: float,
    ) -> KroneckerRule:
        """Return the rule over ``params`` with the preconditioner a subclass chose."""
        settings = {k: v for k, v in self.settings().items() if k not in ("damping", "max_dim", "newton", "products")}
        worth = self.curvature.worth(0)
        return KroneckerRule(params, factors, preconditioner, newton=newton, worth=worth, **settings)

    def factors_of(self, model: nn.Module | None) -> KroneckerFactors:
        """Return the factors of ``model``; the log names what has none and therefore stays.

        Raises:
            ValueError: No model was given, or its factors do not fit into memory.
        """
        if model is None:
            raise ValueError(f"{self.name} watches the model's layers: build(params, model) needs the model")
        factors = KroneckerFactors(model, outputs=self.watches_outputs, largest=self.max_dim)
        device = next(iter(factors.layers.values())).weight.device
        needed, there = 2 * factors.bytes(), memory_of(device)  # the inverses, or bases, take as much again
        if needed > there:
            smaller = "a max_dim, whiten (the input sides alone), lion" if self.watches_outputs else "a max_dim, lion"
            raise ValueError(
                f"{self.name} would keep at least {needed / 1e9:.0f} GB of factors and inverses for this model, "
                f"and {device} has {there / 1e9:.0f} GB: use {smaller}, or an adapter on few layers"
            )
        self._say_left_alone(model)
        return factors

    def left_alone(self, model: nn.Module) -> list[nn.Parameter]:
        """Return matrices without factors, if they stay: three quarters of all where attention alone has some.

        Norms and embeddings stay too, and have gradients, which clipping counts.
        """
        if self.others != "frozen":
            return []
        wide, rest = self._without_factors(model)
        return [*(p for layer in wide.values() for p in layer.parameters() if p.requires_grad), *rest]

    def prepare(self, model: nn.Module) -> None:
        """Freeze them, and warn of it.

        Raises:
            ValueError: Nothing would be left.
        """
        if not linear_layers(model, self.max_dim, outputs=self.watches_outputs):
            KroneckerFactors(model, outputs=self.watches_outputs, largest=self.max_dim)  # which says so
        self._say_left_alone(model)
        super().prepare(model)

    def _without_factors(self, model: nn.Module) -> tuple[dict[str, Layer], dict[nn.Parameter, str]]:
        """Return layers too wide for factors, and other matrices without, such as experts kept as one tensor."""
        wide = too_wide(model, self.max_dim, outputs=self.watches_outputs)
        layers = wide | linear_layers(model, self.max_dim, outputs=self.watches_outputs)
        known = {id(p) for layer in layers.values() for p in layer.parameters()} | embedding_ids(model)
        trained = [(p, name) for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        return wide, {p: name for p, name in trained if id(p) not in known}

    def _say_left_alone(self, model: nn.Module) -> None:
        left = self.left_alone(model)
        if not left:
            return
        wide, rest = self._without_factors(model)
        said, ways = [], ["set optimizer.others to diagonal"] if self.watches_outputs else []
        if wide:
            layers = linear_layers(model, self.max_dim, outputs=self.watches_outputs)
            halves = seen_through({**layers, **wide})
            torn = sum((first in wide) != (second in wide) for first, second in halves.items())
            said.append(
                f"{len(wide)} of {len(wide) + len(layers)} linear layers (the first is {next(iter(wide))}) are "
                f"wider than {self.max_dim}"
                + (f" (halves of LoRA pairs among them, whose other half moves alone: {torn})" if torn else "")
            )
            ways.insert(0, "raise optimizer.max_dim")
        if rest:
            said.append(
                f"{len(rest)} tensors (the first is {next(iter(rest.values()))}) are no linear layer's alone, as those "
                "of experts that are kept together"
            )
        free = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.warning(
            "%s: %.1f %% of %d trainable weights have no factors and stay as they are: %s. To move them, %s",
            self.name,
            100 * sum(p.numel() for p in left) / free,
            free,
            "; ".join(said),
            ", or ".join([*ways, "use lion or adamw"]),
        )
