"""From a recipe to a run directory: measure, unlearn, measure again, keep the record."""

from __future__ import annotations

import logging
import pickle
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback

from soul import processes
from soul.adapters import add_adapter, check_adapter, check_kept
from soul.benchmarks.base import Benchmark, Rows
from soul.benchmarks.request import DeletionRequest
from soul.cautions import forget_warnings, precision_warnings
from soul.checkpoints import check_weights, last_checkpoint
from soul.data import hub
from soul.data.batches import UnlearnDataset
from soul.data.sources import check_disjoint
from soul.ended import checks_of, read_stopped, write_stopped
from soul.evaluate import measure as measure_benchmark
from soul.folderlock import alone_in
from soul.inputs import (
    ANCHORS,
    Progress,
    Request,
    anchor,
    check_origins,
    keep_forgotten,
    load_request,
    origins_of,
    search,
)
from soul.machine import free_memory, peak_memory, reset_peak_memory
from soul.methods.base import json_lines
from soul.models import load_model, save_model, without_autocast
from soul.origins import Origins, commit_of
from soul.recipe import Recipe
from soul.rundir import (
    check_folder,
    claim_folder,
    environment_warnings,
    file_digests,
    holds_results,
    measured_by,
    score_dict,
)
from soul.stopping import Stopping
from soul.stored import PART, publish, read_lines, write_json
from soul.strict import json_objects
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.truncation import training_cuts, truncation_warnings

log = logging.getLogger(__name__)


def _silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def execute(recipe: Recipe, out: Path, *, progress: Progress | None = None, evaluate_it: bool = True) -> Path:
    """Do what the recipe says and leave a run directory.

    A killed run continues with the same call: splits already measured are read back, training goes on from its last
    checkpoint, a model already saved is loaded, and a finished run returns at once.

    Args:
        recipe: What to do.
        out: The run directory.
        progress: Called with (what, done, of).
        evaluate_it: Measure before and after; otherwise only train and save. A later call may measure.

    Raises:
        ValueError: Bad data or settings, ``out`` holds another recipe's run or one on data or a model that changed
            since, or another process is at work there.
        StorageError: The disk is full or read-only; what was whole is, and the same call goes on from there.
        LostModelError: The model is lost (:mod:`soul.divergence`); the last good checkpoint is kept.
    """
    with alone_in(out):
        return _execute(recipe, out, progress or _silent, evaluate_it=evaluate_it)


def _execute(recipe: Recipe, out: Path, tick: Progress, *, evaluate_it: bool) -> Path:
    processes.from_main(lambda: check_folder(out, recipe))
    if recipe.method is not None and processes.count() > 1:
        raise ValueError(f"method {recipe.method.name} runs in one process: start soul without a launcher")
    benchmark = (recipe.benchmark or default_benchmark(recipe)) if evaluate_it else None
    kept = ["record.json", *(["scores.json"] if benchmark else [])]
    if processes.from_main(lambda: all((out / name).is_file() for name in kept)):
        processes.from_main(lambda: check_origins(recipe, out, origins_of(recipe, out)))
        return out
    reset_peak_memory()
    loaded = processes.from_main(lambda: load_request(recipe.data))
    request = processes.from_main(lambda: search(keep_forgotten(loaded, recipe), recipe.data, tick))
    reference = read_reference(recipe.reference_run) if benchmark else None
    splits = benchmark.splits() if benchmark else {}
    if recipe.benchmark is None and "kept" in splits:  # what was dropped from the retain set is not to be kept
        splits["kept"] = [e for e in splits["kept"] if (e.prompt, e.answer) not in request.dropped]
    check_disjoint(splits.get("forget", ()), request.retain, ("benchmark.forget", "data.retain"))
    tick("loading model", 0, 1)
    model, tokenizer = load_model(recipe.model)
    tick("loading model", 1, 1)
    origins = processes.from_main(lambda: origins_of(recipe, out, loaded, commit_of(model)))
    processes.from_main(lambda: check_origins(recipe, out, origins))
    if recipe.adapter is not None:
        check_adapter(model, recipe.adapter)
        adapter = recipe.adapter
        processes.from_main(lambda: check_kept(recipe.model, adapter))
    found = request
    request = processes.from_main(lambda: anchor(found, recipe, model, tokenizer, out, tick))
    done = processes.from_main((out / "model").is_dir)
    tokenised = tokenise(tokenizer, recipe, request)
    lost = training_cuts({name: [row.lost for row in rows] for name, rows in tokenised.encoded.items()})
    for line in (*lost, *forget_warnings(request.forget)) if processes.is_main() else ():
        log.warning("%s", line)  # now, and not when all is done
    dataset = None if done else tokenised
    processes.from_main(
        lambda: claim(out, recipe, request, origins)
    )  # what can be wrong with recipe and data has been found
    processes.from_main(lambda: (out / "record.json").unlink(missing_ok=True))  # of a run that was not measured
    if dataset is not None:
        rehearse(model, recipe, dataset)
        if benchmark and recipe.method and not recipe.method.changes_weights:  # a prompt does it
            benchmark.check_prompt()
    evaluate_seconds = 0.0
    rows: dict[str, Rows] = {}

    def measure(when: str) -> None:
        nonlocal evaluate_seconds
        assert benchmark is not None
        started = time.perf_counter()
        rows[when] = measure_benchmark(
            benchmark,
            model,
            tokenizer,
            splits=splits,
            spec=recipe.evaluation,
            folder=out / "rows" / when,
            progress=lambda what, d, n: tick(f"{when}, {what}", d, n),
        )
        evaluate_seconds += time.perf_counter() - started

    if benchmark:
        measure("before")
    if dataset is None:
        model = None
        free_memory()  # two at once need not fit
        model, tokenizer = load_model(recipe.model.at(out / "model"))
    else:
        with hub.no_retries():  # peft asks about an adapter's base at every checkpoint
            model = train_and_save(model, tokenizer, recipe, dataset, out, tick)
    if processes.is_main():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # only needed to resume training, which is done
    if benchmark:
        measure("after")

    def keep_record() -> None:
        if benchmark:
            scores = {when: [score_dict(s) for s in benchmark.score(found, reference)] for when, found in rows.items()}
            write_json(out / "scores.json", {"format": 1, **measured_by(benchmark), **scores})
        cut = lost + [f"{when}, {line}" for when, found in rows.items() for line in truncation_warnings(found)]
        write_record(out, recipe, request, evaluate_seconds, benchmark, cut)

    processes.from_main(keep_record)
    return out


