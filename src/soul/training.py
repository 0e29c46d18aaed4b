"""How long, how fast and in what precision to train: the ``training`` section of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from soul.choices import check_choices
from soul.combine import Combine
from soul.machine import has_bf16


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How long, how fast and in what precision to train.

    Attributes:
        batch_size: Forget/retain pairs in a micro-batch, of each process.
        accumulation: Micro-batches in a step; ``b x a`` gives the gradient of a batch of ``b * a``, times the number of
            processes.
        epochs: Walks through the forget set (the retain set for ``ft``).
        max_steps: Stop after this many steps; 0 leaves it to ``epochs``.
        warmup: Share of the steps with rising learning rate.
        schedule: Learning-rate schedule after warm-up.
        max_grad_norm: Gradient clipping; 0 turns it off.
        precision: ``auto`` is bf16 autocast where the hardware has it; ``float32`` turns it off.
        seed: Seed of pairing, refusals and curvature noise.
        max_length: Longest sequence in tokens.
        save_steps: Steps between checkpoints; 0 saves none. With a stopping rule they wait for its next look.
        reference: How KL gets its reference: ``cache``, ``adapter_off`` or ``copy``.
        trust_kl: Largest KL (nats a token, on retained answers) of a step; a larger one is shrunk. 0 for no bound.
        trust_batch: Retained examples it is measured on.
        frozen: ``embeddings`` leaves input embeddings and language-model head as they are, for every optimizer alike.
        combine: What becomes of the forget gradient ``f`` and the retain gradient ``r``: ``sum`` adds them;
            ``projected`` takes the part along ``r`` out of ``f``, ``f - (f.r / r.r) r``, before they are added: a
            control that protects one direction where curvature protects all; ``dual`` gives each an optimizer state of
            its own and steps twice (arXiv 2504.15827). The last two take a backward pass more.
        retain_lr: Of ``dual``, the learning rate of the retain step as a multiple of ``optimizer.lr``.
        compile: Compile the decoder blocks for training steps (``torch.compile``): on a CPU with matrix instructions a
            step takes about a quarter less, after some seconds for compiling, so it pays in long runs; needs a C++
            compiler there. Rounding differs from that of an uncompiled run.
        gradient_checkpointing: Keep only what enters each decoder block and run it again in the backward pass: much
            less memory for a third more time (arXiv 1604.06174).
        max_retain_loss: A step whose retain term (nats a token: NLL, whose perplexity is e to it, or KL) is larger ends
            the run as lost; 0 for what it was at the first step and ln(vocabulary) more.
    """

    batch_size: int = 4
    accumulation: int = 1
    epochs: int = 5
    max_steps: int = 0
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_length: int = 1024
    save_steps: int = 100
    reference: Literal["cache", "adapter_off", "copy"] = "cache"
    trust_kl: float = 0.0
    trust_batch: int = 8
    frozen: Literal["nothing", "embeddings"] = "nothing"
    combine: Combine = "sum"
    retain_lr: float = 1.0
    max_retain_loss: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "training")
        for name in ("batch_size", "accumulation", "epochs", "max_length", "trust_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be 1 or more, not {getattr(self, name)}")
        if min(self.max_steps, self.save_steps, self.max_grad_norm, self.trust_kl) < 0:
            raise ValueError("training.max_steps, save_steps, max_grad_norm and trust_kl must be 0 or more")
        if not self.max_retain_loss >= 0:  # refuses nan too
            raise ValueError(f"training.max_retain_loss must be above 0, or 0, not {self.max_retain_loss}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"training.warmup is a share of the steps in [0, 1), not {self.warmup}")
        if self.combine not in ("sum", "projected", "dual"):
            raise ValueError(f"training.combine must be sum, projected or dual, not {self.combine!r}")
        if not 0 < self.retain_lr < float("inf"):
            raise ValueError(f"training.retain_lr must be above 0, not {self.retain_lr}: it multiplies optimizer.lr")
        if self.compile and (self.gradient_checkpointing or self.combine != "sum"):
            raise ValueError(
                "training.compile does not go with gradient_checkpointing, nor with combine other than sum: both run "
                "backward twice through a block"
            )
        if self.combine == "dual" and self.trust_kl:
            raise ValueError("training.trust_kl measures one step, and combine=dual makes two: set one of them aside")

    @staticmethod
    def upgraded(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of an older recipe by their names of today: ``projected`` was a setting of its own."""
        if "projected" not in tree:
            return tree
        rest = {name: value for name, value in tree.items() if name != "projected"}
        if not isinstance(tree["projected"], bool):
            raise ValueError(
                f"training.projected must be true or false, not {tree['projected']!r}; today it is combine"
            )
        return {"combine": "projected", **rest} if tree["projected"] else rest

    def arguments(self, folder: str | Path, device: str = "cpu") -> TrainingArguments:
        """Return the ``TrainingArguments`` these settings mean."""
        names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            lr_scheduler_type=names[self.schedule],
            warmup_steps=self.warmup,  # a float below 1 is a share of the steps
            max_grad_norm=self.max_grad_norm,
            bf16=self.precision == "bfloat16" or (self.precision == "auto" and has_bf16(device)),
            use_cpu=device == "cpu",
            **_checkpointing(on=self.gradient_checkpointing),
            seed=self.seed,
            data_seed=self.seed,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            save_total_limit=1,
            logging_nan_inf_filter=False,  # a loss that is no number is to be seen
            logging_strategy="no",  # the log is written by a callback, a line a step
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
        )
        return one_device(arguments)


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Keep the stock trainer off further GPUs that this process sees; a launcher gives each a process of its own.

    It would put the model into ``nn.DataParallel``, whose replicas each have a part of the batch and share the hooks
    that know the whole of it, and would multiply the batch size by the number of GPUs.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # there is no public setting
    return arguments


def _checkpointing(*, on: bool) -> dict[str, Any]:
    """Return what asks for it, by the name that the installed transformers has for it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    # the reentrant kind knows no second backward pass
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}
