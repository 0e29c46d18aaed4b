"""Task arithmetic: learn the forget set once more, and go the same way backwards."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import torch

from soul.curvature.products import trainable
from soul.data.batches import UnlearnDataset
from soul.methods._fine_tune import fine_tune, refuse_trained_adapter
from soul.methods.base import Log, Method, Progress, silent, unheard
from soul.optim.adamw import AdamWSpec
from soul.registry import METHODS
from soul.training import TrainingSpec


@METHODS.register("task_vector")
@dataclasses.dataclass(frozen=True)
class TaskVector(Method):
    """Task arithmetic (arXiv 2212.04089, section 3): ``theta_0 - alpha tau``, ``tau = theta_forget - theta_0``.

    ``theta_forget`` is the model fine-tuned on the forget set, which is done here and in place, so that the only copy
    beside the model is ``theta_0``. With a LoRA adapter that starts at zero ``tau`` is the product ``s B A`` of each
    layer, whose negative is had by ``B <- -alpha B``. Nothing holds the retain set in place but ``alpha``.

    Attributes:
        alpha: How far to go; 0 gives the model back, and more than the fine-tuning moved it is usual.
        lr: Peak learning rate of the fine-tuning.
        weight_decay: Its decoupled weight decay, which becomes part of ``tau``.
        training: Its length and batches; the seed and the longest sequence are the data's.
    """

    alpha: float = 1.0
    lr: float = 1e-5
    weight_decay: float = 0.0
    training: TrainingSpec = dataclasses.field(default_factory=lambda: TrainingSpec(save_steps=0))

    views: ClassVar[tuple[str, ...]] = ("forget",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be 0 or more, not {self.alpha}: the vector is subtracted alpha times")
        AdamWSpec(lr=self.lr, weight_decay=self.weight_decay)

    def __call__(self, model: Any, data: UnlearnDataset, *, progress: Progress = silent, log: Log = unheard) -> Any:
        """Change ``model`` in place and return it; after an error it is as it was.

        Raises:
            ValueError: An adapter whose product cannot be negated.
        """
        moved = trainable(model)
        second = _second_factors(model, moved)
        origin = {name: p.detach().clone() for name, p in moved.items()}
        rule = AdamWSpec(lr=self.lr, weight_decay=self.weight_decay)
        try:
            steps = fine_tune(
                model, data, data.examples["forget"], self.training, rule,
                what="learning the forget set", progress=progress, log=log,
            )  # fmt: skip
        except BaseException:
            with torch.no_grad():
                for name, p in moved.items():
                    p.copy_(origin[name])
            raise
        started = time.perf_counter()
        length = self._go_back(moved, origin, second)
        log({"step": steps + 1, "vector_norm": length, "seconds": round(time.perf_counter() - started, 4)})
        return model

    @torch.no_grad()
    def _go_back(
        self, moved: dict[str, torch.nn.Parameter], origin: dict[str, torch.Tensor], second: set[str] | None
    ) -> float:
        """Replace the fine-tuned weights by those on the other side of the origin; return how far they had moved."""
        total = 0.0
        for name, p in moved.items():
            tau = p.float() - origin[name].float() if p.dtype != torch.float64 else p - origin[name]
            total += float(tau.double().square().sum())
            if second is None:
                p.copy_((origin[name].to(tau.dtype) - self.alpha * tau).to(p.dtype))
            elif name in second:
                p.mul_(-self.alpha)
        return total**0.5


def _second_factors(model: Any, moved: dict[str, torch.nn.Parameter]) -> set[str] | None:
    """Return the names of a LoRA adapter's second factors, ``B`` of ``s B A``; None where there is no adapter."""
    if not hasattr(model, "peft_config"):
        return None
    second = {name for name in moved if ".lora_B." in name}
    strange = [name for name in moved if name not in second and ".lora_A." not in name]
    if strange:
        raise ValueError(
            f"task_vector negates the product of LoRA factors on linear layers, and {strange[0]} is none: use plain "
            "LoRA, or train the weights"
        )
    refuse_trained_adapter(model, "the negative of what it goes on to learn is no adapter of the same rank")
    return second
