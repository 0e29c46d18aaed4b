"""Running lm-eval's tasks on a model that is loaded already, and its samples as rows."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from soul.data import hub
from soul.data.tasks import local_splits
from soul.data.templates import SWITCHES, without_thought
from soul.truncation import mark
from soul.types import Row

INSTALL = "lm-eval is not installed: pip install lm-eval"
_FOLDERS = {
    "arc": "arc",
    "lambada": "lambada",
    "mmlu": "mmlu/default",
    "piqa": "piqa",
    "wikitext": "wikitext",
    "wmdp": "wmdp",
}
"""First word of a task's name -> lm-eval's folder that defines it; other names are looked for in all folders."""
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Harness:
    """lm-eval's task definitions, with the data of a local folder in place of the hub's where that folder has it.

    A task with local data becomes a definition of its own that includes lm-eval's and changes nothing but the source of
    its rows. Definitions and converted rows live in a temporary folder for as long as the context is open.

    Args:
        names: Tasks, tags and groups that will be asked for.
        include_path: Folder of further task definitions, as lm-eval's ``--include_path``.
        data: Folder of local copies, see :func:`soul.data.tasks.local_splits`; empty for none.
    """

    def __init__(self, names: Sequence[str], include_path: str = "", data: str = "") -> None:
        for what, folder in (("include_path", include_path), ("data", data)):
            if folder and not Path(folder).expanduser().is_dir():
                raise ValueError(f"{what}: there is no folder {folder!r}")
        self.data = Path(data).expanduser() if data else None
        self._manager = _manager(include_path, frozenset(_FOLDERS).intersection(n.partition("_")[0] for n in names))
        if any(name not in self._manager.task_index for name in names):
            self._manager = _manager(include_path, None)
        self._index: Mapping[str, Any] = self._manager.task_index

    def leaves(self, name: str) -> list[str]:
        """Return the tasks that a task, tag or group of lm-eval stands for.

        Raises:
            ValueError: There is none of that name, or a group defines its tasks where only lm-eval can read them.
        """
        entry = self._index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._index, n=1)
            raise ValueError(
                f"lm-eval has no task {name!r}." + (f" Did you mean {near[0]!r}?" if near else "") + " Its own list: "
                "`lm-eval ls tasks`; presets of soul: utility, mmlu, wmdp"
            )
        kind = entry.kind.name
        if kind in ("TASK", "PY_TASK"):
            return [name]
        children = sorted(entry.tags) if kind == "TAG" else (entry.cfg or {}).get("task", [])
        if not all(isinstance(child, str) for child in children):
            raise ValueError(f"lm-eval's group {name!r} defines tasks of its own; name its tasks instead")
        return list(dict.fromkeys(leaf for child in children for leaf in self.leaves(child)))

    def local(self, task: str) -> bool:
        """Say whether the data of one task is in the local folder."""
        return self.data is not None and bool(local_splits(self.data, task))

    def rolls(self, task: str) -> bool:
        """Say whether a task reads whole passages, before which lm-eval says nothing."""
        return (self._index[task].cfg or {}).get("output_type") == "loglikelihood_rolling"

    def source(self, task: str) -> str:
        """Return a digest of a task's definition and local rows: by it rows on disk are known to be of the same.

        What a definition includes is part of it; code that it calls (``!function``) is not looked at.
        """
        rows = local_splits(self.data, task) if self.data else {}
        text = json.dumps([self._index[task].cfg or {}, rows], sort_keys=True, default=_name_of)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def check_shots(self, task: str, shots: int | None) -> None:
        """Make sure that the examples before each question come from where the definition takes them.

        Where that split is not there, lm-eval takes them from the questions themselves, with their answers.

        Args:
            task: lm-eval's name of it.
            shots: How many; the definition's own number where None.

        Raises:
            ValueError: The local folder has no copy of that split.
        """
        definition = self._index[task].cfg or {}
        held = local_splits(self.data, task) if self.data else {}
        shown: Mapping[str, Any] = definition.get("fewshot_config") or {}
        if not held or shown.get("samples") or not (definition.get("num_fewshot") if shots is None else shots):
            return
        names = ("fewshot_split", "training_split", "validation_split")
        wanted = shown.get("split") or next((definition[name] for name in names if definition.get(name)), None)
        if wanted and wanted not in held:
            raise ValueError(
                f"{task} takes the examples before its questions from its split {wanted}, and {self.data} has a copy "
                f"of {', '.join(held)} alone: set num_fewshot to 0, or give all its splits there as {task}/SPLIT.jsonl"
            )

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Yield lm-eval's task of that name, its data loaded, and the manager that knows it.

        Raises:
            ValueError: Its data cannot be loaded.
        """
        splits = local_splits(self.data, name) if self.data else {}
        with tempfile.TemporaryDirectory() as folder:
            manager = self._manager
            if splits:
                _define(Path(folder), name, self._index[name], splits)
                manager = _open([Path(folder)], defaults=False)
            try:
                with hub.no_retries(), quiet():
                    task = manager.load([name])["tasks"][name]
            except Exception as error:  # data sets, the hub and task code raise what they like
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(
                    f"lm-eval cannot load the data of {name}: {reason}. Give data=FOLDER with {name}/test.jsonl, or "
                    "the name that its definition has for the split"
                ) from error
            yield task, manager


def _name_of(value: Any) -> str:
    """Return what a function in a definition is called: what it is printed as differs from process to process."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


@functools.lru_cache(maxsize=8)
def _manager(include_path: str, families: frozenset[str] | None) -> Any:
    """Return lm-eval's index of some families of tasks, or, in several seconds, of all."""
    own = [Path(include_path).expanduser()] if include_path else []
    if families is None:
        return _open(own, defaults=True)
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ValueError(INSTALL)
    tasks = Path(spec.origin).parent / "tasks"
    return _open([*(tasks / _FOLDERS[name] for name in sorted(families)), *own], defaults=False)


