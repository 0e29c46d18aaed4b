"""The only training loop: ``transformers.Trainer`` with a few overrides, its inner loop untouched."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from soul.curvature.estimators import ESTIMATORS
from soul.curvature.passes import CurvaturePasses
from soul.curvature.picks import source_rows, text_rows
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import Item, PairSampler, UnlearnDataset, collate_items
from soul.data.templates import ChatTemplate
from soul.forward import unwrap
from soul.machine import has_bf16
from soul.methods.base import Method
from soul.models import freeze_embeddings
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec, UpdateRule
from soul.optim.groups import parameter_groups
from soul.reference import Reference, build_reference
from soul.trust_region import TrustRegion
from soul.types import Example, LossOut, LostModelError


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How long, how fast and in what precision to train.

    Attributes:
        batch_size: Forget/retain pairs in a micro-batch.
        accumulation: Micro-batches in a step; ``b x a`` gives the gradient of a batch of ``b * a``.
        epochs: Walks through the forget set (the retain set for ``ft``).
        max_steps: Stop after this many steps; 0 leaves it to ``epochs``.
        warmup: Share of the steps with rising learning rate.
        schedule: Learning-rate schedule after warm-up.
        max_grad_norm: Gradient clipping; 0 turns it off.
        precision: ``auto`` is bf16 autocast where the hardware has it; ``float32`` turns it off.
        seed: Seed of pairing, refusals and curvature noise.
        max_length: Longest sequence in tokens.
        save_steps: Steps between checkpoints; 0 saves none.
        reference: How KL gets its reference: ``cache``, ``adapter_off`` or ``copy``.
        trust_kl: Largest KL (nats a token, on retained answers) of a step; a larger one is shrunk. 0 for no bound.
        trust_batch: Retained examples it is measured on.
        frozen: ``embeddings`` leaves input embeddings and language-model head as they are, for every optimizer alike.
        projected: Take the part along the retain gradient out of the forget gradient, ``f - (f.r / r.r) r``, before the
            two are added: a control that protects one direction where curvature protects all. A backward pass more.
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
    projected: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "epochs", "max_length", "trust_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be 1 or more, not {getattr(self, name)}")
        if min(self.max_steps, self.save_steps, self.max_grad_norm, self.trust_kl) < 0:
            raise ValueError("training.max_steps, save_steps, max_grad_norm and trust_kl must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"training.warmup is a share of the steps in [0, 1), not {self.warmup}")

    def arguments(self, folder: str | Path, device: str = "cpu") -> TrainingArguments:
        """Return the ``TrainingArguments`` these settings mean."""
        names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
        return TrainingArguments(
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
            seed=self.seed,
            data_seed=self.seed,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            save_total_limit=1,
            logging_strategy="no",  # the log is written by a callback, a line a step
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
        )


class UnlearnTrainer(Trainer):
    """A ``transformers.Trainer`` that unlearns.

    It adds what the stock trainer lacks: a loss kept as sums and counts, divided once over the whole accumulation
    window (so accumulation is exact for sequences of unequal length); paired, length-bucketed batches; a reference that
    is asked before training; and a curvature pass before the steps whose update rule asks for one.

    Args:
        model: A causal language model, with or without adapters.
        args: As for the stock trainer.
        dataset: Forget, retain and refusals, tokenised.
        objective: The loss.
        optimizer: The update rule's hyper-parameters.
        training: The remaining settings (reference mode, curvature pass).

    Raises:
        ValueError: The data lack what the objective needs.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        dataset: UnlearnDataset,
        objective: Objective,
        optimizer: OptimizerSpec,
        training: TrainingSpec | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.objective, self.rule, self.training_spec = objective, optimizer, training or TrainingSpec()
        self.curvature: CurvatureSpec | None = (
            getattr(optimizer, "curvature", None) if optimizer.needs_curvature else None
        )
        self.unlearn_data = dataset
        self.pad_id = dataset.template.pad
        self.reference = Reference()
        budget, rows = self.training_spec.trust_kl, self.training_spec.trust_batch
        self.trust = TrustRegion(self, budget, rows) if budget else None
        if self.trust and not dataset.encoded["retain"]:
            raise ValueError("training.trust_kl measures KL on retained answers, and no retain set is in use")
        if self.training_spec.frozen == "embeddings":
            freeze_embeddings(model)
        self.last_terms: dict[str, float] = {}
        self._window: dict[str, float] = {}
        self._retain_gradient: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=functools.partial(collate_items, pad_id=self.pad_id),
            processing_class=dataset.template.tokenizer,
            callbacks=[_CurvatureCallback(self), *([self.trust] if self.trust else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints raw dicts; the log and the bars say the same
        self.curvature_seconds: float | None = None
        self._passes = self._make_passes()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the reference what the objective will need, then train."""
        self.reference = self._build_reference()
        return super().train(*args, **kwargs)

    def _build_reference(self) -> Reference:
        epochs = int(np.ceil(self.args.num_train_epochs))
        if self.args.max_steps > 0:
            per_epoch = -(-len(self.unlearn_data) // self.args.train_batch_size)
            epochs = -(-self.args.max_steps * self.args.gradient_accumulation_steps // per_epoch) + 1
        logps = [row for view in self.objective.needs_logps for row in self.unlearn_data.rows(view, epochs)]
        full = [row for view in self.objective.needs_distributions for row in self.unlearn_data.rows(view, epochs)]
        if not logps and not full:
            return Reference()
        return build_reference(
            unwrap(self.model),  # type: ignore[arg-type]  # Trainer types it as possibly None
            logps=logps,
            distributions=full,
            mode=self.training_spec.reference,
            pad_id=self.pad_id,
            autocast=self.compute_loss_context_manager,
        )

    def get_train_dataloader(self) -> DataLoader[Item]:
        """Return pairs in length buckets, a function of (seed, epoch) alone."""
        sampler = PairSampler(self.unlearn_data, self.args.train_batch_size)
        loader = DataLoader(self.unlearn_data, batch_sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Collect the micro-batches of a window, and count its items for each term of the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts: dict[str, int] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        if self.args.world_size > 1 and counts:
            total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=device), reduction="sum")
            # DDP averages gradients over ranks: dividing by the mean count makes that the gradient of the whole window.
            counts = {k: v / self.args.world_size for k, v in zip(counts, total.tolist(), strict=True)}  # type: ignore[misc]
        self._window = {}
        return batches, counts

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the window's loss."""
        out = self.objective(model, inputs, self.reference)
        counts = num_items_in_batch or {name: term.count for name, term in out.terms.items()}
        for name, term in out.terms.items():
            share = float(term.total.detach()) / max(1, counts[name])
            self._window[name] = self._window.get(name, 0.0) + share
        self.last_terms = dict(self._window)
        loss = out.loss(counts)
        if self.training_spec.projected and model.training:
            self._keep_retain_gradient(out, counts)
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a micro-batch forward and backward; after a window's last one, project where that is asked for."""
        loss = super().training_step(*args, **kwargs)
        if self.training_spec.projected and self.accelerator.sync_gradients:
            self._project()
        return loss

    def _keep_retain_gradient(self, out: LossOut, counts: dict[str, int]) -> None:
        """Add up the gradient of the retain term over the window, apart from the rest."""
        term = out.terms.get("retain")
        if term is None or not term.weight:
            raise ValueError(f"training.projected needs a retain term, and {self.objective.name} as set has none")
        assert self.model is not None
        params = [p for p in self.model.parameters() if p.requires_grad]
        loss = term.weight * term.total / max(1, counts["retain"])
        for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), strict=True):
            if g is not None:
                self._retain_gradient[p] = self._retain_gradient[p].add_(g) if p in self._retain_gradient else g

    @torch.no_grad()
    def _project(self) -> None:
        """Replace each gradient ``r + f`` by ``r + f - (f.r / r.r) r``, products over all parameters."""
        kept, self._retain_gradient = self._retain_gradient, {}
        pairs = [(p.grad, r) for p, r in kept.items() if p.grad is not None]
        along = sum(float(((g - r) * r).sum()) for g, r in pairs)
        length = sum(float(r.square().sum()) for _, r in pairs)
        for g, r in pairs if length > 0 else ():
            g.sub_(r, alpha=along / length)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the update rule; no weight decay on biases and norms, embeddings in a group of their own."""
        if self.optimizer is None:
            target = model or self.model
            assert target is not None
            decayed = self.get_decay_parameter_names(target)
            self.optimizer = self.rule.build(parameter_groups(target, self.rule.weight_decay, decayed), target)
        return self.optimizer

    @property
    def update_rule(self) -> UpdateRule:
        """The update rule inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]

    def _make_passes(self) -> CurvaturePasses | None:
        spec = self.curvature
        if spec is None or not ESTIMATORS[spec.estimator].needs_pass:
            return None
        return CurvaturePasses(
            spec,
            source_rows(self.unlearn_data, spec.source),
            text_rows(self.unlearn_data) if spec.general_text else (),
            seed=self.training_spec.seed,
            pad_id=self.pad_id,
            autocast=self.compute_loss_context_manager,
            numerics=str(self.accelerator.mixed_precision),
        )

    def refresh_curvature(self, step: int) -> None:
        """Bring the update rule the curvature due before update number ``step``, if any, and note what it cost."""
        self.curvature_seconds = None
        if self._passes is None or not self._passes.spec.due(step):
            return
        started = time.perf_counter()
        assert self.model_wrapped is not None
        identity = f"{self.rule.name} {self.rule.curvature_settings()}"
        self._passes.refresh(self.model_wrapped, self.update_rule, step, identity=identity)
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self.curvature_seconds = time.perf_counter() - started


