"""Three ways to do the same job: this library's, the one of SOUL's released code, and a plain one done well."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from _machine import Clock, Matrices, Now, Step, Work, autocast
from soul.console import quiet
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate, Encoded
from soul.evaluate import EvaluationSpec, evaluate
from soul.models import ModelSpec, load_model
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.run import peak_memory, reset_peak_memory
from soul.trainer import UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.types import Example

IGNORED = -100
PADDED_TO = 512
BATCH_OF_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Job:
    """What every path does: GradDiff with retain weight 1, then seven likelihoods and an answer an example.

    Attributes:
        model: As for :class:`soul.models.ModelSpec`.
        forget: What to forget.
        retain: As many examples to keep; all paths see the same pairs of both, not in the same order.
        judged: Examples with a paraphrase and wrong answers.
        batch: Pairs in a step.
        steps: Timed steps; one more goes before them.
        asked: How many of ``judged`` are answered.
        new_tokens: Longest answer.
        slow_steps: Timed steps of the released way.
        slow_judged: How many of ``judged`` the released way measures and answers.
        threads: Threads that compute; 0 leaves it to torch.
        processor_time: Count processor time, not the wall clock's; sensible with one thread.
    """

    model: str
    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    judged: tuple[Example, ...]
    batch: int = 4
    steps: int = 10
    asked: int = 16
    new_tokens: int = 40
    slow_steps: int = 1
    slow_judged: int = 2
    threads: int = 0
    processor_time: bool = False

    @property
    def now(self) -> Now:
        """The clock."""
        return time.process_time if self.processor_time else time.perf_counter


@dataclasses.dataclass
class Measured:
    """What one path did in one process.

    Attributes:
        steps: The timed training steps.
        likelihoods: The evaluation of likelihoods, all examples together.
        generation: The answering; its ``tokens`` are the generated ones.
        judged: Examples behind ``likelihoods``.
        nll: Mean negative log-likelihood of the true answers of the examples that all paths measure: a check that all
            compute the same thing.
        train_peak: Peak memory of training in bytes.
        evaluate_peak: Peak memory of evaluation in bytes.
        matrices: The model's weights that take part in matrix products.
    """

    matrices: Matrices
    steps: list[Step] = dataclasses.field(default_factory=list)
    likelihoods: Step = dataclasses.field(default_factory=Step)
    generation: Step = dataclasses.field(default_factory=Step)
    judged: int = 0
    nll: float = float("nan")
    train_peak: int = 0
    evaluate_peak: int = 0


class Way(abc.ABC):
    """One way to do the job.

    Args:
        job: The job.
        whole: Evaluate too; otherwise only train.
    """

    title: ClassVar[str]
    evaluates: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    weights: ClassVar[Literal["float32", "bfloat16"]] = "float32"
    evaluated_in: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"

    def __init__(self, job: Job) -> None:
        quiet()
        if job.threads:
            torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.job = job
        self.model: Any
        self.model, self.tokenizer = load_model(ModelSpec(job.model, dtype=self.weights, device="cpu"))
        self.template = ChatTemplate(self.tokenizer)
        self.clock = Clock(Work(self.model), job.now)
        self.done = Measured(Matrices.of(self.model))

    @abc.abstractmethod
    def train(self) -> list[Step]:
        """Make the job's steps, and one before them that is not returned."""

    @abc.abstractmethod
    def likelihoods(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return the mean NLL of each example's answer, paraphrase and wrong answers."""

    @abc.abstractmethod
    def answer(self, examples: Sequence[Example]) -> None:
        """Generate greedy answers through ``self.model.generate``."""

    def judged(self) -> Sequence[Example]:
        """Return the examples whose likelihoods are measured."""
        return self.job.judged

    def asked(self) -> Sequence[Example]:
        """Return the examples that are answered."""
        return self.job.judged[: self.job.asked]

    def measure(self) -> Measured:
        """Do the job once."""
        if self.evaluates:
            reset_peak_memory()
            self.model.eval()
            self._measure_likelihoods(self.judged())
            self._measure_answers(self.asked())
            self.done.evaluate_peak = peak_memory()
        if not self.trains:
            return self.done
        self.model.train()
        reset_peak_memory()
        self.done.steps = self.train()
        self.done.train_peak = peak_memory()
        return self.done

    def _measure_likelihoods(self, examples: Sequence[Example]) -> None:
        rows = [self.rows_of(e) for e in examples]
        self.likelihoods(examples[:1])
        self.clock.restart()
        nll = self.likelihoods(examples)
        step = self.clock.lap()
        step.answers = sum(row.answer_length for group in rows for row in group)
        step.tokens = sum(group[0].answer_start for group in rows) + step.answers  # each prompt needs reading once
        self.done.likelihoods, self.done.judged = step, len(examples)
        common = nll[: self.job.slow_judged]
        self.done.nll = sum(of[0] for of in common) / len(common)

    def _measure_answers(self, examples: Sequence[Example]) -> None:
        real, generated = self.model.generate, 0

        def counted(**settings: Any) -> torch.Tensor:
            nonlocal generated
            out = real(**settings)
            for tokens in out[:, settings["input_ids"].shape[1] :].tolist():
                end = self.template.end_of_turn
                generated += tokens.index(end) + 1 if end in tokens else len(tokens)
            return out

        self.model.generate = counted
        self.clock.restart()
        self.answer(examples)
        self.done.generation = self.clock.lap()
        self.done.generation.tokens = generated
        del self.model.generate  # the instance's, not the class's

    def rows_of(self, example: Example) -> list[Encoded]:
        """Return the tokens of an example with each of its answers."""
        answers = [example.answer, example.paraphrased_answer or example.answer, *example.wrong_answers]
        return [self.template.encode(example, answer=answer) for answer in answers]


class TimedTrainer(UnlearnTrainer):
    """The library's trainer with a clock in it."""

    clock: Clock

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.step.tokens += int(inputs["attention_mask"].sum())
        self.clock.step.answers += int(inputs["answer_mask"].sum())
        with self.clock.part("forward"):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def refresh_curvature(self, step: int) -> None:
        with self.clock.part("curvature"):
            super().refresh_curvature(step)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        optimizer.step = self.clock.timed("optimizer", optimizer.step)
        self.accelerator.backward = self.clock.timed("backward", self.accelerator.backward)
        self.accelerator.clip_grad_norm_ = self.clock.timed("clipping", self.accelerator.clip_grad_norm_)
        return optimizer


class Laps(TrainerCallback):
    """Ends the clock's step where the trainer's ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[Step] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the hook's shape
        self.steps.append(self.clock.lap())


class Soul(Way):
    """This library as a person gets it: its trainer with Sophia, a curvature pass every ten steps; its evaluation."""

    title = "soul, Sophia"
    optimizer: ClassVar[str] = "sophia"
    evaluated_in = "float32"

    def train(self) -> list[Step]:
        """Train with :class:`soul.UnlearnTrainer`."""
        job, objective = self.job, OBJECTIVES.get("grad_diff")()
        training = TrainingSpec(batch_size=job.batch, max_steps=job.steps + 1, save_steps=0)
        dataset = make_dataset(self.tokenizer, job.forget, job.retain, objective, training, [])
        laps = Laps(self.clock)
        with tempfile.TemporaryDirectory() as folder:
            trainer = TimedTrainer(
                self.model,
                training.arguments(folder),
                dataset=dataset,
                objective=objective,
                optimizer=OPTIMIZERS.get(self.optimizer)(),
                training=training,
                callbacks=[laps],
            )
            trainer.clock = self.clock
            self.clock.restart()
            trainer.train()
        return laps.steps[1:]

    def likelihoods(self, examples: Sequence[Example]) -> list[list[float]]:
        """Measure with :func:`soul.evaluate.evaluate`."""
        spec = EvaluationSpec(generate=False)
        rows = evaluate(self.model, self.tokenizer, {"judged": examples}, spec=spec)["judged"]
        return [[row["nll"], row.get("paraphrased_nll", row["nll"]), *row.get("wrong_nll", [])] for row in rows]

    def answer(self, examples: Sequence[Example]) -> None:
        """Answer with :func:`soul.evaluate.generate`, which ``evaluate`` calls."""
        from soul.evaluate import generate

        prompts = [self.template.prompt_ids(e) for e in examples]
        generate(self.model, self.template, prompts, EvaluationSpec(max_new_tokens=self.job.new_tokens))


class SoulAdamW(Soul):
    """The same with AdamW, to compare with the plain way."""

    title = "soul, AdamW"
    optimizer = "adamw"
    evaluates = False


class SoulBf16(Soul):
    """Its evaluation of a model in bf16 (``model.dtype: bfloat16``), as public evaluations run."""

    title = "soul, bf16 weights"
    weights = evaluated_in = "bfloat16"
    trains = False


def pairs(way: Way) -> Iterator[tuple[list[Encoded], list[Encoded]]]:
    """Yield shuffled batches of (forget, retain), epoch after epoch."""
    order = random.Random(0)
    forget = [way.template.encode(e) for e in way.job.forget]
    retain = [way.template.encode(e) for e in way.job.retain]
    while True:
        order.shuffle(forget)
        order.shuffle(retain)
        for i in range(0, len(forget) - way.job.batch + 1, way.job.batch):
            yield forget[i : i + way.job.batch], retain[i : i + way.job.batch]


def labelled(rows: Sequence[Encoded], pad_id: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Pad to the longest row or to ``width``, with labels as transformers' own losses take them."""
    batch = collate_rows(rows, pad_id=pad_id)
    short = max(0, (width or 0) - batch["input_ids"].shape[1])
    labels = batch["input_ids"].masked_fill(~batch["answer_mask"], IGNORED)
    fills = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    kept = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return {name: nn.functional.pad(value, (0, short), value=fills[name]) for name, value in kept.items()}


def two_forwards(way: Way, optimizer: torch.optim.Optimizer, steps: int, width: int | None = None) -> list[Step]:
    """Train by ``-loss(forget) + loss(retain)``, each from a forward pass of its own with transformers' loss."""
    batches, made = pairs(way), []
    way.clock.restart()
    for _ in range(steps + 1):
        forget, retain = next(batches)
        way.clock.step.tokens = sum(map(len, (*forget, *retain)))
        way.clock.step.answers = sum(row.answer_length for row in (*forget, *retain))
        with way.clock.part("forward"), autocast():
            ascended = way.model(**labelled(forget, way.template.pad, width), use_cache=False).loss
            descended = way.model(**labelled(retain, way.template.pad, width), use_cache=False).loss
            loss = descended - ascended
        with way.clock.part("backward"):
            loss.backward()
        with way.clock.part("clipping"):
            nn.utils.clip_grad_norm_(way.model.parameters(), 1.0)
        with way.clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        made.append(way.clock.lap())
    return made[1:]


class Plain(Way):
    """What a careful person writes with transformers and torch alone.

    fp32 weights under bf16 autocast; rows padded to the longest of their batch; a forward pass each for forget and
    retain with the model's own loss over all logits; torch's fused AdamW. Evaluation in batches of 32 rows in the order
    given, all logits; answers in batches of 32 prompts.
    """

    title = "(b) plain, AdamW"

    def train(self) -> list[Step]:
        """Train with a bare loop."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        return two_forwards(self, optimizer, self.job.steps)

    @torch.no_grad()
    def likelihoods(self, examples: Sequence[Example]) -> list[list[float]]:
        """Measure in batches."""
        groups = [self.rows_of(e) for e in examples]
        rows = [row for group in groups for row in group]
        nll: list[float] = []
        for i in range(0, len(rows), BATCH_OF_ROWS):
            batch = labelled(rows[i : i + BATCH_OF_ROWS], self.template.pad)
            with autocast() if self.weights == "float32" else contextlib.nullcontext():
                logits = self.model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits
            nll += row_means(logits, batch["labels"])
        values = iter(nll)
        return [[next(values) for _ in group] for group in groups]

    @torch.no_grad()
    def answer(self, examples: Sequence[Example]) -> None:
        """Answer in batches, padded on the left."""
        self.tokenizer.padding_side = "left"
        prompts = [self.template.prompt_ids(e) for e in examples]
        for i in range(0, len(prompts), BATCH_OF_ROWS):
            batch: Any = self.tokenizer.pad({"input_ids": prompts[i : i + BATCH_OF_ROWS]}, return_tensors="pt")
            greedy(self, batch["input_ids"], batch["attention_mask"])


class PlainBf16(Plain):
    """The same evaluation of a model in bf16."""

    title = "(c) plain, bf16 weights"
    weights = "bfloat16"
    trains = False


def row_means(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Return the mean NLL of each row's answer from all logits."""
    targets = labels[:, 1:]
    nll = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    return (nll.sum(1) / (targets != IGNORED).sum(1)).tolist()


def greedy(way: Way, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Generate greedily up to the end of the turn."""
    way.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=way.job.new_tokens,
        do_sample=False,
        eos_token_id=way.template.end_of_turn,
        pad_token_id=way.template.pad,
    )


class ReleasedSophiaG(torch.optim.Optimizer):
    """SOUL's optimizer as its released code computes it: one eager operation after another, state like the weights.

    The arithmetic is :class:`soul.optim.SoulRelease`'s, which keeps its state in fp32 and sweeps memory once.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 5e-6, "betas": (0.9, 0.95), "rho": 0.04, "bs": 5120, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refresh the squared gradient, then make the update, as two passes over all parameters."""
        assert closure is None
        todo = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p, g in todo:
            state, (b1, b2) = self.state[p], group["betas"]
            if not state:
                state["exp_avg"], state["hessian"] = torch.zeros_like(p), torch.zeros_like(p)
            state["hessian"].mul_(b2).addcmul_(g, g, value=1 - b2)
            state["exp_avg"].mul_(b1).add_(g, alpha=1 - b1)
        for group, p, g in todo:
            state, b1 = self.state[p], group["betas"][0]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            state["exp_avg"].mul_(b1).add_(g, alpha=1 - b1)
            ratio = (state["exp_avg"].abs() / (group["rho"] * group["bs"] * state["hessian"] + 1e-15)).clamp(None, 1)
            p.addcmul_(state["exp_avg"].sign(), ratio, value=-group["lr"])


class Released(Way):
    """The usual way of SOUL's released code (OPTML-Group/SOUL 30f7a41), rebuilt from its description.

    bf16 weights without a master copy; every row padded to 512 tokens; two forward passes a step, all logits; its
    optimizer as released. Likelihoods and answers one at a time, all logits.
    """

    title = "(a) released, SophiaG"
    weights = "bfloat16"

    def train(self) -> list[Step]:
        """Train with a bare loop."""
        return two_forwards(self, ReleasedSophiaG(self.model.parameters()), self.job.slow_steps, PADDED_TO)

    def judged(self) -> Sequence[Example]:
        """Return the first few examples."""
        return self.job.judged[: self.job.slow_judged]

    asked = judged

    @torch.no_grad()
    def likelihoods(self, examples: Sequence[Example]) -> list[list[float]]:
        """Measure one answer after another."""

        def one(row: Encoded) -> float:
            batch = labelled([row], self.template.pad)
            return row_means(self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])[0]

        return [[one(row) for row in self.rows_of(e)] for e in examples]

    @torch.no_grad()
    def answer(self, examples: Sequence[Example]) -> None:
        """Answer one question after another."""
        for example in examples:
            ids = torch.tensor([self.template.prompt_ids(example)])
            greedy(self, ids, torch.ones_like(ids))


WAYS: tuple[type[Way], ...] = (Soul, SoulAdamW, SoulBf16, Plain, PlainBf16, Released)
