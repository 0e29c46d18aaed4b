"""What every update rule declares, so that the trainer has one branch and no list of names."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from soul.choices import check_choices
from soul.curvature.estimators import ESTIMATORS
from soul.curvature.spec import CurvatureSpec
from soul.optim.cost import RuleCost, probed_cost
from soul.registry import Named


class UpdateRule(torch.optim.Optimizer):
    """A torch optimizer with the further verbs the trainer uses; all do nothing by default."""

    @property
    def needs_backward(self) -> bool:
        """Whether a curvature pass must go backward: not where a rule watches only what goes into layers."""
        return True

    @property
    def needs_gradients(self) -> bool:
        """Whether it wants what a curvature pass leaves on the weights: not where a rule watches layers alone."""
        return True

    def expect(self, steps: int) -> None:
        """Hear before training how many steps there will be, those before a resume included."""

    def observing(self, mask_BT: torch.Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context in which forward and backward passes are watched by a rule that needs more than gradients.

        Args:
            mask_BT: True at real tokens, false at padding, which must not count; None where every position is real.
        """
        del mask_BT
        return contextlib.nullcontext()

    def update_curvature(self, estimate: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Take in a curvature estimate.

        The caller has just run a curvature pass (:mod:`soul.curvature.estimators`).

        Args:
            estimate: An unbiased estimate of the diagonal curvature for each parameter. None where each ``param.grad``
                holds a vector whose elementwise square is one, as a single backward pass leaves it. The caller clears
                the gradients.
        """

    def curvature_state(self) -> dict[str, torch.Tensor] | None:
        """Return, by name, all that passes have told the rule, so that a later run can begin with it.

        None, the default, says that estimates handed to :meth:`update_curvature` are all there is; the caller then
        keeps those. A rule that watches passes returns a dict, also while it is empty.
        """
        return None

    def load_curvature_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Begin as after the one refresh that left ``state``; ``state`` is the rule's to keep."""

    def derivation(self) -> str:
        """Name the settings that what is derived from the curvature depends on; empty where it is not worth keeping."""
        return ""

    def derived(self) -> dict[str, torch.Tensor]:
        """Return, by name, what the rule derives from the curvature it has, such as inverses; nothing is copied."""
        return {}

    def load_derived(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over another's :meth:`derived`, found from the same curvature; ``state`` is the rule's to keep."""

    def scramble(self, seed: int) -> None:
        """Turn what passes told into random directions, spectra kept: a control, for rules that watch passes."""

    def metrics(self) -> dict[str, float]:
        """Return numbers about the last step worth logging, e.g. ``{"win_rate": 0.3}``."""
        return {}

    def predicted_kl(self) -> float | None:
        """Return what the rule's own curvature says the last step cost in KL (nats a token); None if it cannot tell."""
        return None

    def feedback(self, scale: float, measured_kl: float) -> None:
        """Hear from a trust region that the last step was scaled by ``scale`` and then cost ``measured_kl``."""


@dataclasses.dataclass(frozen=True)
class OptimizerSpec(Named, abc.ABC):
    """Hyper-parameters of an update rule; its fields are the schema of recipes, command line and record.

    Attributes:
        lr: Learning rate (peak of the schedule).
        weight_decay: Decoupled weight decay, ``p <- p (1 - lr * weight_decay)``.
    """

    lr: float = 1e-5
    weight_decay: float = 0.0

    needs_curvature: ClassVar[bool] = False
    """The rule has a field ``curvature`` and wants passes as it says."""
    needs_modules: ClassVar[bool] = False
    """``build`` must be given the model, whose modules the rule watches."""
    needs_whole: ClassVar[bool] = False
    """``step`` couples the coordinates of a parameter, so that a process which has a shard of it cannot make one."""

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` must be given a closure that computes the loss again; the trainer refuses it."""
        return False

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters that the rule itself takes; the passes over data are the trainer's."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curvature"}

    def curvature_settings(self) -> dict[str, Any]:
        """Return those settings that :meth:`UpdateRule.curvature_state` depends on: a kept one serves where they agree.

        By default all but learning rate and weight decay, which is safe and finds less in the cache than it could.
        """
        general = {field.name for field in dataclasses.fields(OptimizerSpec)}
        return {name: value for name, value in self.settings().items() if name not in general}

    def left_alone(self, model: nn.Module) -> list[nn.Parameter]:
        """Return trained matrices that the rule would leave as they are, and of which it needs no gradient."""
        del model
        return []

    def prepare(self, model: nn.Module) -> None:
        """Freeze what the rule leaves alone, so that no gradient is made of it; called before :meth:`build`."""
        for p in self.left_alone(model):
            p.requires_grad_(False)

    @abc.abstractmethod
    def build(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], model: nn.Module | None = None
    ) -> UpdateRule:
        """Return the torch optimizer over ``params`` (parameters, or torch's parameter groups) of ``model``."""

    def cost(self, params: Sequence[torch.Tensor], model: nn.Module | None = None, device: str = "cpu") -> RuleCost:
        """Return what the rule will take in memory and arithmetic, from shapes and dtypes alone.

        A rule declares it here, as a formula. Of one that does not, the state is found from a step on tiny tensors.

        Args:
            params: The trainable parameters; tensors on the meta device do.
            model: The model they are of, likewise.
            device: Where the rule is to run.

        Raises:
            ValueError: The rule declares nothing, and cannot make a step on a tensor alone.
        """
        del device
        if self.needs_modules:
            raise ValueError(f"{self.name} watches the model's layers and declares no cost(): its memory is not known")
        return probed_cost(lambda tensors: self.build(tensors, model), params)


@dataclasses.dataclass(frozen=True)
class CurvatureOptimizerSpec(OptimizerSpec, abc.ABC):
    """Hyper-parameters of an update rule that needs curvature.

    Attributes:
        curvature: When and from what the curvature is estimated.
    """

    curvature: CurvatureSpec = dataclasses.field(default_factory=CurvatureSpec)

    needs_curvature: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fit = [name for name, kind in ESTIMATORS.items() if kind.shows_layers]
        if self.needs_modules and self.curvature.estimator not in fit:
            raise ValueError(
                f"{self.name} watches the model's layers in curvature passes, and curvature.estimator "
                f"{self.curvature.estimator} does not send noise of each token's own through them: choose one of "
                f"{', '.join(fit)}"
            )
        if self.needs_modules and self.curvature.shuffled and self.curvature.interval:
            raise ValueError(f"curvature.shuffled turns factors once: set curvature.interval to 0 for {self.name}")
        unread = {} if ESTIMATORS[self.curvature.estimator].needs_pass else vars(self.curvature)
        given = [
            name for name, value in unread.items() if name != "estimator" and value != getattr(CurvatureSpec, name)
        ]
        if given:
            raise ValueError(
                f"curvature.estimator {self.curvature.estimator} takes the training gradient at every step and makes "
                f"no passes: leave out curvature.{', curvature.'.join(given)}"
            )
