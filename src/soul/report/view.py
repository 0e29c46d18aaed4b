"""What a report says, in words and formatted numbers; both renderings (HTML and terminal) draw from here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scipy import stats

from soul.metrics.tofu import NORMALISED_SPLITS
from soul.report.record import RunRecord
from soul.types import Score

METRIC_LABELS = {
    "verbmem": "Verbatim memorization",
    "knowmem": "Knowledge memorization",
    "probability": "Answer probability",
    "rougeL_recall": "ROUGE-L",
    "rougeL": "ROUGE-L",
    "rouge": "ROUGE-L",
    "truth_ratio": "Truth ratio",
    "perplexity": "Perplexity",
    "nll": "Loss (nats a token)",
    "accuracy": "Accuracy",
    "model_utility": "Model utility",
    "forget_quality": "Forget quality (p-value)",
}
_GENERAL = {"general": "General knowledge", "real_authors": "Real authors", "world_facts": "World facts"}
_ORDER = ("forget", "kept", "general", "text", "other", "all")
SUBJECTS = {
    "forget": "the forgotten answers",
    "kept": "the kept answers",
    "general": "general knowledge",
    "text": "general text",
}


def kind_of(split: str) -> str:
    """Return which question a split answers: ``forget``, ``kept``, ``general``, ``text``, ``other`` or ``all``."""
    name = split.lower()
    if not name:
        return "all"
    if name in _GENERAL:
        return "general"
    for kind, starts in (("forget", ("forget",)), ("kept", ("kept", "retain")), ("text", ("text",))):
        if name.startswith(starts):
            return kind
    return "general" if name.startswith("general") else "other"


def split_label(split: str) -> str:
    """Return the name of a split for a reader, e.g. ``Forgotten`` for ``forget``."""
    named = {"forget": "Forgotten", "kept": "Kept", "retain": "Kept", "text": "General text"}
    named["forget_reworded"] = "Forgotten, asked in other words"
    words = split.replace("_", " ")
    if split in named:
        return named[split]
    if split in _GENERAL:
        return "General knowledge" if split == "general" else f"General knowledge: {_GENERAL[split].lower()}"
    prefix = {"forget": "Forgotten", "kept": "Kept", "text": "General text", "general": "General knowledge"}
    kind = kind_of(split)
    return f"{prefix[kind]}: {words}" if kind in prefix else words.capitalize()


def split_order(split: str) -> tuple[int, str]:
    """Return a sort key: forgotten first, aggregates last."""
    return _ORDER.index(kind_of(split)), split


def metric_label(metric: str) -> str:
    """Return the name of a metric for a reader; unknown names are shown as they are, with spaces."""
    words = metric.replace("_", " ")
    return METRIC_LABELS.get(metric, words[:1].upper() + words[1:])


def number(value: float | None) -> str:
    """Return a number as a reader wants it: three decimals when small, fewer when large, a dash where there is none.

    nan and infinities are told in words: they are the worst that a model can do, and no gap.
    """
    if value is None:
        return "—"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def told(value: float) -> str:
    """Return a measured number, and what it means where it is none."""
    return number(value) + (" (the model is broken)" if math.isnan(value) else "")


def interval(score: Score) -> str:
    """Return the interval of a score, e.g. ``0.080 to 0.170``; empty where there is none, or nothing finite in it."""
    if math.isnan(score.low) or math.isnan(score.high) or not math.isfinite(score.value):
        return ""
    return f"{number(score.low)} to {number(score.high)}"


def duration(seconds: float | None) -> str:
    """Return seconds in the unit a person would choose."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: int | None) -> str:
    """Return bytes in MB or GB."""
    if size is None:
        return "—"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@dataclasses.dataclass(frozen=True)
