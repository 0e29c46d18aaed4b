"""The only place that runs a model without training it: batched, fp32, resumable split by split."""

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
        folder: Where ``<split>.jsonl`` is written as each split is done; splits already there are not measured again.
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
    for name, examples in splits.items():
        file = folder / f"{name}.jsonl" if folder else None
        rows = _read_rows(file, examples)
        if rows is None:
            rows = _measure(model, template, name, examples, spec, report)
            if file is not None:
                write_lines(file, rows)
        result[name] = rows
    model.train(was_training)
    return result


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
    asked = [i for i, e in enumerate(examples) if e.prompt and spec.generate]
    prompts = [template.prompt_ids(examples[i]) for i in asked]
    answers = generate(model, template, prompts, spec, lambda d, n: report(f"{name}: answers", d, n))
    for i, text in zip(asked, answers, strict=True):
        rows[i]["generated"] = text
        rows[i]["rougeL_recall"] = rouge_l_recall(text, examples[i].answer)
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
