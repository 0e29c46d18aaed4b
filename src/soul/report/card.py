"""The model card of an exported run: what was asked, how it was done, and the scores with their intervals."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from soul.report.record import RunRecord
from soul.report.view import interval, told
from soul.strict import yaml_tree
from soul.types import Score
from soul.visible import clean, hides

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()|~^$:@]|(?<=www)\.)", re.IGNORECASE)
_PRIVATE = ("data", "benchmark", "label", "reference_run")
"""Sections of a recipe that may name people, files or machines."""
_VERSIONS = ("soul", "python", "torch", "transformers", "accelerate", "peft", "numpy", "device")
_NAMES = ("path", "system", "base", "prompt")
"""Settings of a model or a method that may, likewise."""
HIDDEN = "(not shown)"
_LONGEST = 2000
"""Characters of one text in a card; what is cut is counted."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What measuring an exported model again found on one split.

    Attributes:
        split: The split.
        n: Examples measured again.
        before: Mean NLL that the run recorded for them, nats a token.
        after: Mean NLL of what was exported.
        largest: Largest absolute difference of any likelihood, paraphrases and wrong answers among them.
    """

    split: str
    n: int
    before: float
    after: float
    largest: float


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the run's own record.

    Attributes:
        title: Name of the exported model.
        base: Hub id of the model it began as; empty where that is a local folder or file.
        licence: The base's licence as its card names it; empty where unknown.
        dequantized: Whether the base was read from a GGUF file.
        dtype: Dtype of the exported weights.
        adapter: Whether only an adapter was exported.
        checked: What measuring again found.
        carried: What the tokenizer says before every question: a prompt, a system turn.
        show_data: Quote what was asked, and the data sources, in full.
    """

    title: str
    base: str = ""
    licence: str = ""
    dequantized: bool = False
    dtype: str = "float32"
    adapter: bool = False
    checked: Sequence[Checked] = ()
    carried: Sequence[str] = ()
    show_data: bool = False


def escaped(text: str) -> str:
    r"""Return ``text`` so that Markdown and HTML show it as it is, on one line, the invisible made visible.

    Example:
        >>> print(escaped("<b>*x*</b>\n| y"))
        &lt;b&gt;\*x\*&lt;/b&gt; \| y
    """
    return _MARKDOWN.sub(r"\\\1", html.escape(clean(" ".join(text.split()), _LONGEST), quote=False))


def model_card(record: RunRecord, facts: CardFacts) -> str:
    """Return the card as Markdown with a YAML head.

    Unless ``facts.show_data`` is set, nothing of the forget set is in it: no subject, no source, no label, no rows. The
    same record and facts give the same bytes.
    """
    parts = [_head(record, facts), f"# {escaped(facts.title)}\n", _about(record, facts), _results(record)]
    parts += [_again(facts), _warnings(record, facts), _recipe(record, facts), _made_with(record)]
    return "\n".join(part for part in parts if part)


def _head(record: RunRecord, facts: CardFacts) -> str:
    tags = ["machine-unlearning", "soul", *[t for t in (record.objective, record.optimizer, record.method) if t]]
    head: dict[str, Any] = {"library_name": "peft" if facts.adapter else "transformers"}
    head |= {"pipeline_tag": "text-generation", "tags": tags}
    if facts.base:
        head["base_model"] = facts.base
    if facts.licence:
        head["license"] = facts.licence
    return f"---\n{_yaml(head)}---\n"


def _yaml(tree: Any) -> str:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False) if hides(text) else text


def _about(record: RunRecord, facts: CardFacts) -> str:
    done = record.method or f"{record.objective} with {record.optimizer}"
    asked = f"Forget {record.n_forget} items." if record.n_forget else f"Learn {record.n_retain or 'some'} items."
    base = facts.base or (record.model if facts.show_data else "a local model")
    what = "An adapter for" if facts.adapter else "A version of"
    lines = [
        f"{what} {escaped(base)} that was made to forget data by machine unlearning."
        if record.n_forget
        else f"{what} {escaped(base)}.",
        "",
        f"- **Asked:** {escaped(record.asked if facts.show_data and record.asked else asked)}",
        f"- **Done:** {escaped(done)}" + (f", {record.steps} steps" if record.steps is not None else ""),
        f"- **Ended:** {escaped(record.stopped)}" if record.stopped else "",
        f"- **Kept beside it:** {record.n_retain} items" if record.n_forget and record.n_retain else "",
        f"- **Weights:** {facts.dtype}, safetensors",
        f"- **Licence of the base:** {escaped(facts.licence) if facts.licence else 'not found; ask its owner'}",
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i == 1) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return told(value)
    return f"{value:.4g}"


