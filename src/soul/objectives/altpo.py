"""Alternate preference optimization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from soul.objectives.po import DPO
from soul.registry import OBJECTIVES


@OBJECTIVES.register("altpo")
@dataclasses.dataclass(frozen=True)
class AltPO(DPO):
    """Prefer another answer of the same kind to the forget answer, relative to the reference (arXiv 2409.13474).

    ``L = -(2/beta) mean_i log sigmoid(beta [r(alternate_i) - r(answer_i)])`` with ``r`` the summed log-ratio. The
    alternates are the ``wrong_answers`` of each forget example (column ``perturbed_answer``, one text or several);
    each epoch shows another. The paper has the model write them. TOFU's own perturbed answers serve, but its truth
    ratio is measured on them: a run that learned them has seen the test.
    """

    forget_views: ClassVar[tuple[str, ...]] = ("forget", "alternate")
    logps_views: ClassVar[tuple[str, ...]] = ("forget", "alternate")

    @property
    def factor(self) -> float:
        """What the log-sigmoid is multiplied by."""
        return 2 / self.beta
