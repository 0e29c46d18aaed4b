"""The only place that runs a model without training it: batched, fp32, resumable."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from soul import processes
from soul.benchmarks.base import Benchmark, Measures
from soul.data.templates import ChatTemplate, Encoded, ends
from soul.generation import Written, continue_prompts, sample_answers, write
from soul.likelihood import sequence_nll
from soul.metrics.text import rouge_l_recall
from soul.origins import of_items
from soul.stored import read_lines, write_lines
from soul.token_scores import gradient_norms, token_scores
from soul.truncation import mark
from soul.types import Ask, Example, Row

Progress = Callable[[str, int, int], None]
Asks = Mapping[str, Ask]
_PLAIN = Ask()


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """How to measure.

    Attributes:
        max_new_tokens: Longest generated answer, where the benchmark asks for no other length.
        generate: Generate greedy answers (for ROUGE-L) and samples where they are asked for (:class:`soul.types.Ask`).
        max_tokens: Padded tokens in a likelihood batch, at most; a CPU takes what its caches hold (1,024 or more).
        generation_batch: Rows in a generation batch, at most; fewer where prompts and answers are long.
        max_length: Longest sequence; what a row loses beyond it, or beyond ``max_new_tokens``, it says
            (``Row.truncated``).
    """

    max_new_tokens: int = 128
    generate: bool = True
    max_tokens: int = 4096
    generation_batch: int = 64
    max_length: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_tokens", "generation_batch", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} must be 1 or more, not {getattr(self, name)}")


def spec_for(benchmark: Benchmark, spec: EvaluationSpec) -> EvaluationSpec:
    """Return the settings that a benchmark is measured with: long enough for its texts."""
    return dataclasses.replace(spec, max_length=max(spec.max_length, benchmark.longest))


def measure(
    benchmark: Benchmark,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    splits: Mapping[str, Sequence[Example]] | None = None,
    spec: EvaluationSpec | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Row]]:
    """Measure what a benchmark asks, in its own way where it has one (:class:`soul.benchmarks.base.Measures`).

    Args:
        benchmark: What to measure.
        model: A causal language model.
        tokenizer: Its tokenizer.
        splits: The benchmark's splits where they are loaded already.
        spec: Batch sizes and lengths.
        folder: Where ``<split>.jsonl`` is kept, see :func:`evaluate`.
        progress: Called with (what, done, of) as work goes on.

    Example:
        >>> rows = measure(Tofu(forget="forget01"), model, tokenizer)  # doctest: +SKIP
    """
    spec = spec_for(benchmark, spec or EvaluationSpec())
    if isinstance(benchmark, Measures):  # in a way that cannot be divided
        return processes.from_main(
            lambda: benchmark.measure(model, tokenizer, spec=spec, folder=folder, progress=progress)
        )
    found = benchmark.splits() if splits is None else splits
    asks = {name: ask for name, ask in benchmark.asks().items() if name in found}  # data may lack a split
    return evaluate(model, tokenizer, found, spec=spec, folder=folder, progress=progress, asks=asks)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Example]],
    *,
    spec: EvaluationSpec | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    asks: Asks | None = None,
) -> dict[str, list[Row]]:
    """Measure likelihoods of the answer, its paraphrase and the wrong answers, and generate an answer greedily.

    Args:
        model: A causal language model; it is run in its own dtype, without autocast.
        tokenizer: Its tokenizer.
        splits: Examples by split.
        spec: Batch sizes and lengths.
        folder: Where ``<split>.jsonl`` is written as splits are done; what is already there is not measured again.
            Splits too small to fill a batch of answers share one, and are done together.
        progress: Called with (what, done, of) as work goes on.
        asks: What to measure, by split; likelihoods and a greedy answer on those not named.

    Returns:
        One :class:`soul.types.Row` an example, by split, in the order given. Several processes measure a share each and
        all return all of them; the main one writes.

    Raises:
        ValueError: ``asks`` names a split that is not there.
    """
    spec = spec or EvaluationSpec()
    unknown = [name for name in asks or {} if name not in splits]
    if unknown:
        raise ValueError(f"asked about {', '.join(unknown)}, but the splits are {', '.join(splits) or 'none'}")
    template = ChatTemplate(tokenizer, spec.max_length, "evaluation.max_length")
    asks = {name: _lifted((asks or {}).get(name, _PLAIN), of, template, spec) for name, of in splits.items()}
    report = progress or _silent
    was_training = model.training
    model.eval()
    try:
        result: dict[str, list[Row]] = {}
        for names in _groups(splits, spec, asks):
            group = {name: splits[name] for name in names}
            files = {name: folder / f"{name}.jsonl" if folder else None for name in names}
            rows = processes.from_main(functools.partial(_read_all, files, group, spec, asks))
            # all of them, so that batches do not depend on interruptions
            if any(found is None for found in rows.values()):
                rows = _by_shares(model, template, group, spec, asks, report)
                for name, file in files.items():
                    if file is not None and processes.is_main():
                        write_lines(file, rows[name])
            result |= {name: found or [] for name, found in rows.items()}
        return result
    finally:
        model.train(was_training)


def _by_shares(
    model: Any,
    template: ChatTemplate,
    splits: Mapping[str, Sequence[Example]],
    spec: EvaluationSpec,
    asks: Asks,
    report: Progress,
) -> dict[str, list[Row]]:
    """Measure what several processes each take a share of, and return the rows of all in order."""
    named = {name: [dataclasses.replace(e, id=e.id or str(i)) for i, e in enumerate(of)] for name, of in splits.items()}
    shares = {name: processes.share(examples) for name, examples in named.items()}
    parts = processes.each(lambda: _measure(model, template, shares, spec, asks, report))
    return {name: processes.woven([rows[name] for rows in parts]) for name in named}


def _new_tokens(spec: EvaluationSpec, ask: Ask) -> int:
    return ask.max_new_tokens or spec.max_new_tokens


def _lifted(ask: Ask, examples: Sequence[Example], template: ChatTemplate, spec: EvaluationSpec) -> Ask:
    """Return what is asked with the limit of its answers, where it is to be that of the longest true one."""
    if not ask.whole or not spec.generate:
        return ask
    longest = max((len(template.answer_ids(e)) for e in examples if e.prompt), default=0)
    return dataclasses.replace(ask, max_new_tokens=max(longest, _new_tokens(spec, ask)))


def _groups(splits: Mapping[str, Sequence[Example]], spec: EvaluationSpec, asks: Asks | None = None) -> list[list[str]]:
    """Return neighbouring splits that fit into one batch of answers together, in order."""
    groups: list[list[str]] = []
    room, limit = 0, 0
    for name, examples in splits.items():
        ask = (asks or {}).get(name, _PLAIN)
        generates = spec.generate and ask.generate
        asked = sum(bool(e.prompt) for e in examples) if generates else 0
        if not groups or asked > room or not generates or limit != _new_tokens(spec, ask):
            groups.append([])
            room, limit = spec.generation_batch, _new_tokens(spec, ask) if generates else -1
        groups[-1].append(name)
        room -= asked
    return groups


def _silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def _read_all(
    files: Mapping[str, Path | None], splits: Mapping[str, Sequence[Example]], spec: EvaluationSpec, asks: Asks
) -> dict[str, list[Row] | None]:
    return {name: _read_rows(files[name], examples, spec, asks[name]) for name, examples in splits.items()}


def _read_rows(file: Path | None, examples: Sequence[Example], spec: EvaluationSpec, ask: Ask) -> list[Row] | None:
    """Return rows measured earlier if they are of exactly these examples and hold what is asked beyond the usual."""
    if file is None or not file.is_file():
        return None
    try:
        rows: list[Any] = read_lines(file)
        same = [row["of"] for row in rows] == [_named(e, i) for i, e in enumerate(examples)]
        return rows if same and all(_complete(row, spec, ask) for row in rows) else None
    except (ValueError, KeyError):  # damaged, or of a version that did not say of what: it is measured again
        return None


def _named(example: Example, index: int) -> str:
    """Return a digest of all that a row is measured of: its question in its conversation, and all of its answers."""
    return str(of_items([dataclasses.replace(example, id=example.id or str(index))])["digest"])[:16]


def _complete(row: Row, spec: EvaluationSpec, ask: Ask) -> bool:
    samples = ask.samples if spec.generate and row["prompt"] else 0
    generated = spec.generate and ask.generate and row["prompt"]
    return (
        (not ask.likelihood or row["tokens"] > 0)
        and (not generated or "generated" in row)
        and (not ask.tokens or "ends" in row)
        and (not ask.gradient_norm or "gradient_norm" in row)
        and (not samples or len(row.get("samples", ())) == samples)
    )


def _measure(
    model: Any,
    template: ChatTemplate,
    splits: Mapping[str, Sequence[Example]],
    spec: EvaluationSpec,
    asks: Asks,
    report: Progress,
) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for name, examples in splits.items():
        rows[name] = _likelihoods(model, template, name, examples, spec, asks[name], report)
        if asks[name].gradient_norm:
            encoded = [template.encode(e, index=i, where=name) for i, e in enumerate(examples)]
            norms = gradient_norms(model, encoded, progress=_part(report, f"{name}: gradients"))
            for row, norm in zip(rows[name], norms, strict=True):
                row["gradient_norm"] = norm
        if spec.generate and asks[name].samples:
            _sample(model, template, name, examples, rows[name], spec, asks[name], report)
    asked = [(name, i) for name, of in splits.items() if asks[name].generate for i, e in enumerate(of) if e.prompt]
    if not spec.generate or not asked:
        return rows
    prompts = [template.prompt_ids(splits[name][i]) for name, i in asked]
    what = ", ".join(dict.fromkeys(name for name, _ in asked))
    answers = write(
        model,
        template,
        prompts,
        max_new_tokens=_new_tokens(spec, asks[asked[0][0]]),  # a group has one limit
        rows=spec.generation_batch,
        progress=_part(report, f"{what}: answers"),
    )
    for (name, i), answer in zip(asked, answers, strict=True):
        row, example = rows[name][i], splits[name][i]
        row["generated"] = answer.text
        row["rougeL_recall"] = rouge_l_recall(answer.text, example.answer)
        mark(row, "generated", _is_short(template, example, asks[name], [answer]))
    return rows


def _is_short(template: ChatTemplate, example: Example, ask: Ask, found: Sequence[Written]) -> bool:
    """Say whether one of the answers was cut off before it had the tokens of the true one that it is compared with."""
    tokens = len(template.answer_ids(example)) if ask.compared else 0
    return any(0 < answer.cut < tokens for answer in found)


def _part(report: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, of: report(what, done, of)


def _likelihoods(
    model: Any,
    template: ChatTemplate,
    name: str,
    examples: Sequence[Example],
    spec: EvaluationSpec,
    ask: Ask,
    report: Progress,
) -> list[Row]:
    """Return rows with likelihoods; where tokens are asked for, the answer's own comes from the same pass as they."""
    rows: list[Row] = [
        {
            "id": e.id or str(i),
            "subject": e.subject,
            "prompt": e.prompt,
            "answer": e.answer,
            "of": _named(e, i),
            "nll": math.nan,
            "tokens": 0,
        }
        for i, e in enumerate(examples)
    ]
    if ask.tokens:
        _tokens(model, template, name, examples, rows, spec, report)
    if not ask.likelihood:
        return rows
    texts: list[tuple[int, str, Encoded]] = []  # (example, which answer, tokens)
    encode = functools.partial(template.encode, where=name)
    for i, example in enumerate(examples):
        if not ask.tokens:
            texts.append((i, "answer", encode(example, index=i)))
        if example.paraphrased_answer is not None:
            texts.append((i, "paraphrase", encode(example, answer=example.paraphrased_answer, index=i)))
        texts += [(i, "wrong", encode(example, answer=wrong, index=i)) for wrong in example.wrong_answers]
    nll = sequence_nll(
        model,
        [t[2] for t in texts],
        pad_id=template.pad,
        max_tokens=spec.max_tokens,
        progress=_part(report, f"{name}: likelihoods"),
    )
    for (i, kind, encoded), value in zip(texts, nll, strict=True):
        mark(rows[i], "likelihood", encoded.lost > 0)
        if kind == "answer":
            rows[i]["nll"], rows[i]["tokens"] = value, encoded.answer_length
        elif kind == "paraphrase":
            rows[i]["paraphrased_nll"] = value
        else:
            rows[i].setdefault("wrong_nll", []).append(value)
    return rows