def claim(out: Path, recipe: Recipe, request: Request, origins: Origins) -> None:
    """Take the folder for the run, and keep what it is made of and what the model is anchored by."""
    if not (holds_results(out) and (out / "recipe.yaml").is_file()):  # a sequence's later requests begin with rows
        origins.write(out)
    claim_folder(out, recipe)
    if request.stand_in and request.stand_in.samples:
        write_json(out / ANCHORS, request.stand_in.record())


def tokenise(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, request: Request) -> UnlearnDataset:
    """Tokenise what the objective, or the method in its place, looks at.

    Raises:
        ValueError: A set that the objective needs is not there, or a prompt leaves no room for its answer.
    """
    what = recipe.method or recipe.objective
    return make_dataset(
        tokenizer, request.forget, request.retain, what, recipe.training, request.refusals, request.curvature
    )


def rehearse(model: Any, recipe: Recipe, dataset: UnlearnDataset) -> None:
    """Set up what will change the model, and take it down again: what is refused then is refused before hours of work.

    The model is as it was afterwards, but for gradients that its weights will not need.

    Raises:
        ValueError: As the objective, the update rule, the training's settings or the method say.
    """
    adapted = add_adapter(model, recipe.adapter, recipe.training.seed) if recipe.adapter is not None else model
    try:
        if recipe.method is not None:
            recipe.method.check(adapted)
            return
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(adapted, dataset, recipe, Path(folder))
            if processes.count() == 1:  # in several, rules are made of what each of them holds of the model
                trainer.create_optimizer()
    finally:
        if adapted is not model:
            adapted.unload()


_UNJUDGED = f"model.unjudged{PART}"
"""Where an adapter waits until its merged weights have been measured."""


def train_and_save(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, dataset: UnlearnDataset, out: Path, tick: Progress
) -> Any:
    """Unlearn, save to ``out/model``, and return the model with any adapter merged."""
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, recipe.training.seed)
    stopping: Stopping | None = None
    if recipe.method is not None:
        model = recipe.method(model, dataset, progress=tick, log=json_lines(out / "log.jsonl"))
    else:
        model, stopping = train(model, dataset, recipe, out, tick)
        model = without_autocast(model)
    check_weights(model)
    tick("saving model", 0, 1)
    merge: Any = model.merge_and_unload if recipe.adapter is not None else lambda: model
    if recipe.adapter is None or recipe.adapter.merge:
        model = merge()
        _measure_again(model, stopping, recipe, out)
        processes.from_main(lambda: save_model(model, tokenizer, out / "model"))
    else:
        base, kept = (recipe.model.path, commit_of(model) or recipe.model.revision), out / _UNJUDGED
        processes.from_main(lambda: save_model(model, tokenizer, kept, *base))
        model = merge()  # as whoever loads it does
        _measure_again(model, stopping, recipe, out)
        processes.from_main(lambda: publish(kept, out / "model"))  # with it a run has trained and judged
    tick("saving model", 1, 1)
    return model


def _measure_again(model: Any, stopping: Stopping | None, recipe: Recipe, out: Path) -> None:
    """Have a rule say of merged weights how training ended, where merging rounds: these have to have forgotten."""
    rounds = recipe.model.dtype != "float32" or recipe.model.quantize != "none"
    if stopping and recipe.adapter is not None and rounds:
        stopping.measure_again(model)
        write_stopped(stopping, out)