class Model:
    """One model that was measured: a row of the tables, a point of the plot.

    Attributes:
        name: What to call it.
        run: Number of the run it came out of, from 1; 0 for a model as it came.
        scores: Its scores by ``(metric, split)``.
    """

    name: str
    run: int
    scores: dict[tuple[str, str], Score]


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores that are read together: a row for each model, a column for each metric and what is better of it."""

    title: str
    kind: str
    metrics: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Model, tuple[Score | None, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """What happened to one kind of knowledge, by its leading metric."""

    title: str
    kind: str
    metric: str
    before: Score | None
    after: Score | None
    paired: bool = False  # whether the items' own changes, which are of one sign, are beyond chance

    @property
    def note(self) -> str:
        """Whether the change stands out of the intervals, in words."""
        if self.before is None or self.after is None:
            return "measured once"
        if not (math.isfinite(self.before.value) and math.isfinite(self.after.value)):
            return "not a finite number"
        if not (interval(self.before) and interval(self.after)):
            return "no interval: read with care"
        apart = self.before.low > self.after.high or self.before.high < self.after.low
        if apart:
            return "intervals do not overlap"
        return "intervals overlap; item by item it changed" if self.paired else "intervals overlap"


def models_of(runs: Sequence[RunRecord]) -> tuple[Model, ...]:
    """Return the measured models: what came first, once where the runs agree on it, then each run's result."""
    befores: list[tuple[str, dict[tuple[str, str], Score]]] = []
    for run in runs:
        scores = {(score.metric, score.split): score for score in run.before}
        if scores and not any(repr(scores) == repr(known) for _, known in befores):  # repr: nan equals nan
            befores.append((run.label, scores))
    shared = len(befores) == 1
    word = "Before" if any(run.after for run in runs) else "As measured"
    models = [Model(word if shared else f"{word}: {label}", 0, scores) for label, scores in befores]
    for index, run in enumerate(runs, start=1):
        if run.after:
            models.append(Model(run.label, index, {(score.metric, score.split): score for score in run.after}))
    return tuple(models)


def _metric_order(metric: str) -> tuple[int, str]:
    names = list(METRIC_LABELS)
    return (names.index(metric) if metric in names else len(names), metric)


def _table(title: str, kind: str, models: Sequence[Model], columns: Sequence[tuple[str, tuple[str, str]]]) -> Table:
    """Return a table with a column for each ``(heading, (metric, split))``, without rows that are empty."""
    headings = []
    for heading, key in columns:
        better = next((model.scores[key].better for model in models if key in model.scores), "")
        headings.append((heading, better))
    rows = ((model, tuple(model.scores.get(key) for _, key in columns)) for model in models)
    measured = tuple((model, cells) for model, cells in rows if any(cell is not None for cell in cells))
    return Table(title, kind, tuple(headings), measured)


def tables_of(runs: Sequence[RunRecord]) -> tuple[Table, ...]:
    """Return the scores as tables, forgotten first: one for each split, and one for text, aggregates and the like.

    Splits without a question of their own often have a single metric; side by side they make one table, not many.
    """
    models = models_of(runs)
    keys = {key for model in models for key in model.scores}
    tables, rest = [], []
    for split in sorted({split for _, split in keys}, key=split_order):
        names = sorted({metric for metric, other in keys if other == split}, key=_metric_order)
        if kind_of(split) in ("forget", "kept", "general"):
            columns = [(metric_label(name), (name, split)) for name in names]
            tables.append(_table(split_label(split), kind_of(split), models, columns))
        else:
            prefix = f"{split_label(split)}: " if split else ""
            rest += [(f"{prefix}{metric_label(name)}", (name, split)) for name in names]
    if rest:
        tables.append(_table("Text and overall" if tables else "Scores", "all", models, rest))
    return tuple(tables)


def changes_of(run: RunRecord) -> tuple[Change, ...]:
    """Return the leading metric of each split, before and after."""
    before = {(score.metric, score.split): score for score in run.before}
    after = {(score.metric, score.split): score for score in run.after}
    changes = []
    for split in sorted({split for _, split in {*before, *after} if split}, key=split_order):
        names = sorted({metric for metric, other in {*before, *after} if other == split}, key=_metric_order)
        if kind_of(split) == "text" and "perplexity" in names:
            names.insert(0, "perplexity")
        key = names[0], split
        paired = _beyond_chance(run, split, key[0])
        changes.append(Change(split_label(split), kind_of(split), key[0], before.get(key), after.get(key), paired))
    return tuple(changes)


