"""Machine unlearning for language models, with second-order optimization.

The public names load on first use, so that ``import soul`` (and the report, which needs no torch) stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soul import optim as optim
    from soul.api import UnlearnResult as UnlearnResult
    from soul.api import unlearn as unlearn
    from soul.data.sources import load_examples as load_examples
    from soul.models import ModelSpec as ModelSpec
    from soul.models import load_model as load_model
    from soul.trainer import UnlearnTrainer as UnlearnTrainer
    from soul.training import TrainingSpec as TrainingSpec
    from soul.types import Example as Example
    from soul.types import Score as Score

_HOME = {
    "Example": "soul.types",
    "ModelSpec": "soul.models",
    "Score": "soul.types",
    "TrainingSpec": "soul.training",
    "UnlearnResult": "soul.api",
    "UnlearnTrainer": "soul.trainer",
    "load_examples": "soul.data.sources",
    "load_model": "soul.models",
    "unlearn": "soul.api",
}

__all__ = [*_HOME, "optim"]  # pyright: ignore[reportUnsupportedDunderAll]  # one table of names, not two


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("soul.optim")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # importing soul.evaluate binds the module under the same name: keep the function
        return value
    raise AttributeError(f"module 'soul' has no attribute {name!r}")
