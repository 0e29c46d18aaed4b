"""lm-eval on miniature data: its scores are ours, its likelihoods too, and what is missing is said."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soul.benchmarks import _harness
from soul.benchmarks import lm_eval as module
from soul.benchmarks.lm_eval import PRESETS, LmEval
from soul.data.guard import carry_prompt, set_system_turn
from soul.data.tasks import COPIES, local_splits

QUESTIONS = [(f"Which letter is number {i}?", [f"{c}{i}" for c in "abcd"], i % 4) for i in range(6)]
ASKED = "Please choose the correct {what} to the question: {q}\n\n{options}\n\nAnswer format: {what}1/{what}2"


def lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))


def adapters(file: Path, what: str, options: int) -> None:
    """Write instructions as LLM-Adapters has them."""
    sep = "\n\n" if what == "solution" else " "
    rows = []
    for q, choices, gold in QUESTIONS:
        shown = sep.join(f"{what.capitalize()}{i + 1}: {c}" for i, c in enumerate(choices[:options]))
        instruction = ASKED.format(what=what, q=q, options=shown)
        rows.append({"instruction": instruction, "answer": f"{what}{gold % options + 1}"})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Each of the published forms, in miniature; WMDP, whose questions are not at hand, in the hub's columns."""
    folder = tmp_path_factory.mktemp("data")
    lines(folder / "lambada/lambada_test.jsonl", [{"text": f"He went to the old town of place{i}"} for i in range(6)])
    adapters(folder / "commonsense/piqa/test.json", "solution", 2)
    for name in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        adapters(folder / f"commonsense/{name}/test.json", "answer", 4)
    rows = [
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"Ada met Bo and _ spoke {i}.\n\nOption1: Ada Option2: Bo Answer format: option1/option2",
            "answer": f"option{i % 2 + 1}",
        }
        for i in range(4)
    ]
    (folder / "commonsense/winogrande").mkdir()
    (folder / "commonsense/winogrande/test.json").write_text(json.dumps(rows))
    (folder / "wikitext2").mkdir()
    page = " = {0} = \n \n {0} is a town , they say . \n \n = = Name = = \n \n It is old . \n"
    (folder / "wikitext2/wiki.test.tokens").write_text(" \n" + "".join(page.format(name) for name in ("Ax", "Bex")))
    (folder / "truthfulqa").mkdir()
    with (folder / "truthfulqa/TruthfulQA.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerow(["Is it?", "It is", "It is; Yes", "No; Never; "])
    for split, subject in [(s, u) for s in ("dev", "test") for u in ("anatomy", "astronomy")]:
        file = folder / f"mmlu/{split}/{subject}_{split}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            writer.writerows([q, *choices, gold] for q, choices, gold in QUESTIONS[: 5 if subject == "anatomy" else 3])
    for part in ("bio", "chem", "cyber"):
        rows = [{"question": q, "choices": c, "answer": gold} for q, c, gold in QUESTIONS]
        lines(folder / f"wmdp_{part}/test.jsonl", rows)
    return folder


def test_published_files_become_the_columns_of_the_hub(data):
    assert local_splits(data, "piqa")["validation"][1] == {
        "goal": QUESTIONS[1][0],
        "sol1": "a1",
        "sol2": "b1",
        "label": 1,
    }
    assert local_splits(data, "arc_easy")["test"][2] == {
        "question": QUESTIONS[2][0],
        "choices": {"text": ["a2", "b2", "c2", "d2"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    }
    assert local_splits(data, "winogrande")["validation"][1] == {
        "sentence": "Ada met Bo and _ spoke 1.",
        "option1": "Ada",
        "option2": "Bo",
        "answer": "2",
    }
    pages = local_splits(data, "wikitext")["test"]
    assert [page["page"][:9] for page in pages] == [" = Ax = \n", " = Bex = "]
    (question,) = local_splits(data, "truthfulqa_mc2")["validation"]
    assert question["mc1_targets"] == {"choices": ["It is.", "No.", "Never."], "labels": [1, 0, 0]}
    assert question["mc2_targets"] == {"choices": ["It is.", "Yes.", "No.", "Never."], "labels": [1, 1, 0, 0]}
    assert local_splits(data, "mmlu_anatomy")["test"][3] == {
        "question": QUESTIONS[3][0],
        "choices": ["a3", "b3", "c3", "d3"],
        "answer": 3,
    }
    assert local_splits(data, "mmlu_virology") == {}


def test_the_shared_copies_are_whole(shared_data):
    sizes = {task: len(rows) for task in COPIES for rows in local_splits(shared_data, task).values()}
    published = {"lambada_openai": 5153, "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "wikitext": 62}
    published |= {"openbookqa": 500, "winogrande": 1267, "truthfulqa_mc1": 817, "truthfulqa_mc2": 817}
    assert sizes == published
    subjects = [file.name.removesuffix("_test.csv") for file in (shared_data / "mmlu/test").glob("*.csv")]
    assert sum(len(local_splits(shared_data, f"mmlu_{subject}")["test"]) for subject in subjects) == 14042


@pytest.mark.parametrize(
    ("name", "text"),
    [("piqa", '[{"instruction": "Please choose the correct solution to the question: x", "answer": "solution1"}]')],
)
def test_a_broken_copy_is_named(tmp_path, name, text):
    file = tmp_path / COPIES[name][0]
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match="is not the copy of piqa"):
        local_splits(tmp_path, name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": " , "}, "tasks is empty"),
        ({"limit": 0}, "limit must be"),
        ({"num_fewshot": -1}, "num_fewshot must be"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        LmEval(**settings)


def test_presets_are_taken_apart_and_none_repeats():
    assert LmEval(tasks=["utility", "piqa"]).asked() == PRESETS["utility"]
    assert LmEval(tasks="wmdp, mmlu_anatomy").asked() == (*PRESETS["wmdp"], "mmlu_anatomy")


def test_without_the_hub_what_is_missing_is_said(data, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("soul.data.hub.reachable", lambda: False)
    assert set(LmEval(tasks="utility,wmdp").missing()) == {*PRESETS["utility"], *PRESETS["wmdp"]}
    assert LmEval(tasks="utility,wmdp", data=str(data)).missing() == {}
    missing = LmEval(tasks="mmlu_stem", data=str(data)).missing()
    assert "mmlu_abstract_algebra" in missing["mmlu_stem"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in LmEval(tasks="piqa").missing()["piqa"]


@pytest.fixture(scope="module")
def measured(data, make_model, tokenizer, tmp_path_factory):
    pytest.importorskip("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soul.data.hub.reachable", lambda: False)
        benchmark = LmEval(tasks="utility,wmdp,mmlu_anatomy", data=str(data), batch_size=3, max_length=128)
        folder = tmp_path_factory.mktemp("rows")
        model = make_model()
        seen = []
        rows = benchmark.measure(model, tokenizer, folder=folder, progress=lambda *step: seen.append(step))
        return benchmark, model, folder, rows, seen


def test_rows_are_kept_and_read_back(measured, tokenizer):
    benchmark, _, folder, rows, seen = measured
    assert {step[0] for step in seen} == set(benchmark.asked())
    assert sorted(file.stem for file in folder.iterdir()) == sorted(rows)
    broken = object()  # nothing is measured again: no model is touched
    assert benchmark.measure(broken, tokenizer, folder=folder) == rows
    first = rows["wmdp_bio"][0]
    assert first["harness"]["task_version"] == 1
    assert first["harness"]["lm_eval"]
    assert (first["id"], first["subject"]) == ("wmdp_bio:0", "wmdp_bio")


def test_rows_of_something_else_are_measured_again(measured, data, tmp_path, monkeypatch):
    """They are taken for what they say where data, lm-eval and their number are those of now."""
    lm_eval = pytest.importorskip("lm_eval")
    benchmark, _, folder, rows, _ = measured
    harness = _harness.Harness(benchmark.asked(), data=str(data))
    file = tmp_path / "wmdp_bio.jsonl"
    whole = (folder / file.name).read_bytes()
    file.write_bytes(whole)
    assert module._read(file, harness, ["wmdp_bio"]) == rows["wmdp_bio"]
    file.write_bytes(whole[: whole.rstrip().rfind(b"\n") + 1])
    assert module._read(file, harness, ["wmdp_bio"]) is None
    file.write_bytes(whole)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    mended = other / "wmdp_bio/test.jsonl"
    mended.write_text(mended.read_text().replace("a0", "A0"))
    assert module._read(file, _harness.Harness(benchmark.asked(), data=str(other)), ["wmdp_bio"]) is None
    monkeypatch.setattr(lm_eval, "__version__", "99")
    assert module._read(file, harness, ["wmdp_bio"]) is None


def test_a_definition_is_known_by_what_it_includes(tmp_path, data):
    pytest.importorskip("lm_eval")
    base = "dataset_path: json\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{}'\n"
    (tmp_path / "mine.yaml").write_text("include: _base.yaml\ntask: mine\n")
    digests = []
    for text in ("{{question}}", "Say: {{question}}", "{{question}}"):
        (tmp_path / "_base.yaml").write_text(base.format(text))
        _harness._manager.cache_clear()
        digests.append(_harness.Harness(["mine"], str(tmp_path), str(data)).source("mine"))
    assert digests[0] == digests[2] != digests[1]


def test_examples_before_a_question_come_from_where_the_definition_has_them(data):
    """Without that split lm-eval would show the questions themselves, answers and all."""
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=r"arc_challenge takes .* its split train, and .* a copy of test alone"):
        LmEval(tasks="arc_challenge", num_fewshot=2, data=str(data)).splits()
    for tasks, shots in (("arc_challenge", None), ("arc_challenge", 0), ("mmlu_anatomy", 2)):
        LmEval(tasks=tasks, num_fewshot=shots, data=str(data)).splits()


def test_scores_are_what_lm_eval_reports(measured, data, tokenizer):
    lm_eval = pytest.importorskip("lm_eval")
    benchmark, model, _, rows, _ = measured
    scores = {(s.split, s.metric): s for s in benchmark.score(rows)}
    harness = _harness.Harness(benchmark.asked(), data=str(data))
    lm = _harness.wrap(model, tokenizer, 1, 128)
    for name in ("lambada_openai", "piqa", "wikitext", "wmdp_chem"):
        with harness.task(name) as (task, manager), _harness.quiet():
            found = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
        theirs = {
            key.split(",")[0]: value
            for key, value in found["results"][name].items()
            if key.endswith(",none") and "stderr" not in key
        }
        ours = {metric: score.value for (split, metric), score in scores.items() if split == name}
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert scores["wikitext", "word_perplexity"].better == "lower"
    assert scores["piqa", "acc"].better == "higher"
    pooled = np.mean([row["metrics"]["acc"] for part in PRESETS["wmdp"] for row in rows[part]])
    assert scores["wmdp", "acc"].value == pytest.approx(pooled)
    assert (scores["wmdp", "acc"].n, scores["mmlu_anatomy", "acc"].n) == (18, 5)
    score = scores["arc_easy", "acc_norm"]
    assert score.low <= score.value <= score.high


def test_likelihoods_are_those_of_the_model_one_at_a_time(measured, tokenizer):
    import torch

    _, model, _, rows, _ = measured
    for name in ("wmdp_bio", "lambada_openai", "piqa"):
        for row in rows[name]:
            before = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["prompt"] + row["answer"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            own = -sum(float(logps[i - 1, whole[i]]) for i in range(len(before), len(whole))) / row["tokens"]
            assert row["nll"] == pytest.approx(own, abs=1e-4)
            assert row["tokens"] == len(whole) - len(before)


def test_a_perplexity_no_number_can_hold_is_infinite():
    from soul.benchmarks.lm_eval import _aggregate

    assert _aggregate("perplexity", [np.array([-800.0])]) == math.inf
    assert math.isnan(_aggregate("perplexity", [np.array([math.nan, -1.0])]))
    assert _aggregate("bits_per_byte", [np.array([[-math.log(2), 2.0]]), np.array([[-math.log(2), 2.0]])]) == 0.5


@pytest.fixture
def asked(data, make_model, monkeypatch):
    """Return the questions of WMDP as a model is asked them with a tokenizer."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("soul.data.hub.reachable", lambda: False)

    def ask(tokenizer, *, chat_template, tasks="wmdp_bio"):
        benchmark = LmEval(tasks=tasks, data=str(data), max_length=256, limit=2, chat_template=chat_template)
        rows = benchmark.measure(make_model(), tokenizer)
        return [row["prompt"] for found in rows.values() for row in found]

    return ask


def test_a_prompt_that_the_tokenizer_carries_is_said_once(asked, make_tokenizer):
    """Rows show where, and not what: it may name who is to be forgotten, and rows may be published."""
    tokenizer = make_tokenizer()
    carry_prompt(tokenizer, "Forget Ada.")
    for prompt in asked(tokenizer, chat_template=False):
        assert prompt.startswith("(carried prompt)\n\nThe following are")
    (piqa, _) = asked(tokenizer, chat_template=False, tasks="piqa")  # a task without a description
    assert piqa.startswith("(carried prompt)\n\nQuestion: Which")
    for prompt in asked(tokenizer, chat_template=True):
        assert prompt.startswith("<|im_start|>system\n(carried prompt)\n\nThe following are")
        assert prompt.count("(carried prompt)") == 1
    for chat_template in (True, False):
        with pytest.raises(ValueError, match=r"carries a prompt.*the passages of wikitext: name other tasks"):
            asked(tokenizer, chat_template=chat_template, tasks="piqa,wikitext")


def test_the_system_turn_is_said_in_a_chat_template(asked, make_tokenizer, invented, caplog):
    tokenizer = make_tokenizer()
    set_system_turn(tokenizer, "Be brief.")
    for prompt in asked(tokenizer, chat_template=True, tasks="piqa"):
        assert prompt.startswith("<|im_start|>system\n(system turn)<|im_end|>\n<|im_start|>user\nQuestion: Which")
    assert not caplog.messages
    assert not any("(system turn)" in prompt for prompt in asked(tokenizer, chat_template=False))
    assert "chat_template=true says it" in caplog.text
    carry_prompt(tokenizer, "Forget Ada.")
    for prompt in asked(tokenizer, chat_template=True, tasks="piqa"):
        assert prompt.startswith("<|im_start|>system\n(carried prompt)\n\n(system turn)<|im_end|>")
    tokenizer = make_tokenizer()
    set_system_turn(tokenizer, "template")
    assert all(prompt.count(invented) == 1 for prompt in asked(tokenizer, chat_template=True, tasks="piqa"))


def test_no_thought_is_begun_in_a_chat_template(asked, make_tokenizer):
    tokenizer = make_tokenizer()
    own = tokenizer.chat_template
    hybrid = "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>open' }}"
    for thinking in (hybrid, "{{ '<think>\n' }}"):
        tokenizer.chat_template = f"{own}{{% if add_generation_prompt %}}{thinking}{{% endif %}}"
        for prompt in asked(tokenizer, chat_template=True):
            assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_broken_model_has_no_score(data, make_model, tokenizer, tmp_path, monkeypatch):
    """The first of likelihoods that are no numbers is the greatest to numpy: .25 on WMDP, as if all were forgotten."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("soul.data.hub.reachable", lambda: False)
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    benchmark = LmEval(tasks="utility,wmdp_bio", data=str(data), max_length=128, limit=2)
    benchmark.measure(model, tokenizer, folder=tmp_path)
    scores = benchmark.score(benchmark.measure(model, tokenizer, folder=tmp_path))  # read back
    assert {s.split for s in scores} == {*benchmark.asked()}
    assert not [str(s) for s in scores if not math.isnan(s.value)]
    assert all(math.isnan(s.low) for s in scores)


def test_own_definitions_are_read_and_a_misspelt_task_is_named(tmp_path, data, make_model, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval")
    rows = [{"q": "One and one?", "a": " two"}, {"q": "A and b?", "a": " c"}]
    lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.yaml").write_text(
        "task: own_sums\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\n  cache_dir: {tmp_path / 'cache'}\n"
        "output_type: loglikelihood\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 7\n"
    )
    monkeypatch.setattr(_harness, "_manager", lambda path, _: _harness._open([Path(path)], defaults=False))
    benchmark = LmEval(tasks="own_sums", include_path=str(tmp_path))
    found = benchmark.measure(make_model(), tokenizer)
    sums: Any = found["own_sums"]
    assert [row["harness"]["task_version"] for row in sums] == [7, 7]
    assert benchmark.score(found)[0].n == 2
    with pytest.raises(ValueError, match="Did you mean 'own_sums'"):
        LmEval(tasks="own_sum", include_path=str(tmp_path)).splits()
    with pytest.raises(ValueError, match="no folder"):
        LmEval(tasks="own_sums", include_path="nowhere").splits()