class _CurvatureCallback(TrainerCallback):
    """Brings the curvature the rule asks for: before a step's first micro-batch, while gradients are empty.

    An estimator that makes no passes is given the gradient that the step is about to take, clipped as it is.
    """

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        self.trainer.refresh_curvature(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        spec = self.trainer.curvature
        if spec is not None and not ESTIMATORS[spec.estimator].needs_pass:
            self.trainer.update_rule.update_curvature()


class LogCallback(TrainerCallback):
    """Writes one JSON line a step: loss terms, learning rate, seconds, and what the rule reports.

    ``seconds`` holds all of a step; ``curvature_seconds`` is there where a curvature pass came before it, and is its
    share.

    Args:
        path: File to write; lines of steps that a resumed run repeats are dropped.
        progress: Called with (step, total steps, record) after each step.
    """

    def __init__(self, path: Path | None, progress: Any = None) -> None:
        self.path, self.progress = path, progress
        self.records: list[dict[str, float]] = []
        self.trainer: UnlearnTrainer | None = None
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave what was done since the last step out of the next one's seconds."""
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Read back the lines of the steps a resumed run has behind it."""
        if self.path is not None and self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            self.records = [r for r in lines if r["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - as above
        """Write the step's line, and stop a run whose loss is no longer a number."""
        assert self.trainer is not None
        now = time.perf_counter()
        terms = self.trainer.last_terms
        weight = self.trainer.objective.retain_weight
        record: dict[str, float] = {"step": state.global_step, **terms}
        record["loss"] = terms.get("forget", 0.0) + weight * terms.get("retain", 0.0)
        record.update(self.trainer.update_rule.metrics())
        if self.trainer.trust:
            record.update(self.trainer.trust.last)
        record["learning_rate"] = self.trainer.update_rule.param_groups[0]["lr"]
        record["seconds"] = round(now - self._started, 4)
        if self.trainer.curvature_seconds is not None:
            record["curvature_seconds"] = round(self.trainer.curvature_seconds, 4)
        self._started = now
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a") as log:
                log.write(json.dumps(record) + "\n")
        if not np.isfinite(record["loss"]):
            raise LostModelError(
                f"the loss is {record['loss']} at step {state.global_step}: the model is lost; lower optimizer.lr "
                f"(now {self.trainer.rule.lr}) or raise objective.retain_weight"
            )
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, record)


def make_dataset(
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example],
    objective: Objective | Method,
    training: TrainingSpec,
    refusals: Sequence[str] = (),
    curvature: Sequence[Example] = (),
) -> UnlearnDataset:
    """Tokenise what ``objective``, or a method in its place, looks at."""
    template = ChatTemplate(tokenizer, training.max_length)
    return UnlearnDataset(template, forget, retain, objective.views, refusals, training.seed, curvature)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Silence transformers' notices that a person of this command line cannot act on."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    return contextlib.nullcontext()