def _tokens(
    model: Any,
    template: ChatTemplate,
    name: str,
    examples: Sequence[Example],
    rows: Sequence[Row],
    spec: EvaluationSpec,
    report: Progress,
) -> None:
    encoded = [template.encode(example) for example in examples]
    found = token_scores(
        model,
        encoded,
        pad_id=template.pad,
        max_tokens=spec.max_tokens,
        progress=_part(report, f"{name}: tokens"),
    )
    for row, example, text, scores in zip(rows, examples, encoded, found, strict=True):
        mark(row, "likelihood", text.lost > 0)
        row["nll"], row["tokens"] = -math.fsum(scores.logps) / len(scores.logps), len(scores.logps)
        row["token_logps"], row["token_matches"], row["token_z"] = scores
        row["ends"] = ends(example) and not text.lost


def _sample(
    model: Any,
    template: ChatTemplate,
    name: str,
    examples: Sequence[Example],
    rows: Sequence[Row],
    spec: EvaluationSpec,
    ask: Ask,
    report: Progress,
) -> None:
    asked = [i for i, example in enumerate(examples) if example.prompt]
    answers = sample_answers(
        model,
        template,
        [template.prompt_ids(examples[i]) for i in asked],
        [f"{name}/{rows[i]['id']}" for i in asked],
        ask,
        max_new_tokens=_new_tokens(spec, ask),
        rows=spec.generation_batch,
        progress=_part(report, f"{name}: samples"),
    )
    for i, found in zip(asked, answers, strict=True):
        rows[i]["samples"] = [answer.text for answer in found]
        mark(rows[i], "samples", _is_short(template, examples[i], ask, found))


def generate(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    spec: EvaluationSpec,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer prompts greedily, in batches of similar length, each row stopping at its end-of-turn token."""
    return continue_prompts(
        model,
        template,
        prompts,
        max_new_tokens=spec.max_new_tokens,
        rows=spec.generation_batch,
        progress=progress,
    )
