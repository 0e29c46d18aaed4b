"""What each of two processes does in ``test_sharded.py``; a module of its own, which a spawned process imports fast."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as hf_logging

from soul import config, processes
from soul.adapters import AdapterSpec, add_adapter
from soul.console import quiet
from soul.data.sources import load_examples
from soul.evaluate import EvaluationSpec, evaluate
from soul.objectives.base import Objective
from soul.optim import _fused
from soul.optim.ekfac import EKFACSpec
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.trust_region import _move
from soul.types import Ask

STEPS = 20


class Between(TrainerCallback):
    """Notes, between the micro-batches of a step, whether the gradients so far are already cut into shards."""

    def __init__(self) -> None:
        self.sharded: list[bool] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at every gradient, by the parameters that the optimizer steps."""
        groups = kwargs["optimizer"].param_groups
        self.sharded.append(all(p.grad is not None for group in groups for p in group["params"]))


Rule = dict[str, Any]
SOPHIA: Rule = {"name": "sophia", "lr": 1e-3, "curvature": {"interval": 5, "cache": False}}
OFTEN = {"interval": 2, "cache": False}
ADAMW: Rule = {"name": "adamw", "lr": 1e-3}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run, the same in one process and in two."""

    name: str
    optimizer: Rule
    objective: Rule = dataclasses.field(default_factory=lambda: {"name": "grad_diff"})
    dtype: str = "float64"
    lora: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    ways: tuple[str, ...] = ("ddp", "fsdp2")
    batch_size: int = 3
    window: int = 2
    steps: int = STEPS
    training: Rule = dataclasses.field(default_factory=dict)


def micro_batches(rule: Rule, count: int) -> Rule:
    """Return a rule whose refreshes have so many micro-batches in each process, and the first twice as many."""
    if "curvature" not in rule:
        return rule
    return {**rule, "curvature": {**rule["curvature"], "micro_batches": count, "warm_start": 2 * count}}


def with_exact_norms(model: Any) -> Any:
    """Return a Llama in float64 whose norms are computed so too: its own compute in fp32 whatever the weights."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=norm.weight.dtype)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


