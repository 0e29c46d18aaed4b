"""Evaluation in groups of splits: what is batched together, and that an interruption changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from soul import evaluate as module
from soul import generation
from soul.benchmarks.base import Benchmark
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, evaluate, measure
from soul.generation import Written, sample_answers, write
from soul.truncation import truncation_warnings
from soul.types import Ask, Example, Row, Score

Make = Callable[..., LlamaForCausalLM]


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
    write = module.write

    def counted(model: Any, template: Any, prompts: Any, **how: Any) -> list[Written]:
        asked.append(len(prompts))
        return write(model, template, prompts, **how)

    monkeypatch.setattr(module, "write", counted)
    (tmp_path / "rows/two.jsonl").unlink()
    again = evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path / "rows")
    assert asked == [5]  # the group of the missing split, and no other
    assert again == whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()} == kept
    assert list(again) == list(splits)
    for hurt in (kept["three.jsonl"][:-30], b"{}\n", b"not json\n", b"\xff\n"):  # cut short, or damaged: measured again
        (tmp_path / "rows/three.jsonl").write_bytes(hurt)
        assert evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path / "rows") == whole
        assert {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()} == kept


def test_splits_that_ask_for_answers_of_another_length_do_not_share_a_batch() -> None:
    splits = {name: [Example("q", "a")] for name in "abcde"}
    asks = {"b": Ask(max_new_tokens=9), "c": Ask(max_new_tokens=9), "d": Ask(generate=False)}
    assert module._groups(splits, EvaluationSpec(), asks) == [["a"], ["b", "c"], ["d"], ["e"]]
    asks = {"a": Ask(max_new_tokens=128), "b": Ask(tokens=True)}  # the same as the evaluation's own, and no length
    assert module._groups(splits, EvaluationSpec(), asks) == [[*"abcde"]]


def test_rows_hold_what_is_asked(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    examples = [dataclasses.replace(e, wrong_answers=("No.", "Yes.")) for e in forget_set]
    splits = {"plain": examples, "all": [*examples, Example("", "a passage", chat=False)], "little": examples}
    everything = Ask(max_new_tokens=5, tokens=True, gradient_norm=True, samples=2)
    asks = {"all": everything, "little": Ask(likelihood=False, generate=False)}
    spec = EvaluationSpec(max_new_tokens=4)
    rows = evaluate(make_model(), tokenizer, splits, spec=spec, asks=asks)
    usual = {"id", "subject", "prompt", "answer", "of", "nll", "tokens"}
    assert set(rows["plain"][0]) == usual | {"wrong_nll", "generated", "rougeL_recall", "truncated"}
    assert rows["plain"] == evaluate(make_model(), tokenizer, {"plain": examples}, spec=spec)["plain"]
    more = {"token_logps", "token_matches", "token_z", "ends", "gradient_norm"}
    assert set(rows["all"][0]) == set(rows["plain"][0]) | more | {"samples"}
    assert set(rows["all"][-1]) == usual | more  # nothing to answer
    pairs: Any = zip(rows["plain"], rows["all"], strict=False)  # keys that a row need not have
    for one, other in pairs:
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-5)
        assert other["nll"] == pytest.approx(-sum(other["token_logps"]) / other["tokens"], rel=1e-12)
        assert other["wrong_nll"] == pytest.approx(one["wrong_nll"], rel=1e-5)
        assert len(other["samples"]) == 2
        assert other["tokens"] == one["tokens"] == len(other["token_z"])
    assert set(rows["little"][0]) == usual
    assert math.isnan(rows["little"][0]["nll"])
    assert rows["little"][0]["tokens"] == 0
    silent = evaluate(
        make_model(), tokenizer, {"all": examples}, spec=EvaluationSpec(generate=False), asks={"all": everything}
    )
    assert set(silent["all"][0]) == usual | more | {"wrong_nll"}
    with pytest.raises(ValueError, match="asked about other, but the splits are plain"):
        evaluate(make_model(), tokenizer, {"plain": examples}, asks={"other": Ask()})


def test_an_interruption_changes_nothing_of_what_is_asked(
    tmp_path: Path, make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    model, spec = make_model(), EvaluationSpec(max_new_tokens=4, generation_batch=6)
    splits = {"one": forget_set[:3], "two": forget_set[3:]}
    asks = {"one": Ask(tokens=True, samples=2), "two": Ask(gradient_norm=True)}
    whole: Any = evaluate(model, tokenizer, splits, spec=spec, asks=asks)
    evaluate(model, tokenizer, {"one": splits["one"]}, spec=spec, asks={"one": asks["one"]}, folder=tmp_path)
    assert evaluate(model, tokenizer, splits, spec=spec, asks=asks, folder=tmp_path) == whole
    kept = (tmp_path / "one.jsonl").read_bytes()
    torch.manual_seed(123)  # no draw comes from here
    for more in (asks, {"one": Ask(tokens=True)}):  # what is there already and asked no longer is no harm
        evaluate(model, tokenizer, splits, spec=spec, asks=more, folder=tmp_path)
        assert (tmp_path / "one.jsonl").read_bytes() == kept
    rows: Any = evaluate(model, tokenizer, splits, spec=spec, asks=asks | {"one": Ask(samples=3)}, folder=tmp_path)
    assert [r["samples"][:2] for r in rows["one"]] == [r["samples"] for r in whole["one"]]
    rows = evaluate(model, tokenizer, splits, spec=spec, asks={"two": Ask(tokens=True)}, folder=tmp_path)
    assert "token_z" in rows["two"][0]


def test_lines_with_unusual_separators_are_read_back(
    tmp_path: Path, make_model: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    splits = {"one": [Example("What\u2028now?", "A\x85b")]}
    model, spec = make_model(), EvaluationSpec(generate=False)
    rows = evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path)
    assert evaluate(model, tokenizer, splits, spec=spec, folder=tmp_path) == rows
    assert len([json.loads(x) for x in (tmp_path / "one.jsonl").read_text(encoding="utf-8").split("\n") if x]) == 1


def test_a_failed_evaluation_leaves_the_model_in_training(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "sequence_nll", fail)
    model = make_model().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, tokenizer, {"one": [Example("q", "a")]})
    assert model.training


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": -1}, "samples must be 0 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ({"temperature": 0.0}, "for greedy answers use generate"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
    ],
)
def test_what_cannot_be_asked_is_a_value_error(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ask(**setting)


@dataclasses.dataclass(frozen=True)
class Asking(Benchmark):
    """A benchmark of the usual kind."""

    examples: tuple[Example, ...]

    def splits(self) -> dict[str, list[Example]]:
        return {"forget": list(self.examples), "kept": list(self.examples)}

    def asks(self) -> dict[str, Ask]:
        return {"forget": Ask(generate=False, tokens=True)}

    def score(self, rows: Mapping[str, Sequence[Row]], reference: Any = None) -> list[Score]:
        return []


@dataclasses.dataclass(frozen=True)
class Measuring(Asking):
    """A benchmark that runs the model itself."""

    def measure(self, model: Any, tokenizer: Any, *, spec: Any, folder: Any, progress: Any) -> dict[str, list[Row]]:
        assert isinstance(spec, EvaluationSpec)
        return {"own": [Row(id="1", subject="", prompt=str(model), answer=str(folder), nll=1.0, tokens=1)]}


def test_a_benchmark_is_measured_as_it_asks_or_measures_itself(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    spec = EvaluationSpec(max_new_tokens=3)
    rows = measure(Asking(tuple(forget_set[:2])), make_model(), tokenizer, spec=spec)
    assert "token_z" in rows["forget"][0]
    assert "generated" not in rows["forget"][0]
    assert "generated" in rows["kept"][0]
    given = measure(Asking(()), make_model(), tokenizer, splits={"kept": forget_set[:1]}, spec=spec)
    assert [len(found) for found in given.values()] == [1]  # and no word of the split that is not there
    assert measure(Measuring(()), "model", tokenizer)["own"][0]["prompt"] == "model"


def alone(model: Any, template: ChatTemplate, example: Example, answer: str) -> float:
    """Return the mean answer log-probability of one unpadded row, in the model's own precision."""
    row = template.encode(example, answer=answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    loss = torch.nn.functional.cross_entropy(
        logits[row.answer_start - 1 : -1].float(), torch.tensor(row.input_ids[row.answer_start :])
    )
    return -float(loss)


def test_in_batches_equals_one_at_a_time(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example], retain_set: list[Example]
) -> None:
    model: Any = make_model(seed=3)
    template = ChatTemplate(tokenizer)
    texts = [e.answer for e in retain_set]
    examples = [
        dataclasses.replace(e, paraphrased_answer=texts[i], wrong_answers=tuple(texts[i + 1 :]))
        for i, e in enumerate(forget_set)
    ]
    spec = EvaluationSpec(max_new_tokens=12)
    for ask in (Ask(), Ask(tokens=True)):
        rows: Any = evaluate(model, tokenizer, {"one": examples}, spec=spec, asks={"one": ask})["one"]
        for row, e in zip(rows, examples, strict=True):
            assert -row["nll"] == pytest.approx(alone(model, template, e, e.answer), abs=1e-5)
            assert -row["paraphrased_nll"] == pytest.approx(
                alone(model, template, e, e.paraphrased_answer or ""), abs=1e-5
            )
            wrong = [alone(model, template, e, answer) for answer in e.wrong_answers]
            assert [-x for x in row["wrong_nll"]] == pytest.approx(wrong, abs=1e-5)
            ids = torch.tensor([template.prompt_ids(e)])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                eos_token_id=template.end_of_turn, pad_token_id=template.pad,
            )  # fmt: skip
            tokens = out[0, ids.shape[1] :].tolist()
            tokens = tokens[: tokens.index(template.end_of_turn)] if template.end_of_turn in tokens else tokens
            assert row["generated"] == str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def test_an_answer_ends_where_learned_positions_do(
    make_model: Make, make_tokenizer: Callable[..., PreTrainedTokenizerFast], forget_set: list[Example]
) -> None:
    tokenizer = make_tokenizer()
    template = ChatTemplate(tokenizer)
    prompt = template.prompt_ids(forget_set[0])
    asked: list[int] = []
    model: Any = make_model()
    plain = model.generate
    model.generate = lambda **given: asked.append(given["max_new_tokens"]) or plain(**given)
    tokenizer.model_max_length = len(prompt) + 3
    module.generate(model, template, [prompt], EvaluationSpec(max_new_tokens=9))
    assert asked == [3]
    tokenizer.model_max_length = len(prompt)
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        module.generate(model, template, [prompt], EvaluationSpec())