def _open(folders: list[Path], *, defaults: bool) -> Any:
    with quiet():
        return _library("lm_eval.tasks").TaskManager(include_path=[*folders], include_defaults=defaults)


def _library(module: str) -> Any:
    """Import a part of lm-eval, which is an extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{INSTALL} ({error})") from error


def _define(folder: Path, name: str, entry: Any, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write rows and a definition that is lm-eval's but for where the rows are."""
    files: dict[str, str] = {}
    for split, rows in splits.items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    absent = {key: None for key in _SPLIT_KEYS if (entry.cfg or {}).get(key) and entry.cfg[key] not in splits}
    definition = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **absent,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log, warnings and bars to itself; soul shows its own."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def wrap(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """Return lm-eval's view of a loaded model; log-probabilities are computed in fp32, whatever the weights are in.

    A chat template is told what soul tells it elsewhere, and opens no thought.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    with quiet():
        lm = _library("lm_eval.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=min(longest, max_length),
            softmax_dtype="float32",
            chat_template_args=SWITCHES,
        )
    rendered = lm.apply_chat_template
    lm.apply_chat_template = lambda *turns, **how: without_thought(rendered(*turns, **how))
    return lm


def run(lm: Any, task: Any, manager: Any, **settings: Any) -> list[Row]:
    """Run one task and return a row for each of its items.

    Metrics whose aggregate is not one of :data:`AGGREGATES` are left out: there is no interval for them. Where a
    log-likelihood is no number, metrics of that item are none: lm-eval takes the first such choice for the likeliest,
    and a broken model would seem to guess.

    Raises:
        ValueError: None of the task's metrics is left.
    """
    lm_eval = _library("lm_eval")
    name = task.config.task
    aggregates = {metric: fn.__name__ for metric, fn in task.aggregation().items()}
    known = {metric: how for metric, how in aggregates.items() if how in AGGREGATES}
    if not known:
        raise ValueError(
            f"the metrics of lm-eval's {name} ({', '.join(aggregates)}) add up in ways that have no interval here"
        )
    with quiet():
        found: Any = lm_eval.simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
        )
    harness: dict[str, Any] = {
        "lm_eval": lm_eval.__version__,
        "task_version": found["versions"][name],
        "num_fewshot": found["n-shot"][name],
        "aggregation": {},
        "higher_is_better": {},
    }
    rows: dict[int, Row] = {}
    for sample in found["samples"][name]:
        row = rows.setdefault(sample["doc_id"], _row(lm, name, sample, task.OUTPUT_TYPE, harness))
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in known:
            if metric in sample:
                name_of_it = metric + suffix
                cast(dict[str, Any], row)["metrics"][name_of_it] = _plain(sample[metric], broken=_is_broken(sample))
                harness["aggregation"][name_of_it] = known[metric]
                harness["higher_is_better"][name_of_it] = found["higher_is_better"][name].get(metric)
    return [rows[i] for i in sorted(rows)]


def _row(lm: Any, name: str, sample: Mapping[str, Any], kind: str, harness: Mapping[str, Any]) -> Row:
    """Return what was asked, and the likelihood of the right answer where lm-eval says which one it is."""
    arguments, target = sample["arguments"], sample["target"]
    gold = target if isinstance(target, int) else 0 if kind == "loglikelihood" else None
    prompt, answer, nats, tokens = arguments[0][0], str(target), math.nan, 0
    if kind == "loglikelihood_rolling":
        prompt, answer = "", arguments[0][0]
        nats, tokens = -float(sample["resps"][0][0]), len(lm.tok_encode(answer))
    elif kind != "generate_until" and gold is not None and gold < len(arguments):
        prompt, answer = arguments[gold]
        nats = -float(sample["resps"][gold][0][0])
        tokens = len(lm.tok_encode(prompt + answer)) - len(lm.tok_encode(prompt))
    row: dict[str, Any] = {
        "id": f"{name}:{sample['doc_id']}",
        "subject": name,
        "prompt": prompt,
        "answer": answer,
        "nll": nats / max(1, tokens),
        "tokens": tokens,
        "metrics": {},
        "harness": harness,
    }
    if kind == "generate_until":
        row["generated"] = str(sample["filtered_resps"][0])
    mark(cast(Row, row), "prompt", _is_cut(lm, kind, [given[:2] for given in arguments]))
    return cast(Row, row)


def _is_cut(lm: Any, kind: str, arguments: Sequence[Sequence[Any]]) -> bool:
    """Say whether lm-eval cut one of an item's prompts from the left, which it only logs."""
    if kind == "loglikelihood_rolling":  # read window by window
        return False
    if kind == "generate_until":
        return any(len(lm.tok_encode(text)) > lm.max_length - lm.max_gen_toks for text, _ in arguments)
    return any(len(lm.tok_encode(text + more)) > lm.max_length + 1 for text, more in arguments)


def _is_broken(sample: Mapping[str, Any]) -> bool:
    """Say whether one of an item's log-likelihoods is no number."""
    first = [given[0] for given in sample["resps"]]
    logps = [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in first]
    return any(isinstance(logp, float) and math.isnan(logp) for logp in logps)


def _plain(value: Any, *, broken: bool) -> float | list[float]:
    if isinstance(value, (list, tuple)):  # a log-likelihood, which is no number by itself then, and its weight
        return [float(part) for part in value]
    return math.nan if broken else float(value)


AGGREGATES = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
"""lm-eval's names of the ways in which items add up to a score that soul knows too."""