def trainer_for(job: Job, place: Path, folder: Path, world: int, **more: Any) -> UnlearnTrainer:
    """Return a trainer whose steps have the same examples whatever ``world`` is."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=getattr(torch, job.dtype))
    if job.dtype == "float64":
        with_exact_norms(model)
    if job.lora:
        model = add_adapter(model, AdapterSpec(r=2, alpha=4), 0)
        if job.dtype == "float64":
            model = model.double()
    settings: dict[str, Any] = {"max_steps": job.steps, "save_steps": 0, "warmup": 0.0, "schedule": "constant"}
    settings |= {**job.training, **more}
    each = job.window // world
    training = TrainingSpec(precision=job.precision, batch_size=job.batch_size, accumulation=each, **settings)
    loss: Objective = config.component(OBJECTIVES, job.objective, "npo")
    log = LogCallback(None)
    refusals = ["I do not know.", "No idea."]
    trainer = UnlearnTrainer(
        model,
        training.arguments(folder),
        dataset=make_dataset(tokenizer, *sets(place), loss, training, refusals),
        objective=loss,
        optimizer=config.component(OPTIMIZERS, micro_batches(job.optimizer, 2 // world), "adamw"),
        training=training,
        callbacks=[log],
    )
    log.trainer = trainer
    return trainer


def sets(place: Path) -> tuple[Any, Any]:
    """Return what to forget and what to keep."""
    return load_examples(str(place / "forget.jsonl")), load_examples(str(place / "retain.jsonl"))


def run(job: Job, place: Path, folder: Path, world: int, resume: str | None = None, **more: Any) -> dict[str, Any]:
    """Train, and return the whole weights and the log."""
    trainer, between = trainer_for(job, place, folder, world, **more), Between()
    trainer.add_callback(between)
    trainer.train(resume_from_checkpoint=resume)
    log = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LogCallback))
    model = trainer.whole_model()
    assert type(model).__name__ in ("LlamaForCausalLM", "PeftModelForCausalLM")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "log": log.records, "between": between.sharded}


JOBS = (
    Job("sophia", SOPHIA, window=4),
    Job("npo", ADAMW, {"name": "npo"}),
    Job("fp32", SOPHIA, {"name": "npo", "retain": "kl"}, dtype="float32"),
    Job("fp32-adamw", ADAMW, dtype="float32", ways=("fsdp2",)),
    Job("bf16", ADAMW, {"name": "npo", "retain": "kl"}, dtype="float32", precision="bfloat16", steps=2),
    Job("lora", SOPHIA, {"name": "npo", "retain": "kl"}, lora=True, steps=6),
    *(
        Job(name, {"name": name, "lr": 0.05, "curvature": OFTEN}, ways=("ddp",), steps=3)
        for name in ("kfac", "ekfac", "whiten")
    ),
    *(
        Job(f"sophia-{name}", {**SOPHIA, "curvature": OFTEN, **setting}, ways=("fsdp2",), steps=3)
        for name, setting in (
            ("win_rate", {"win_rate": 0.5}),
            ("kl", {"clip": "kl", "kl_bound": 1e-3}),
            ("block", {"clip": "block_rms"}),
        )
    ),
    *(Job(name, {"name": name, "lr": 1e-3}, ways=("fsdp2",), steps=2) for name in ("sgd", "lion", "soul_release")),
    Job("adamw_retain", {"name": "adamw_retain", "lr": 1e-3, "curvature": OFTEN}, ways=("fsdp2",), steps=3),
    Job("trust", ADAMW, {"name": "npo"}, steps=6, training={"trust_kl": 1e-3, "max_grad_norm": 0.1}),
    Job("rmu-wmdp", ADAMW, {"name": "rmu", "compat": "wmdp"}, ways=("ddp",), steps=2),
)
ZERO_JOBS = (
    Job("zero-sophia", SOPHIA, {"name": "npo", "retain": "kl"}, dtype="float32", window=4, steps=8),
    Job("zero-adamw", ADAMW, dtype="float32", steps=8),
    Job("zero-lora", {**SOPHIA, "curvature": OFTEN, "win_rate": 0.5}, dtype="float32", lora=True, steps=6),
    Job("zero-warm", {"name": "adamw_retain", "lr": 1e-3, "curvature": OFTEN}, dtype="float32", steps=3),
    Job("zero-bf16", ADAMW, {"name": "npo"}, dtype="float32", precision="bfloat16", steps=2),
)
# One job: once ZeRO-3 is on, transformers loads the next model of the same process in parts.
ZERO3_JOBS = (Job("zero3-adamw", ADAMW, {"name": "npo", "retain": "kl"}, dtype="float32", window=4, steps=8),)
RESUMED = Job("resumed", SOPHIA, {"name": "npo"}, steps=8)
HALF = 4  # inside an epoch, and between two refreshes
ASKS = {"forget": Ask(samples=2, tokens=True), "single": Ask(samples=1, tokens=True, gradient_norm=True)}
EVALUATION = EvaluationSpec(max_new_tokens=6, generation_batch=4)


def rows_of(place: Path, folder: Path) -> dict[str, Any]:
    """Measure all that is asked on both sets."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    forget, retain = sets(place)
    splits = {"forget": forget, "retain": retain, "single": retain[:1]}  # of one, one process has nothing
    rows = evaluate(model, tokenizer, splits, spec=EVALUATION, folder=folder, asks=ASKS)
    return {name: [dict(row) for row in found] for name, found in rows.items()}


