"""The only training loop: ``transformers.Trainer`` with a few overrides, its inner loop untouched."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from soul.attention import ShortAttention
from soul.checkpoints import WholeCheckpoints
from soul.combine import make_combination
from soul.compiled import CompiledBlocks
from soul.curvature.estimators import ESTIMATORS
from soul.curvature.passes import CurvaturePasses
from soul.curvature.picks import source_rows, text_rows
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import Item, PairSampler, UnlearnDataset, collate_items
from soul.data.pieces import pieces
from soul.data.templates import ChatTemplate
from soul.forward import unwrap
from soul.hooks import CurvatureCallback, GradientCallback, ObjectiveCallback
from soul.models import checkpointing_of, freeze_embeddings, same_config
from soul.objectives.base import Objective
from soul.optim.base import OptimizerSpec, UpdateRule
from soul.optim.groups import parameter_groups
from soul.parallel import ParallelTrainer, check_parallel
from soul.reference import Reference
from soul.steplog import LogCallback as LogCallback
from soul.stopping import Stopping, StopSpec
from soul.training import TrainingSpec
from soul.trust_region import TrustRegion
from soul.types import Example


class UnlearnTrainer(WholeCheckpoints, ParallelTrainer):
    """A ``transformers.Trainer`` that unlearns.

    It adds what the stock trainer lacks: a loss kept as sums and counts, divided once over the whole accumulation
    window (so accumulation is exact for sequences of unequal length); paired, length-bucketed batches; a reference that
    is asked before training; and a curvature pass before the steps whose update rule asks for one.

    Args:
        model: A causal language model, with or without adapters.
        args: As for the stock trainer: lengths, batches, schedule, clipping, precision of training, where it goes. What
            they say of optimizer, learning rate, weight decay and seed is not looked at: ``optimizer`` has the first
            three, and ``training.seed``, which ``dataset`` was made with, decides which examples meet.
        dataset: Forget, retain and refusals, tokenised.
        objective: The loss.
        optimizer: The update rule's hyper-parameters.
        training: The remaining settings: reference, frozen weights, trust region, bound of the retain loss, seed. What
            it says of lengths, batches and precision is not looked at.
        stop: When training ends before its steps do; never by default.

    Raises:
        ValueError: The data lack what the objective needs.

    Example:
        >>> data = make_dataset(tokenizer, forget, retain, objective, TrainingSpec())  # doctest: +SKIP
        >>> trainer = UnlearnTrainer(  # doctest: +SKIP
        ...     model, TrainingArguments("out", max_steps=20), dataset=data, objective=objective, optimizer=optimizer
        ... )
        >>> trainer.train()  # doctest: +SKIP

        ``examples/the_trainer_itself.py`` is the whole of it.
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
        stop: StopSpec | None = None,
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
        if optimizer.needs_closure:
            raise ValueError(
                f"{optimizer.name} asks for the loss again and again within a step (a closure), and a step here has "
                "one: choose another optimizer"
            )
        if missing := [view for view in objective.views if view not in dataset.views]:
            raise ValueError(
                f"{objective.name} looks at {', '.join(objective.views)}, and this dataset was made for "
                f"{', '.join(dataset.views)}, without {', '.join(missing)}: make it for this objective"
            )
        if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "the weights to be trained are fp16, in which small steps and squares of small gradients are 0: load "
                "the model in float32, or in bfloat16"
            )
        if self.trust and not dataset.encoded["retain"]:
            raise ValueError("training.trust_kl measures KL on retained answers, and no retain set is in use")
        if self.training_spec.frozen == "embeddings":
            freeze_embeddings(model)
        objective.prepare(model)
        optimizer.prepare(model)
        self.last_terms: dict[str, float] = {}
        self.term_weights: dict[str, float] = {}
        self._window: dict[str, float] = {}
        self.broken = ""  # what of this step was no finite number and is not in its losses
        spec = self.training_spec
        self.combination = make_combination(spec.combine, objective.name, optimizer, spec.retain_lr, args.world_size)
        self.stopping = Stopping(self, stop) if stop and stop.when != "never" else None
        if self.stopping:
            batches = -(-len(dataset) // (args.train_batch_size * args.world_size))
            steps = -(-batches // args.gradient_accumulation_steps)
            args.num_train_epochs = self.stopping.spec.epochs(steps, args.num_train_epochs)
        bounds = [callback for callback in (self.trust, self.stopping) if callback]
        own = [ObjectiveCallback(self), GradientCallback(self), CurvatureCallback(self), *bounds]
        with same_config(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=dataset,
                data_collator=functools.partial(collate_items, pad_id=self.pad_id),
                processing_class=dataset.template.tokenizer,
                callbacks=[*own, *callbacks],
            )
        self.remove_callback(PrinterCallback)  # it prints raw dicts; the log and the bars say the same
        self.curvature_seconds: float | None = None
        check_parallel(self, optimizer)
        self._compiled = self._make_compiled()
        self._passes = self._make_passes()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the reference what the objective will need, then train."""
        self.reference = self._build_reference()
        if self.stopping:
            self.stopping.prepare()
        with same_config(self.model):
            return super().train(*args, **kwargs)

    def _build_reference(self) -> Reference:
        epochs = int(np.ceil(self.args.num_train_epochs))
        if self.args.max_steps > 0:
            per_epoch = -(-len(self.unlearn_data) // (self.args.train_batch_size * self.args.world_size))
            epochs = -(-self.args.max_steps // -(-per_epoch // self.args.gradient_accumulation_steps)) + 1
        return self.objective.ask_reference(
            unwrap(self.model),  # type: ignore[arg-type]  # Trainer types it as possibly None
            lambda view: self.unlearn_data.rows(view, epochs),
            mode=self.training_spec.reference,
            pad_id=self.pad_id,
            autocast=self.as_in_training,
        )

    def as_in_training(self) -> contextlib.AbstractContextManager[Any]:
        """Return the precision of training steps, for what is asked before accelerate puts it into the model."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def get_train_dataloader(self) -> DataLoader[Item]:
        """Return pairs in length buckets, a function of (seed, epoch) alone."""
        process = (self.args.process_index, self.args.world_size)
        sampler = PairSampler(self.unlearn_data, self.args.train_batch_size, process=process)
        return self.own_batches(
            DataLoader(self.unlearn_data, batch_sampler=sampler, collate_fn=self.data_collator)  # type: ignore[arg-type]  # its keys are tuples
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Collect the micro-batches of a window, and count its items, of all processes, for each term of the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts: dict[str, int] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0) + (0 if "idle" in batch else count)
        counts = {name: int(value) for name, value in self.over_processes(counts).items()}
        self._window = {}
        return batches, counts

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the window's loss."""
        counted = 0.0 if "idle" in inputs else 1.0
        batch = {name: value for name, value in inputs.items() if name != "idle"}  # whose other entries are of rows
        out = self.objective(model, batch, self.reference)
        counts = num_items_in_batch or {name: term.count for name, term in out.terms.items()}
        for name, term in out.terms.items():
            share = counted * float(term.total.detach()) / max(1, counts[name])
            self._window[name] = self._window.get(name, 0.0) + share
        self.last_terms = dict(self._window)
        self.term_weights = {name: term.weight for name, term in out.terms.items()}
        if model.training and self.model is not None:
            loss = self.combination.loss(out, counts, [p for p in self.model.parameters() if p.requires_grad])
            if self.args.world_size > 1:  # gradients are averaged over processes
                loss = loss * (counted * self.args.world_size)
        else:
            loss = out.loss(counts)
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a micro-batch forward and backward; after a window's last one, finish the gradients."""
        with self._attention(), self._compiled:
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.last_terms = self.over_processes(self.last_terms)
            self.combination.finish(self.update_rule, self.args.max_grad_norm)
        return loss

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        checkpointed = any(checkpointing_of(self.model).values())
        return contextlib.nullcontext() if checkpointed else ShortAttention()

    def _make_compiled(self) -> contextlib.AbstractContextManager[Any]:
        if not self.training_spec.compile:
            return contextlib.nullcontext()
        if self.args.world_size > 1:
            raise ValueError("training.compile has been made for one process: leave it at false in several")
        if self.objective.block(unwrap(self.model)) is not None:  # type: ignore[arg-type]  # as above
            raise ValueError(
                f"training.compile: {self.objective.name} looks at what a decoder block gives, which compiled code "
                "does not show; leave it at false"
            )
        return CompiledBlocks(unwrap(self.model))  # type: ignore[arg-type]  # as above

    def over_processes(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return, by name, the sums over processes."""
        if self.args.world_size == 1 or not values:
            return dict(values)
        mine = torch.tensor(list(values.values()), dtype=torch.float64, device=self.args.device)
        total: Any = self.accelerator.reduce(mine, reduction="sum")
        return dict(zip(values, total.tolist(), strict=True))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule; a rise of the learning rate has no room in a single step, which would move nothing."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the update rule; no weight decay on biases and norms, embeddings in a group of their own."""
        if self.optimizer is None:
            target = model or self.model
            assert target is not None
            decayed = self.get_decay_parameter_names(target)
            self.optimizer = self.combination.build(
                lambda: self._rule_of(parameter_groups(target, self.rule.weight_decay, decayed), target)
            )
        return self.optimizer

    def _rule_of(self, groups: list[dict[str, Any]], model: nn.Module) -> UpdateRule:
        built = self.rule.build(groups, model)
        if not isinstance(built, UpdateRule):
            raise ValueError(
                f"the optimizer {self.rule.name} builds a {type(built).__name__}, which is no "
                "soul.optim.base.UpdateRule: derive it from that too, or name a torch optimizer's import path as "
                "optimizer.path of external"
            )
        return built

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
            numerics=self.numerics,
        )

    def refresh_curvature(self, step: int) -> None:
        """Bring the update rule the curvature due before update number ``step``, if any, and note what it cost."""
        self.curvature_seconds = None
        if self._passes is None or not self._passes.spec.due(step):
            return
        started = time.perf_counter()
        assert self.model_wrapped is not None
        identity = f"{self.rule.name} {self.rule.curvature_settings()}"
        with self._attention():
            self._passes.refresh(self.model_wrapped, self.update_rule, step, identity=identity)
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self.curvature_seconds = time.perf_counter() - started


def make_dataset(
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example],
    objective: Any,  # or a method: what has ``views``
    training: TrainingSpec,
    refusals: Sequence[str] = (),
    curvature: Sequence[Example] = (),
) -> UnlearnDataset:
    """Tokenise what ``objective``, or a method in its place, looks at; long plain text in pieces."""
    template = ChatTemplate(tokenizer, training.max_length, "training.max_length")
    cut = functools.partial(pieces, template=template)
    return UnlearnDataset(template, cut(forget), cut(retain), objective.views, refusals, training.seed, cut(curvature))
