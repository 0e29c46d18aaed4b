"""The gold standard as a method like the others: the model that never saw the forget set."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar, Literal

import torch

from soul.data.batches import UnlearnDataset
from soul.methods._fine_tune import fine_tune, refuse_trained_adapter
from soul.methods.base import Log, Method, Progress, silent, unheard
from soul.models import ModelSpec, load_model, resolve
from soul.optim.adamw import AdamWSpec
from soul.registry import METHODS
from soul.training import TrainingSpec


@METHODS.register("retrain")
@dataclasses.dataclass(frozen=True)
class Retrain(Method):
    """Exact unlearning: the base model, fine-tuned on the retain set alone, as TOFU's retain models (arXiv 2401.06121).

    ``theta <- argmin NLL(retain)`` from the weights of ``base``, which take the place of the model's own. It is exact
    as far as ``base`` has not learned what is to be forgotten, which nothing here can check, and as far as training is
    what the model's own training was: give the same settings. Those of TOFU by default.

    Attributes:
        base: The model before it learned: a hub id, a folder or a run, of the same architecture. It must be given.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        training: Length and batches; the seed and the longest sequence are the data's.
    """

    base: str = ""
    lr: float = 1e-5
    weight_decay: float = 0.01
    training: TrainingSpec = dataclasses.field(default_factory=lambda: TrainingSpec(accumulation=8, save_steps=0))

    views: ClassVar[tuple[str, ...]] = ("retain",)
    replaces_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        AdamWSpec(lr=self.lr, weight_decay=self.weight_decay)

    def check(self, model: Any) -> None:  # noqa: ARG002 - any model will do
        """Find out whether there is a base to begin from.

        Raises:
            ValueError: No base was given, or it cannot be found.
        """
        if not self.base:
            raise ValueError(
                "retrain begins from the model before it learned: give method.base, a hub id or a folder, e.g. "
                "method.base=HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        resolve(self.base)

    def __call__(self, model: Any, data: UnlearnDataset, *, progress: Progress = silent, log: Log = unheard) -> Any:
        """Change ``model`` in place and return it.

        Raises:
            ValueError: No base was given, it is of another architecture, or an adapter on the model has learned before.
        """
        self.check(model)
        refuse_trained_adapter(model, "what it learned would stay when the weights below it are replaced")
        started = time.perf_counter()
        take_weights(model, self.base)
        log({"step": 0, "seconds": round(time.perf_counter() - started, 4)})
        rule = AdamWSpec(lr=self.lr, weight_decay=self.weight_decay)
        fine_tune(
            model, data, data.examples["retain"], self.training, rule,
            what="training on the retain set", progress=progress, log=log,
        )  # fmt: skip
        return model


@torch.no_grad()
def take_weights(model: Any, path: str) -> None:
    """Copy the weights of the model at ``path`` into ``model``; under an adapter, into what it adapts.

    Raises:
        ValueError: The two have not the same parameters.
    """
    dtype: Literal["float32", "bfloat16"] = (
        "bfloat16" if next(model.parameters()).dtype == torch.bfloat16 else "float32"
    )
    base, _ = load_model(ModelSpec(path, dtype=dtype, device="cpu"))
    theirs = dict(base.named_parameters())
    ours = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    different = [
        name for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]  # fmt: skip
    if different:
        raise ValueError(
            f"method.base {path!r} is of another architecture than the model: they differ in {different[0]}"
            f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}"
        )
    for name, p in ours.items():
        p.copy_(theirs[name])
