"""Any torch optimizer by its import path, with the verbs the trainer asks for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from soul.optim._torch import TorchRule
from soul.optim.base import OptimizerSpec, UpdateRule
from soul.registry import OPTIMIZERS

RESERVED = ("params", "lr", "weight_decay")


class _Adapted(TorchRule):
    """Comes before the class given, in the bases of the class that :func:`adapted` makes."""

    path: str
    asks_again: bool
    """Whether the class's own step cannot do without a closure."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; the class calls the closure itself, as often as it wants to.

        Raises:
            ValueError: A gradient is sparse.
        """
        self._check_gradients()
        return self._advance(closure)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class has no name that pickle could find it by
        return _empty, (self.path,), self.__getstate__()


def _empty(path: str) -> UpdateRule:
    cls = adapted(path)
    return cls.__new__(cls)


@functools.cache
def adapted(path: str) -> type[UpdateRule]:
    """Return a class that is both the optimizer at ``path`` and an :class:`~soul.optim.base.UpdateRule`.

    Raises:
        ValueError: No such module or class, or not a torch optimizer.

    Example:
        >>> issubclass(adapted("torch.optim.NAdam"), torch.optim.NAdam)
        True
    """
    module, _, name = path.rpartition(".")
    example = "give an import path such as torch.optim.NAdam"
    try:
        cls = getattr(importlib.import_module(module), name) if module else None
    except ImportError as error:
        raise ValueError(f"optimizer path {path!r} cannot be imported ({error}): {example}") from error
    except AttributeError as error:
        raise ValueError(f"optimizer path {path!r}: {module} has no {name}; {example}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optimizer path {path!r} is not a torch.optim.Optimizer; {example}")
    if "lr" not in inspect.signature(cls).parameters:
        raise ValueError(f"optimizer path {path!r} takes no lr, which schedules set; {example}")
    closure = inspect.signature(cls.step).parameters.get("closure")
    asks_again = closure is not None and closure.default is inspect.Parameter.empty
    own: dict[str, Any] = {"path": path, "asks_again": asks_again, "__doc__": cls.__doc__, "__module__": __name__}
    return type(cls.__name__, (_Adapted, cls), own)


@OPTIMIZERS.register("external")
@dataclasses.dataclass(frozen=True)
class ExternalSpec(OptimizerSpec):
    """Any torch optimizer, by its import path: whatever control the library does not have.

    What ``weight_decay`` means is the class's own business: torch's NAdam adds it to the gradient unless ``kwargs``
    says ``decoupled_weight_decay: true``.

    What is not torch's own is imported when it is to be used, and not by whoever reads a recipe: importing runs code.

    Attributes:
        path: Import path of a ``torch.optim.Optimizer`` whose ``step`` needs no more than gradients.
        kwargs: Its other arguments.
    """

    path: str = "torch.optim.NAdam"
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        reserved = [name for name in RESERVED if name in self.kwargs]
        if reserved:
            raise ValueError(f"kwargs must not hold {reserved[0]}: it is a setting of its own")
        if self.path.startswith("torch.") or "." not in self.path:
            self._adapted()

    @property
    def needs_closure(self) -> bool:
        """Whether the class's step asks for a closure, by which the trainer refuses it."""
        cls: Any = self._adapted()
        return bool(cls.asks_again)

    def _adapted(self) -> type[UpdateRule]:
        """Return the class at ``path``, which takes the arguments given."""
        known = inspect.signature(adapted(self.path)).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        wanted = [*self.kwargs, *(["weight_decay"] if self.weight_decay else [])]
        unknown = [] if anything else [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"{self.path} takes no {unknown[0]}; known: {', '.join(known)}")
        return adapted(self.path)

    def build(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], model: torch.nn.Module | None = None
    ) -> UpdateRule:
        """Return the optimizer over ``params``."""
        del model
        cls: Any = self._adapted()
        decay = {"weight_decay": self.weight_decay} if "weight_decay" in inspect.signature(cls).parameters else {}
        return cls(params, lr=self.lr, **decay, **self.kwargs)
