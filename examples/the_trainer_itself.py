"""Unlearn with soul's Trainer and your own TrainingArguments: what ``soul.unlearn`` does, open to change.

python examples/the_trainer_itself.py MODEL forget.jsonl retain.jsonl OUT [STEPS]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import soul
from soul.objectives.npo import NPO
from soul.optim.kfac import KFACSpec
from soul.trainer import make_dataset


class Printed(TrainerCallback):
    """Prints every step's losses, as any callback of transformers can."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the losses among what was logged."""
        if "loss" in (logs or {}):
            print(f"step {state.global_step}: " + ", ".join(f"{k} {v:.3f}" for k, v in logs.items() if "loss" in k))


def main(path: str, forget: str, retain: str, out: str, steps: int = 20) -> list[float]:
    """Train for ``steps``, save to ``out``, and return the losses."""
    model, tokenizer = soul.load_model(soul.ModelSpec(path))
    objective, optimizer = NPO(beta=0.1), KFACSpec(lr=1e-3)
    training = soul.TrainingSpec(seed=0)  # which examples meet; batches and steps are the arguments'
    dataset = make_dataset(
        tokenizer, soul.load_examples(forget), soul.load_examples(retain), objective=objective, training=training
    )
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=4,
        max_steps=steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, steps // 10),
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = soul.UnlearnTrainer(
        model,
        arguments,
        dataset=dataset,
        objective=objective,
        optimizer=optimizer,
        training=training,
        callbacks=[Printed()],
    )
    trainer.train()
    trainer.save_model(out)
    tokenizer.save_pretrained(out)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        raise SystemExit(__doc__)
    steps = int(sys.argv[5]) if len(sys.argv) == 6 else 20
    main(*sys.argv[1:5], steps=steps)