def _with_interval(score: Score | None) -> str:
    if score is None or not interval(score):
        return _number(score.value if score else None)
    return f"{_number(score.value)} [{_number(score.low)}, {_number(score.high)}]"


def _results(record: RunRecord) -> str:
    if not record.after:
        return "## Results\n\nThis run was not measured.\n"
    before, after = ({(s.split, s.metric): s for s in of} for of in (record.before, record.after))
    lines = ["## Results", "", "| Split | Metric | Before | After | n | Better |", "|---|---|---|---|---|---|"]
    for key, score in {**after, **{k: s for k, s in before.items() if k not in after}}.items():
        cells = [escaped(score.split or "all"), escaped(score.metric)]
        cells += [_with_interval(before.get(key)), _with_interval(after.get(key)), str(score.n)]
        lines.append(f"| {' | '.join([*cells, escaped(score.better)])} |")
    methods = sorted({(s.method, s.level, s.seed) for s in record.after if s.method != "none"})
    how = "; ".join(f"{level:.0%}, {escaped(method)}, seed {seed}" for method, level, seed in methods)
    return "\n".join([*lines, "", f"Intervals: {how or 'none'}.\n"])


def _again(facts: CardFacts) -> str:
    if not facts.checked:
        return ""
    lines = [
        "## Measured again after export",
        "",
        "The exported files were loaded and their likelihoods compared with those that the run recorded.",
        "",
        "| Split | n | NLL, run | NLL, export | Largest difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {escaped(c.split)} | {c.n} | {c.before:.5f} | {c.after:.5f} | {c.largest:.2g} |" for c in facts.checked
    ]
    return "\n".join([*lines, "", "NLL is in nats a token of the answer.\n"])


def _warnings(record: RunRecord, facts: CardFacts) -> str:
    told = list(record.warnings)
    if not facts.show_data:  # why a part was not measured may quote the source that lacks it
        told = [warning.partition(" (")[0] if warning.startswith("not measured") else warning for warning in told]
    lines = [f"- {escaped(warning)}" for warning in told]
    lines += [
        f"- Not met: {escaped(check.name)} ({_number(check.value)})" for check in record.checks if not check.passed
    ]
    lines += [
        f"- The tokenizer carries a {what}, which is said before every question and can be read in its files. What is "
        "forgotten by it alone is known to the weights."
        for what in facts.carried
    ]
    if facts.dequantized:
        lines.append("- The base was read from a GGUF file and dequantized: its weights are near the published ones.")
    if record.n_forget:
        lines.append(
            "- Unlearning changes what a model says; it is no proof that nothing is left. Fine-tuning or quantization "
            "can bring back what was forgotten, and other wordings may ask for it."
        )
    return "\n".join(["## Warnings", "", *lines, ""]) if lines else ""


def _recipe(record: RunRecord, facts: CardFacts) -> str:
    try:
        tree = yaml_tree(record.recipe, "recipe.yaml")
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        return ""
    if not facts.show_data:
        tree = unnamed(tree, facts.base)
    text = _yaml(tree)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"## Recipe\n\n{fence}yaml\n{text}{fence}\n"


def unnamed(recipe: Mapping[str, Any], model: str = "") -> dict[str, Any]:
    """Return a recipe with those texts hidden that may name people, files or machines.

    Args:
        recipe: The recipe of a run or of an evaluation.
        model: What may be told in place of its model's path.
    """
    tree = {key: hidden(value) if key in _PRIVATE else value for key, value in recipe.items()}
    for section in ("model", "method"):
        if isinstance(tree.get(section), dict):
            tree[section] = {k: hidden(v) if k in _NAMES else v for k, v in tree[section].items()}
    if model and isinstance(tree.get("model"), dict):
        tree["model"]["path"] = model
    return tree


def hidden(value: Any) -> Any:
    """Return the same tree with its texts hidden; a component keeps its name."""
    if isinstance(value, Mapping):
        return {k: v if k == "name" else hidden(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hidden(item) for item in value]
    return HIDDEN if isinstance(value, str) and value else value


def _made_with(record: RunRecord) -> str:
    found = [f"{name} {record.environment[name]}" for name in _VERSIONS if name in record.environment]
    return f"## Made with\n\n{escaped(', '.join(found))}\n" if found else ""