def _beyond_chance(run: RunRecord, split: str, metric: str) -> bool:
    """Say whether the same items differ before and after: a t-test of their differences, of means by subject, at 5 %.

    Intervals of before and after alone hold how items differ from one another, which is the same both times.
    """
    pairs = list(zip(run.rows_before.get(split, ()), run.rows_after.get(split, ()), strict=False))
    if metric not in ("probability", "perplexity") or split in NORMALISED_SPLITS:
        return False  # not of an item's own likelihood
    apart: dict[str, list[float]] = {}
    for i, (old, new) in enumerate(pairs):
        if not (old.get("tokens") and new.get("tokens")):
            return False
        x, y = old["nll"], new["nll"]  # means over tokens
        if min(x, y) < 0:  # no likelihood: another program's rows
            return False
        change = y - x if metric == "perplexity" else math.exp(-y) - math.exp(-x)
        apart.setdefault(old["subject"] or f"#{i}", []).append(change)
    means = [sum(many) / len(many) for many in apart.values()]
    if len(means) < 3 or not all(map(math.isfinite, means)) or max(means) == min(means):
        return False
    found: Any = stats.ttest_1samp(means, 0.0)
    return float(found.pvalue) < 0.05


def sentences(run: RunRecord) -> tuple[str, ...]:
    """Return what the run achieved as plain sentences, one for each kind of knowledge."""
    result = []
    changes = changes_of(run)
    kinds = [change.kind for change in changes]
    for change in changes:
        if change.kind not in SUBJECTS:
            continue
        what = f"{metric_label(change.metric)} on {SUBJECTS[change.kind]}"
        _, _, part = change.title.partition(": ")
        what += f" ({part})" if part and kinds.count(change.kind) > 1 else ""
        what += " asked in other words" if change.title == split_label("forget_reworded") else ""
        first, last = change.before, change.after
        if first is None or last is None:
            only = first or last
            gap = ", and was not measured after" if run.after and last is None else ""
            result.append(f"{what} {'was' if gap else 'is'} {told(only.value) if only else number(None)}{gap}.")
            continue
        # compare what the reader sees: 0.8501 and 0.8499 both read 0.850
        old, new = number(first.value), number(last.value)
        if not (math.isfinite(first.value) and math.isfinite(last.value)):
            result.append(f"{what} was {old} and is now {told(last.value)}.")
        elif old == new:
            result.append(f"{what} stayed at {new}.")
        else:
            verb = "rose" if last.value > first.value else "fell" if last.value < first.value else "went"
            doubt = " (the intervals overlap)" if change.note == "intervals overlap" else ""
            result.append(f"{what} {verb} from {old} to {new}{doubt}.")
    return tuple(result)


def check_summary(run: RunRecord) -> tuple[str, str]:
    """Return a state (``good``, ``bad`` or ``none``) and its words."""
    failed = sum(not check.passed for check in run.checks)
    total = len(run.checks)
    if not total:
        return "none", "No checks were set"
    if failed:
        return "bad", f"{failed} of {total} checks failed" if total > 1 else "The check failed"
    return "good", {1: "The check passed", 2: "Both checks passed"}.get(total, f"All {total} checks passed")


def facts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    """Return what was run and where, as names and values; the command is shown apart."""
    counts = (("items to forget", run.n_forget), ("items to keep", run.n_retain))
    own = (("model", run.model), ("method", run.method), ("objective", run.objective), ("optimizer", run.optimizer))
    known = [(name, value) for name, value in own if value]
    known += [(name, str(value)) for name, value in counts if value is not None]
    return (*known, *((key, value) for key, value in run.environment.items() if key != "command"))


def phases_of(runs: Iterable[RunRecord]) -> list[str]:
    """Return the timed phases, training first."""
    return sorted({phase for run in runs for phase in run.seconds}, key=lambda phase: (phase != "train", phase))