def train(
    model: Any,
    dataset: UnlearnDataset,
    recipe: Recipe,
    out: Path,
    tick: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, Stopping | None]:
    """Train, resuming from the last whole checkpoint in ``out/checkpoints`` if there is one.

    Returns:
        The whole model, and the rule that could end its training, if there was one.
    """
    steps = LogCallback(out / "log.jsonl", lambda step, of, _: tick("training", step, of))
    trainer = make_trainer(model, dataset, recipe, out, [steps, *callbacks])
    steps.trainer = trainer
    checkpoint = processes.from_main(lambda: last_checkpoint(out / "checkpoints"))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, SafetensorError, EOFError) as error:  # what is not tensors alone is not unpickled
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} was altered and cannot be gone on from ({reason:.200}): delete that folder, and training "
            "goes on from the one before, or begins again"
        ) from error
    if trainer.stopping:
        write_stopped(trainer.stopping, out)
    return trainer.whole_model(), trainer.stopping


def make_trainer(
    model: Any, dataset: UnlearnDataset, recipe: Recipe, out: Path, callbacks: Sequence[TrainerCallback] = ()
) -> UnlearnTrainer:
    """Return the trainer that a recipe means."""
    device = next(model.parameters()).device.type
    return UnlearnTrainer(
        model,
        recipe.training.arguments(out / "checkpoints", device),
        dataset=dataset,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        training=recipe.training,
        stop=recipe.stop,
        callbacks=callbacks,
    )


def default_benchmark(recipe: Recipe) -> Benchmark | None:
    """Judge on the forget set, some of the retain set, general facts and plain text.

    Built-in sources are no part of what is kept where there are others: what is someone's own is what was asked about.
    """
    forget, retain = recipe.data.forget_sources, recipe.data.retain_sources
    if not forget:
        return None
    kept = [source for source in retain if not source.startswith("general:")] or retain or ["general:heldout_chat"]
    return DeletionRequest(_one_or_all(forget), _one_or_all(kept))


def _one_or_all(sources: list[str]) -> str | list[str]:
    return sources[0] if len(sources) == 1 else sources


def warnings_of(recipe: Recipe, request: Request, benchmark: Benchmark | None) -> list[str]:
    """Say what a reader of the record should know."""
    found = [request.overlaps.summary(), request.stand_in.summary() if request.stand_in else ""]
    found += forget_warnings(request.forget)
    found += [f"not measured: {part} ({reason})" for part, reason in (benchmark.missing() if benchmark else {}).items()]
    return [*precision_warnings(recipe), *filter(None, found), *(recipe.method.warnings() if recipe.method else [])]


def read_reference(path: str) -> Rows | None:
    """Return the rows of a finished run's model, for metrics that need a retained model."""
    if not path:
        return None
    folder = Path(path) / "rows/after"
    if not folder.is_dir():
        raise ValueError(f"reference_run {path!r} has no rows/after: give the run directory of an evaluated model")
    rows: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        rows[file.stem] = [row for _, row in json_objects(file, lenient=True)]
    return rows


def write_record(
    out: Path,
    recipe: Recipe,
    request: Request,
    evaluate_seconds: float,
    benchmark: Benchmark | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write ``record.json``, last of all, which marks the run as finished; ``warnings`` come from what was measured."""
    subjects = list(dict.fromkeys(e.subject for e in request.forget if e.subject))
    about = f" about {' and '.join(subjects)}" if 0 < len(subjects) <= 4 else ""
    asked = f"Forget {len(request.forget)} items{about}." if request.forget else f"Learn {len(request.retain)} items."
    steps = read_lines(out / "log.jsonl")
    done = recipe.method.name if recipe.method else f"{recipe.objective.name} + {recipe.optimizer.name}"
    record = {
        "format": 1,
        "label": recipe.label or done,
        "asked": asked,
        **({"method": recipe.method.name} if recipe.method else {}),
        **({} if recipe.method else {"objective": recipe.objective.name, "optimizer": recipe.optimizer.name}),
        "model": recipe.model.path,
        "steps": max((int(step["step"]) for step in steps), default=0),  # step 0 is what came before the first
        "seconds": {
            "train": round(sum(step["seconds"] for step in steps), 2),  # of all sittings of a resumed run
            "evaluate": round(evaluate_seconds, 2),  # of the last one
        },
        "peak_memory_bytes": peak_memory(),
        **read_stopped(out),
        "warnings": [*warnings_of(recipe, request, benchmark), *warnings, *environment_warnings(out)],
        **({"overlap": request.overlaps.record()} if request.overlaps.action != "ignore" else {}),
        **({"stood_in": request.stand_in.sources()} if request.stand_in else {}),
        "checks": checks_of(out, recipe.stop),
        "files": file_digests(out),
        "n_forget": len(request.forget),
        "n_retain": len(request.retain),
    }
    write_json(out / "record.json", record)
