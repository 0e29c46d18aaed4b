"""What DeepSpeed's configuration may not say, found before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soul import zero
from soul.optim.adamw import AdamWSpec
from soul.optim.external import ExternalSpec
from soul.training import TrainingSpec


def trainer_with(stage: int = 2, precision: str = "no", training: Any = None, **config: Any) -> Any:
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": {}, **config})
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision),
        curvature=None, trust=None, stopping=None, training_spec=TrainingSpec(save_steps=0, **(training or {})),
    )  # fmt: skip


def test_every_stage_is_accepted():
    for stage in (1, 2, 3):
        zero.check(trainer_with(stage), AdamWSpec())
        zero.check(trainer_with(stage, zero_optimization={"offload_optimizer": {"device": "none"}}), AdamWSpec())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"stage": 0}, "zero_stage must be 1, 2 or 3, not 0: without it use DDP"),
        ({"optimizer": {"type": "AdamW"}}, "has a section 'optimizer', and the recipe says what that is"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device cpu has not been"),
        ({"precision": "fp16"}, "fp16 scales the loss"),
        ({"training": {"combine": "dual"}}, "training.combine is sum"),
        ({"training": {"compile": True}}, "training.compile is false"),
    ],
)
def test_what_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        zero.check(trainer_with(**config), AdamWSpec())


def test_a_rule_of_somebody_else_is_taken_at_its_word():
    zero.check(trainer_with(), ExternalSpec(path="torch.optim.NAdam"))


def test_bf16_is_autocast_and_weights_stay_as_they_are():
    plugin = SimpleNamespace(deepspeed_config={"bf16": {"enabled": True}})
    zero.keep_weights_wide(plugin)
    assert plugin.deepspeed_config == {"bf16": {"enabled": False}}
