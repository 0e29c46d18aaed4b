"""The only place that runs a model without training it: batched, fp32, resumable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from soul.data.batches import length_batches
from soul.data.templates import ChatTemplate, Encoded
from soul.likelihood import sequence_nll
from soul.metrics.text import rouge_l_recall
from soul.types import Example, Row

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """How to measure.

    Attributes:
        max_new_tokens: Longest generated answer.
        generate: Generate answers (for ROUGE-L); likelihoods are always measured.
        max_tokens: Padded tokens in a likelihood batch.
        generation_batch: Rows in a generation batch.
        max_length: Longest sequence.
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


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Example]],
    *,
    spec: EvaluationSpec | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
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

    Returns:
        One :class:`soul.types.Row` an example, by split, in the order given.
    """
    spec = spec or EvaluationSpec()
    template = ChatTemplate(tokenizer, spec.max_length)
    report = progress or _silent
    was_training = model.training
    model.eval()
    result: dict[str, list[Row]] = {}
    for names in _groups(splits, spec):
        group = {name: splits[name] for name in names}
        files = {name: folder / f"{name}.jsonl" if folder else None for name in names}
        rows = {name: _read_rows(files[name], examples) for name, examples in group.items()}
        if any(found is None for found in rows.values()):  # all of them, so that batches do not depend on interruptions
            rows = _measure(model, template, group, spec, report)
            for name, file in files.items():
                if file is not None:
                    write_lines(file, rows[name])
        result |= {name: found or [] for name, found in rows.items()}
    model.train(was_training)
    return result


def _groups(splits: Mapping[str, Sequence[Example]], spec: EvaluationSpec) -> list[list[str]]:
    """Return neighbouring splits that fit into one batch of answers together, in order."""
    groups: list[list[str]] = []
    room = 0
    for name, examples in splits.items():
        asked = sum(bool(e.prompt) for e in examples) if spec.generate else 0
        if not groups or asked > room or not spec.generate:
            groups.append([])
            room = spec.generation_batch
        groups[-1].append(name)
        room -= asked
    return groups


def _silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines so that the file is either whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


def _read_rows(file: Path | None, examples: Sequence[Example]) -> list[Row] | None:
    """Return rows measured earlier if they are of exactly these examples."""
    if file is None or not file.is_file():
        return None
    rows: list[Row] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    same = [(r["prompt"], r["answer"]) for r in rows] == [(e.prompt, e.answer) for e in examples]
    return rows if same else None


def _measure(
    model: Any,
    template: ChatTemplate,
    splits: Mapping[str, Sequence[Example]],
    spec: EvaluationSpec,
    report: Progress,
) -> dict[str, list[Row]]:
    rows = {name: _likelihoods(model, template, name, examples, spec, report) for name, examples in splits.items()}
    if not spec.generate:
        return rows
    asked = [(name, i) for name, examples in splits.items() for i, e in enumerate(examples) if e.prompt]
    prompts = [template.prompt_ids(splits[name][i]) for name, i in asked]
    what = ", ".join(dict.fromkeys(name for name, _ in asked))
    answers = generate(model, template, prompts, spec, lambda d, n: report(f"{what}: answers", d, n))
    for (name, i), text in zip(asked, answers, strict=True):
        rows[name][i]["generated"] = text
        rows[name][i]["rougeL_recall"] = rouge_l_recall(text, splits[name][i].answer)
    return rows


def _likelihoods(
    model: Any, template: ChatTemplate, name: str, examples: Sequence[Example], spec: EvaluationSpec, report: Progress
) -> list[Row]:
    texts: list[tuple[int, str, Encoded]] = []  # (example, which answer, tokens)
    for i, example in enumerate(examples):
        texts.append((i, "answer", template.encode(example)))
        if example.paraphrased_answer is not None:
            texts.append((i, "paraphrase", template.encode(example, answer=example.paraphrased_answer)))
        texts += [(i, "wrong", template.encode(example, answer=wrong)) for wrong in example.wrong_answers]
    nll = sequence_nll(
        model,
        [t[2] for t in texts],
        pad_id=template.pad,
        max_tokens=spec.max_tokens,
        progress=lambda d, n: report(f"{name}: likelihoods", d, n),
    )
    rows: list[Row] = [
        {"id": e.id or str(i), "subject": e.subject, "prompt": e.prompt, "answer": e.answer, "nll": 0.0, "tokens": 0}
        for i, e in enumerate(examples)
    ]
    for (i, kind, encoded), value in zip(texts, nll, strict=True):
        if kind == "answer":
            rows[i]["nll"], rows[i]["tokens"] = value, encoded.answer_length
        elif kind == "paraphrase":
            rows[i]["paraphrased_nll"] = value
        else:
            rows[i].setdefault("wrong_nll", []).append(value)
    return rows


@torch.no_grad()
def generate(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    spec: EvaluationSpec,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer prompts greedily, in batches of similar length, each row stopping at its end-of-turn token."""
    tokenizer = template.tokenizer
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    done = 0
    for group in length_batches([len(p) for p in prompts], 1 << 30, spec.generation_batch):
        width = max(len(prompts[i]) for i in group)
        pad = template.pad
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in group], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=spec.max_new_tokens,
            do_sample=False,
            eos_token_id=template.end_of_turn,
            pad_token_id=pad,
        )
        for i, tokens in zip(group, out[:, width:].tolist(), strict=True):
            if template.end_of_turn in tokens:
                tokens = tokens[: tokens.index(template.end_of_turn)]
            texts[i] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        done += len(group)
        if progress:
            progress(done, len(prompts))
    return texts
