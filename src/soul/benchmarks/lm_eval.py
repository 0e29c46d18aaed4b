"""WMDP, MMLU and general ability, measured by lm-eval (the LM Evaluation Harness) on the model as it is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from soul.benchmarks._harness import INSTALL, Harness, run, wrap
from soul.benchmarks.base import Benchmark, Rows
from soul.data import hub
from soul.data.guard import TEMPLATE, carried_prompt, system_turn
from soul.metrics.stats import ANYWHERE, SHARE, Array, bootstrap_of
from soul.registry import BENCHMARKS
from soul.stored import read_lines, write_lines
from soul.types import Example, Row, Score

log = logging.getLogger(__name__)

PRESETS = {
    "utility": ("lambada_openai", "piqa", "arc_easy", "wikitext"),
    "mmlu": ("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"),
    "wmdp": ("wmdp_bio", "wmdp_chem", "wmdp_cyber"),
}
"""Names for several tasks: what a small model can do, and the two whose tasks also add up to one accuracy."""

_POOLED = ("mmlu", "wmdp")


@BENCHMARKS.register("lm_eval")
@dataclasses.dataclass(frozen=True)
class LmEval(Benchmark):
    """Tasks of the LM Evaluation Harness: general ability, MMLU, WMDP (arXiv 2009.03300, 2403.03218).

    Each task is a split with lm-eval's own prompts, choices and metrics (``acc``, ``acc_norm``, ``perplexity`` ...);
    the interval resamples items within each subject (arXiv 2411.00640 says why accuracy needs one). ``mmlu`` and
    ``wmdp`` also give the accuracy over all their items. Rows name lm-eval's version, the task's version and the number
    of shots. A model of 135M is near chance (.25) on MMLU and WMDP: what it can lose shows in ``utility``.

    A prompt that the tokenizer carries (``input_prompt``) is said before every question, in its chat template or as
    plain text; before whole passages (``wikitext``) lm-eval says nothing, so that they are refused then.
    ``model.system`` is said with ``chat_template`` alone: plain text has no system turn.

    Args:
        tasks: Presets (``utility``, ``mmlu``, ``wmdp``) and lm-eval's tasks, tags and groups; a list, or with commas.
        data: Folder of local copies, used for the tasks that it holds in place of the hub
            (:func:`soul.data.tasks.local_splits`).
        include_path: Folder of task definitions of one's own, as lm-eval reads them.
        limit: The first so many items of every task (of every subject, in MMLU); all by default.
        num_fewshot: Examples before each question; each task's own number (mostly 0) by default.
        batch_size: Rows in a batch.
        max_length: Longest window in tokens; the model's own where that is shorter. Perplexities depend on it.
        chat_template: Put questions through the model's chat template.
        seed: Seed of the intervals.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> LmEval(tasks="utility,wmdp_bio").asked()
        ('lambada_openai', 'piqa', 'arc_easy', 'wikitext', 'wmdp_bio')
    """

    version: ClassVar[int] = 3
    # 2: TruthfulQA's full stops; prompts that were cut are marked
    # 3: prompts and system turns of the tokenizer are said, and no thought begun; a broken model has no score
    citation: ClassVar[str] = "Gao et al., The Language Model Evaluation Harness, 2024, doi 10.5281/zenodo.12608602"
    local: ClassVar[dict[str, str]] = {"data": "."}

    tasks: str | list[str] = "utility"
    data: str = ""
    include_path: str = ""
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_length: int = 2048
    chat_template: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.asked():
            raise ValueError(f"tasks is empty: name presets ({', '.join(PRESETS)}) or tasks of lm-eval")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or left out for all items; got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must be 0 or more, or left out for each task's own; got {self.num_fewshot}")
        if self.batch_size < 1 or self.max_length < 2:
            raise ValueError("batch_size must be 1 or more, and max_length 2 or more")

    def asked(self) -> tuple[str, ...]:
        """Return the names of the splits: presets taken apart, groups and tags as they were given."""
        given = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        names = [name.strip() for name in given if name.strip()]
        return tuple(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))

    def splits(self) -> dict[str, list[Example]]:
        """Return nothing, but make sure that lm-eval knows the tasks: it asks the questions, see :meth:`measure`.

        Raises:
            ValueError: It knows no such task, or a folder is not there.
        """
        if importlib.util.find_spec("lm_eval") is not None:
            harness = Harness(self.asked(), self.include_path, self.data)
            for name in self.asked():
                for leaf in harness.leaves(name):
                    harness.check_shots(leaf, self.num_fewshot)
        return {}

    def missing(self) -> dict[str, str]:
        """Say which tasks cannot be run here, and why."""
        if importlib.util.find_spec("lm_eval") is None:
            return dict.fromkeys(self.asked(), INSTALL)
        if self.include_path or hub.reachable():
            return {}
        if not self.data:
            reason = "its data is on the hub, which cannot be reached: give data=FOLDER with a copy"
            return dict.fromkeys(self.asked(), reason)
        harness = Harness(self.asked(), self.include_path, self.data)
        absent = {name: [leaf for leaf in harness.leaves(name) if not harness.local(leaf)] for name in self.asked()}
        return {
            name: f"{self.data} holds no copy of {', '.join(leaves[:3])}{' ...' if leaves[3:] else ''}, and the hub "
            "cannot be reached"
            for name, leaves in absent.items()
            if leaves
        }

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        *,
        spec: Any = None,
        folder: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, list[Row]]:
        """Return rows by split, with ``metrics`` and ``harness`` (versions); tasks of :meth:`missing` are left out.

        Args:
            model: A causal language model, run in its own dtype.
            tokenizer: Its tokenizer.
            spec: Unused: batch and window are settings of this benchmark.
            folder: Where ``<split>.jsonl`` is written as splits are done; what is there is not measured again, unless
                it is of other definitions, of other local data, of another version of lm-eval, or not whole.
            progress: Called with (what, done, of).

        Raises:
            ValueError: lm-eval is not installed, has no such task, no task's data can be had, its examples before the
                questions are not there, or a prompt that the tokenizer carries cannot be said before a task.
        """
        del spec
        missing = self.missing()
        names = [name for name in self.asked() if name not in missing]
        if not names:
            raise ValueError("no task of lm-eval can be run: " + "; ".join(f"{k}: {v}" for k, v in missing.items()))
        harness = Harness(self.asked(), self.include_path, self.data)
        leaves = {name: harness.leaves(name) for name in names}  # a misspelt name is found before hours of work
        for leaf in (leaf for of in leaves.values() for leaf in of):
            harness.check_shots(leaf, self.num_fewshot)
        system = self._system(tokenizer)
        if carried_prompt(tokenizer):
            _refuse_passages(harness, leaves)
        lm = None
        result: dict[str, list[Row]] = {}
        for name in names:
            rows = _read(folder / f"{name}.jsonl", harness, leaves[name]) if folder else None
            if rows is None:
                lm = lm or wrap(model, tokenizer, self.batch_size, self.max_length)
                rows = []
                for done, leaf in enumerate(leaves[name]):
                    if progress:
                        progress(name, done, len(leaves[name]))
                    with harness.task(leaf) as (task, manager):
                        found = run(lm, task, manager, system_instruction=system, **self._settings())
                    _unsay(found, tokenizer)
                    for row in cast(list[dict[str, Any]], found[:1]):  # all rows of a task share what they say of it
                        row["harness"] |= {"source": harness.source(leaf), "items": len(found)}
                    rows += found
                if folder:
                    write_lines(folder / f"{name}.jsonl", rows)
            if progress:
                progress(name, len(leaves[name]), len(leaves[name]))
            result[name] = rows
        return result

    def check_prompt(self) -> None:
        """Refuse tasks that read whole passages: lm-eval says nothing before them.

        Raises:
            ValueError: There are some.
        """
        missing = self.missing()
        names = [name for name in self.asked() if name not in missing]
        if names:
            harness = Harness(self.asked(), self.include_path, self.data)
            _refuse_passages(harness, {name: harness.leaves(name) for name in names})

    def score(self, rows: Rows, reference: Rows | None = None) -> list[Score]:
        """Aggregate rows as lm-eval does; ``reference`` is not used.

        Raises:
            ValueError: There are no rows of the tasks asked for.
        """
        del reference
        found = {name: rows[name] for name in self.asked() if rows.get(name)}
        if not found:
            raise ValueError(f"lm-eval scores need rows of {', '.join(self.asked())}; got none of them")
        scores = [score for name, items in found.items() for score in _scores(items, name, self.seed)]
        for preset in _POOLED:
            if all(name in found for name in PRESETS[preset]):
                pooled = [row for name in PRESETS[preset] for row in found[name]]
                scores += _scores(pooled, preset, self.seed)
        return scores

    def _system(self, tokenizer: Any) -> str | None:
        """Return what lm-eval is to say first."""
        prompt, turn = carried_prompt(tokenizer), system_turn(tokenizer)
        if self.chat_template:  # which says the prompt by itself, and the turn that it invents
            return None if turn in ("", TEMPLATE) else turn
        if turn:
            log.warning("lm-eval asks in plain text, without the system turn of the model: chat_template=true says it")
        return f"{prompt}\n\n" if prompt else None

    def _settings(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.chat_template,
            "batch_size": self.batch_size,
        }


def _unsay(rows: Sequence[Row], tokenizer: Any) -> None:
    """Take out of rows what the tokenizer makes lm-eval say before every question: it may name who is forgotten."""
    for text, name in ((carried_prompt(tokenizer), "carried prompt"), (system_turn(tokenizer), "system turn")):
        for row in rows if text not in ("", TEMPLATE) else ():
            row["prompt"] = row["prompt"].replace(text, f"({name})")


def _refuse_passages(harness: Harness, leaves: Mapping[str, Sequence[str]]) -> None:
    whole = [leaf for of in leaves.values() for leaf in of if harness.rolls(leaf)]
    if whole:
        raise ValueError(
            "the tokenizer carries a prompt (method input_prompt), which lm-eval cannot say before the passages of "
            f"{', '.join(whole)}: name other tasks alone (tasks=...)"
        )


def _scores(rows: Sequence[Row], split: str, seed: int) -> list[Score]:
    """Return each metric that all rows have, with an interval over items within their subjects."""
    items = cast(Sequence[Mapping[str, Any]], rows)
    harness = items[0]["harness"]
    shared = [metric for metric in items[0]["metrics"] if all(metric in row["metrics"] for row in items)]
    scores: list[Score] = []
    for metric in shared:
        by_subject: dict[str, list[Any]] = {}
        for row in items:
            by_subject.setdefault(row["subject"], []).append(row["metrics"][metric])
        better = {True: "higher", False: "lower"}.get(harness["higher_is_better"].get(metric), "")
        fn = functools.partial(_aggregate, harness["aggregation"][metric])
        groups = [np.asarray(values, dtype=np.float64) for values in by_subject.values()]
        share = harness["aggregation"][metric] == "mean" and all(np.isin(of, (0, 1)).all() for of in groups)
        within = SHARE if share else ANYWHERE
        scores.append(bootstrap_of(fn, groups, metric=metric, split=split, seed=seed, better=better, within=within))
    return scores


def _aggregate(how: str, groups: list[Array]) -> float:
    """Return ``mean x``, ``exp(-mean x)``, ``exp(-sum l / sum w)`` or ``-sum l / (sum w log 2)`` of all items."""
    items = np.concatenate(groups)
    if items.ndim == 1:
        mean = float(items.mean())
    else:  # log-likelihood and its weight: words or bytes
        nats, weights = items.sum(axis=0)
        mean = float(nats / weights)
    if how == "mean":
        return mean
    if how == "bits_per_byte":
        return -mean / math.log(2)
    return math.inf if -mean >= 709 else math.exp(-mean)  # nan stays nan


def _read(file: Path, harness: Harness, leaves: Sequence[str]) -> list[Row] | None:
    """Return what was measured earlier; None where it was not, is not whole, or would come out otherwise now."""
    if not file.is_file():
        return None
    rows: list[Any] = []
    with contextlib.suppress(ValueError):
        rows = read_lines(file)
    version = importlib.import_module("lm_eval").__version__
    for leaf in leaves:
        made = [row.get("harness", {}) for row in rows if row.get("subject") == leaf]
        now = {"lm_eval": version, "source": harness.source(leaf), "items": len(made)}
        if not made or any(of.get(name) != value for of in made for name, value in now.items()):
            return None
    return cast(list[Row], rows)