def interval_note(runs: Iterable[RunRecord]) -> str:
    """Return how the intervals were made, e.g. ``95 % intervals by bootstrap(2000)``."""
    made = sorted(
        {
            f"{score.level * 100:g} % intervals by {score.method}, seed {score.seed}"
            for run in runs
            for score in (*run.before, *run.after)
            if interval(score)
        }
    )
    return "; ".join(made)


def shares_note(runs: Iterable[RunRecord]) -> str:
    """Return the sets whose probability is a share among the answers offered, in words; nothing where there is none."""
    splits = {score.split for run in runs for score in (*run.before, *run.after) if score.metric == "probability"}
    found = [_GENERAL[split].lower() for split in NORMALISED_SPLITS if split in splits]
    return _listed(found) if found else ""


def _measured(runs: Sequence[RunRecord], ways: Mapping[str, Callable[[Score], object]]) -> list[str]:
    """Return which of the ways some scores of the runs are of, and in how many runs where that is not all."""
    results = [run.after or run.before for run in runs]
    counts = {way: sum(any(map(of, scores)) for scores in results) for way, of in ways.items()}
    return [way + (f" (in {n} of {len(runs)} runs)" if n < len(runs) else "") for way, n in counts.items() if n]


def _listed(words: Sequence[str], last: str = "and") -> str:
    *most, end = words
    return f"{', '.join(most)}{',' * (len(most) > 1)} {last} {end}" if most else end


_TRIED: dict[str, Callable[[Score], object]] = {
    "asking in other words": lambda score: "reworded" in score.split,
    "asking for the text in a chat": lambda score: score.split.startswith("asked"),
    "sampling many answers": lambda score: re.search(r"_of_\d+$", score.metric) or score.metric == "leaked",
    "membership inference": lambda score: score.metric.startswith(("mia_", "privleak")),
}
_REFERRED: dict[str, Callable[[Score], object]] = {
    "forget quality": lambda score: score.metric.startswith("forget_quality"),
    "privacy leakage": lambda score: score.metric.startswith("privleak"),
    "the reference attack": lambda score: score.metric.startswith("mia_reference"),
    "differences over a reference": lambda score: score.metric.endswith("_over_reference"),
}
"""What of a report looks for traces, and what of it is measured against another model, by its scores."""


def limits(runs: Sequence[RunRecord], *, seeds: bool = False) -> tuple[str, ...]:
    """Return what the report does not prove, by what its scores are of, and whether runs differ in seeds alone."""
    once = "" if seeds else ", each trained once with one seed"
    tried, referred = _measured(runs, _TRIED), _measured(runs, _REFERRED)
    untried = ["relearning from a few examples", "quantizing the weights"]
    untried += [] if any(way.startswith("asking in") for way in tried) else ["rewording a question"]
    return (
        (f"Tried here: {_listed(tried)}. No other attack is" if tried else "No attack is")
        + f" part of this report: whether {_listed(untried, 'or')} brings the answers back was not tried here.",
        "A low answer probability means that the model no longer gives this wording of the answer. "
        "It is not proof that every trace of the data is gone from the weights.",
        (
            f"{len(runs)} runs are shown{once}; intervals of a run cover the choice of test items, not another seed. "
            "A small difference between runs may not repeat."
            if len(runs) > 1
            else "This is one run with one seed; its intervals cover the choice of test items, not another seed."
        ),
        (
            f"Measured against a reference model: {_listed(referred)}. They are worth what that model is: that it was "
            "trained without the data was not checked here."
            if referred
            else "No model trained from scratch without the data is part of this report. "
            "Such a model is the reference for what forgetting should look like."
        ),
        *(
            [
                "Kept answers are of the retain set where no other was named, which training looked at: "
                "others of their kind may have changed more."
            ]
            if any(score.split == "kept" for run in runs for score in run.after)
            else []
        ),
        "Only what was measured is judged: other abilities of the model may have changed.",
    )
