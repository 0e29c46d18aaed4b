"""What an attack is: model, data -> model, in the hope that what was forgotten comes back."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from soul.data.batches import UnlearnDataset


@dataclasses.dataclass(frozen=True)
class Attack(abc.ABC):
    """Settings of an attack, with one verb: ``attack(model, data) -> model``.

    Forgetting that an attack undoes was hiding. An attack says little by itself: the model before and one retrained
    without the data are attacked too, and compared.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def __call__(self, model: Any, data: UnlearnDataset) -> Any:
        """Return the attacked model; it may be the one given, changed in place.

        Args:
            model: A causal language model.
            data: The forget set, tokenised (``UnlearnDataset(template, forget, (), ("forget",))``).
        """

    def known(self, count: int) -> list[int]:
        """Return which of ``count`` forget examples the attacker has: what comes back of these proves nothing."""
        del count
        return []