def test_an_answer_is_as_long_beside_a_long_prompt_as_alone(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(template=False)
    tokenizer.model_max_length = 64
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(config).eval()
    template = ChatTemplate(tokenizer)
    monkeypatch.setattr(ChatTemplate, "end_of_turn", len(tokenizer) + 1)  # none ends before its limit
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **_: " ".join(map(str, tokens)))
    prompts = [[7 + i] * n for i, n in enumerate((10, 60, 32, 63, 12, 60))]
    spec = EvaluationSpec(max_new_tokens=32)
    together = module.generate(model, template, prompts, spec)
    assert [len(text.split()) for text in together] == [32, 4, 32, 1, 32, 4]
    assert together == [module.generate(model, template, [prompt], spec)[0] for prompt in prompts]


def test_what_a_limit_cuts_off_is_said(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(tokenizer)
    short, long = Example("Who?", "Ada"), Example("Who?", "Ada, and nobody else but Ada")
    tokens = len(template.answer_ids(long))
    assert len(template.answer_ids(short)) < 6 < tokens
    passage = Example("", "so it goes " * 30, chat=False)
    splits = {"forget": [short, long, dataclasses.replace(short, wrong_answers=("no " * 90,)), passage]}
    model: Any = make_model()
    fitting = len(template.encode(long))

    def parts(ask: Ask, new: int = 6, length: int = fitting) -> list[list[str]]:
        spec = EvaluationSpec(max_new_tokens=new, max_length=length)
        rows = evaluate(model, tokenizer, splits, spec=spec, asks={"forget": ask})["forget"]
        return [row.get("truncated", []) for row in rows]

    cut, lost = ["generated"], ["likelihood"]
    assert parts(Ask()) == [[], cut, lost, lost]
    assert parts(Ask(tokens=True, generate=False)) == [[], [], lost, lost]
    assert parts(Ask(samples=2, likelihood=False)) == [[], ["generated", "samples"], [], []]
    assert parts(Ask(compared=False)) == [[], [], lost, lost]
    assert parts(Ask(), tokens) == parts(Ask(whole=True)) == [[], [], lost, lost]
    assert parts(Ask(), length=fitting - 1) == [[], ["generated", "likelihood"], lost, lost]
    monkeypatch.setattr(module, "write", lambda _model, _template, prompts, **_: [Written("No", 0)] * len(prompts))
    assert parts(Ask()) == [[], [], lost, lost], "the model ended it"
    rows: Any = [{"truncated": found} for found in ([], cut, ["generated", "likelihood"])]
    said = truncation_warnings({"forget": rows, "kept": rows[:1]})
    assert [line[:20] for line in said] == ["forget: 1 of 3 items", "forget: 2 of 3 items"]


def test_a_benchmark_of_long_texts_lifts_the_limit(
    monkeypatch: pytest.MonkeyPatch, make_model: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Long(Benchmark):
        longest = 2304

        def splits(self) -> dict[str, list[Example]]:
            return {}

        def score(self, rows: Any, reference: Any = None) -> list[Score]:
            return []

    seen: list[int] = []
    monkeypatch.setattr(module, "evaluate", lambda *_, spec, **__: seen.append(spec.max_length))
    for given in (None, EvaluationSpec(max_length=4000)):
        measure(Long(), make_model(), tokenizer, spec=given)
    assert seen == [2304, 4000]


def test_long_rows_are_written_in_smaller_batches(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model keeps keys and values of every position of a batch, those of the answers to come too."""
    template = ChatTemplate(tokenizer)
    model: Any = make_model()
    prompts = [template.prompt_ids(e) for e in forget_set]
    longest = max(map(len, prompts))
    whole = write(model, template, prompts, max_new_tokens=6, rows=64)
    shapes: list[tuple[int, ...]] = []
    inner = model.generate
    monkeypatch.setattr(model, "generate", lambda **how: shapes.append(how["input_ids"].shape) or inner(**how))
    monkeypatch.setattr(generation, "POSITIONS", 2 * (longest + 6))
    assert write(model, template, prompts, max_new_tokens=6, rows=64) == whole
    assert all(rows * (width + 6) <= 2 * (longest + 6) for rows, width in shapes)
    assert len(shapes) > 1


def test_what_a_publisher_adds_to_decoding_is_left_out(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    template, model = ChatTemplate(tokenizer), make_model()
    prompts = [template.prompt_ids(e) for e in forget_set]
    plain = module.generate(model, template, prompts, EvaluationSpec(max_new_tokens=12))
    defaults = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12)
    model.generation_config = defaults
    assert module.generate(model, template, prompts, EvaluationSpec(max_new_tokens=12)) == plain
    assert model.generation_config is defaults


def test_what_a_model_ends_a_text_with_ends_an_answer_too(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    template, model, spec = ChatTemplate(tokenizer), make_model(), EvaluationSpec(max_new_tokens=12)
    prompts = [template.prompt_ids(e) for e in forget_set[:3]]
    whole = write(model, template, prompts, max_new_tokens=12, rows=4)
    second = tokenizer(whole[0].text, add_special_tokens=False)["input_ids"][1]
    model.generation_config = GenerationConfig(eos_token_id=[second, template.end_of_turn])
    cut = write(model, template, prompts, max_new_tokens=12, rows=4)
    assert cut[0].cut == 0
    assert whole[0].text.startswith(cut[0].text)
    assert len(cut[0].text) < len(whole[0].text)
    assert module.generate(model, template, prompts, spec) == [answer.text for answer in cut]


def test_weights_that_have_diverged_still_give_samples(
    make_model: Make, tokenizer: PreTrainedTokenizerFast, forget_set: list[Example]
) -> None:
    template, model = ChatTemplate(tokenizer), make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    prompts = [template.prompt_ids(e) for e in forget_set[:2]]
    for top_p in (1.0, 0.9):
        ask = Ask(samples=2, top_p=top_p)
        found = sample_answers(model, template, prompts, ["a", "b"], ask, max_new_tokens=3, rows=4)
        assert [len(of) for of in found] == [2, 2]


def test_rows_say_whether_their_last_token_is_the_end_of_turn(
    make_model: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = [
        Example("Who is Mira?", "A poet of Graz."),
        Example("Mira is", "a poet of Graz", chat=False, ends=False),
        Example("", "Mira is a poet of Graz.", chat=False),
    ]
    spec = EvaluationSpec(generate=False)
    rows = module.evaluate(make_model(), tokenizer, {"x": examples}, asks={"x": Ask(tokens=True)}, spec=spec)["x"]
    assert [row.get("ends") for row in rows] == [True, False, False]
    template = ChatTemplate(tokenizer)
    assert [template.encode(e).input_ids[-1] == template.end_of_turn for e in examples] == [True, False, False]
    short = EvaluationSpec(generate=False, max_length=len(template.encode(examples[0])) - 1)
    rows = module.evaluate(make_model(), tokenizer, {"x": examples[:1]}, asks={"x": Ask(tokens=True)}, spec=short)["x"]
    assert rows[0].get("ends") is False  # it lost its end