def experts(mine: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return what EK-FAC knows after two refreshes, to which this process gave the micro-batches ``mine``.

    Each of these goes through two layers of one expert, which are given the same input, and one layer of all.
    """
    torch.manual_seed(0)
    parts = [torch.nn.ModuleList([torch.nn.Linear(3, 4, bias=False) for _ in range(2)]) for _ in range(2)]
    model = torch.nn.ModuleDict({"0": parts[0], "1": parts[1], "out": torch.nn.Linear(4, 2)}).double()
    rule = EKFACSpec().build(model.parameters(), model)
    for refresh in range(2):
        for i in mine:
            generator = torch.Generator().manual_seed(10 * refresh + i)
            x, cotangent = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (3, 2))
            with rule.observing():
                model["out"](sum(layer(x) for layer in parts[i])).backward(cotangent)
            model.zero_grad()
        rule.update_curvature()
    return rule.curvature_state()


def rounded(*, shards: bool) -> dict[str, torch.Tensor]:
    """Return bf16 weights after two steps that are rounded at random, and one that a trust region shortens."""
    torch.manual_seed(0)
    start, gradient = (torch.randn(5, 301, dtype=torch.bfloat16) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,)) if shards else None
    found: dict[str, torch.Tensor] = {}
    for path in ("reference", "foreach", *(["fused"] if _fused.available() else [])):
        p, g = (x.clone() if mesh is None else distribute_tensor(x, mesh, [Shard(0)]) for x in (start, gradient))
        p = torch.nn.Parameter(p)
        rule: Any = OPTIMIZERS.get("lion")(lr=1e-3, rounding="stochastic").build([p])
        rule.path, p.grad = path, g
        for _ in range(2):
            rule.step()
        found[path] = p.detach().clone()
        with torch.no_grad():
            _move(p, g, 0.1, 7)
        found[f"{path}, shortened"] = p.detach()
    return {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in found.items()}


def work(rank: int, place: str, ways: dict[str, dict[str, str]]) -> None:
    """Be one of two processes.

    Args:
        rank: Which.
        place: Folder with model and data; results go to ``<rank>.pt``.
        ways: What accelerate's launcher puts into the environment, by configuration file.
    """
    folder = join(rank, place)
    found: dict[str, Any] = {}
    for way, environment in ways.items():
        os.environ |= environment
        for job in JOBS:
            if way in job.ways:
                found[f"{job.name}/{way}"] = run(job, folder, folder / job.name / way, 2)
        # one process left a checkpoint; and one is left for one process
        last = str(folder / f"one/checkpoint-{HALF}")
        found[f"onward/{way}"] = run(RESUMED, folder, folder / "onward" / way, 2, resume=last)
        run(dataclasses.replace(RESUMED, steps=HALF), folder, folder / "two" / way, 2, save_steps=HALF)
        found[f"refused/{way}"] = refusals(folder)
        for name in environment:
            del os.environ[name]
    found["experts"] = experts([rank])
    found["rounded"] = rounded(shards=True)
    found["rows"] = rows_of(folder, folder / "rows")
    found["main"] = processes.from_main(lambda: rank)
    try:
        processes.from_main(lambda: [][rank])
    except IndexError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    processes.end(0)


def join(rank: int, place: str, store: str = "store") -> Path:
    """Become one of two processes that know each other, and return the folder they share."""
    folder = Path(place)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # trainers collect garbage, and what was imported is none
    quiet()
    hf_logging.disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared = FileStore(str(folder / store), 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=shared)
    return folder


def work_by_zero(rank: int, place: str, stage: int, environment: dict[str, str]) -> None:
    """Be one of two processes under DeepSpeed; results go to ``zero-<stage>-<rank>.pt``."""
    folder = join(rank, place, f"zero-store-{stage}")
    os.environ |= environment
    jobs, refused = (ZERO_JOBS, REFUSED_BY_ZERO) if stage < 3 else (ZERO3_JOBS, REFUSED_BY_ZERO3)
    found: dict[str, Any] = {job.name: run(job, folder, folder / job.name, 2) for job in jobs}
    found["refused"] = refusals(folder, refused)
    torch.save(found, folder / f"zero-{stage}-{rank}.pt")
    processes.end(0)


Refused = tuple[tuple[str, Rule, dict[str, Any]], ...]
REFUSED: Refused = (
    ("kfac", {"name": "kfac"}, {}),
    ("muon", {"name": "muon"}, {}),
    ("hutchinson", {**SOPHIA, "curvature": {"estimator": "hutchinson"}}, {}),
    ("shuffled", {**SOPHIA, "curvature": {"shuffled": True}}, {}),
    ("dual", ADAMW, {"combine": "dual"}),
    ("l1", ADAMW, {"objective": {"name": "l1_sparse"}}),
)
REFUSED_BY_ZERO: Refused = (
    ("kfac", {"name": "kfac"}, {}),
    ("block", {**SOPHIA, "clip": "block_rms"}, {}),
    ("own", {**SOPHIA, "curvature": {"estimator": "objective_squared"}}, {}),
    ("twice", {**SOPHIA, "curvature": {"estimator": "hutchinson"}}, {}),
    ("trust", ADAMW, {"trust_kl": 0.1}),
    ("saves", ADAMW, {"save_steps": 2}),
)
REFUSED_BY_ZERO3: Refused = (
    ("sophia", SOPHIA, {}),
    ("kfac", {"name": "kfac"}, {}),
    ("l1", ADAMW, {"objective": {"name": "l1_sparse"}}),
)


def refusals(place: Path, of: Refused = REFUSED) -> dict[str, str]:
    """Return what is said to settings that cannot be; ``objective`` among them is none of training's."""
    said: dict[str, str] = {}
    for name, rule, settings in of:
        more = dict(settings)
        loss = more.pop("objective", {"name": "grad_diff"})
        try:
            job = Job(name, rule, loss, steps=1)
            trainer_for(job, place, place / "refused", 2, **more)  # before anything is measured
        except ValueError as error:
            said[name] = str(error)
    return said
