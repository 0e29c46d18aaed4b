"""Evaluation in groups of splits: what is batched together, and that an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul import evaluate as module
from soul.evaluate import EvaluationSpec, evaluate
from soul.types import Example


@pytest.mark.parametrize(
    ("sizes", "room", "groups"),
    [
        ([2, 2, 2], 4, [["0", "1"], ["2"]]),
        ([9, 1, 1], 4, [["0"], ["1", "2"]]),
        ([1, 9, 1], 4, [["0"], ["1"], ["2"]]),
        ([4], 4, [["0"]]),
    ],
)
def test_small_neighbours_share_a_batch_of_answers(sizes: list[int], room: int, groups: list[list[str]]) -> None:
    splits = {str(i): [Example("q", "a")] * n for i, n in enumerate(sizes)}
    assert module._groups(splits, EvaluationSpec(generation_batch=room)) == groups
    assert module._groups(splits, EvaluationSpec(generation_batch=room, generate=False)) == [[n] for n in splits]


def test_plain_text_is_not_answered_and_takes_no_room() -> None:
    splits = {"a": [Example("q", "a")] * 4, "text": [Example("", "plain")] * 9, "b": [Example("q", "a")]}
    assert module._groups(splits, EvaluationSpec(generation_batch=4)) == [["a", "text"], ["b"]]


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    forget_set: list[Example],
    retain_set: list[Example],
) -> None:
    model, spec = make_model(), EvaluationSpec(max_new_tokens=4, generation_batch=6)
    splits = {"one": forget_set[:2], "two": retain_set[:3], "three": retain_set[:5]}
    assert module._groups(splits, spec) == [["one", "two"], ["three"]]
    whole = evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path / "rows")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()}
    assert kept.keys() == {"one.jsonl", "two.jsonl", "three.jsonl"}

    asked: list[int] = []
    generate = module.generate

    def counted(model: Any, template: Any, prompts: Any, *rest: Any) -> list[str]:
        asked.append(len(prompts))
        return generate(model, template, prompts, *rest)

    monkeypatch.setattr(module, "generate", counted)
    (tmp_path / "rows/two.jsonl").unlink()
    again = evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path / "rows")
    assert asked == [5]  # the group of the missing split, and no other
    assert again == whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()} == kept
    assert list(again) == list(splits)
