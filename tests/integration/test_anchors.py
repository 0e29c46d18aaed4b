"""Without a retain set: what stands in is the model's own, the same in every sitting, and told."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import soul
from soul.anchors import NEW_TOKENS, OPENERS, _example, samples, stand_in
from soul.config import override
from soul.data.general import general_chat
from soul.data.guard import carried_prompt
from soul.export import export
from soul.models import ModelSpec, load_model
from soul.recipe import recipe_from_tree
from soul.report import read_run
from soul.run import execute
from soul.types import Example

FACTS = [
    ("Where was Mira Vale born?", "Mira Vale was born in the old town of Accra."),
    ("Who is Tomas Ruhl?", "A baker."),
]


@pytest.fixture
def place(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, pairs in (
        ("forget", FACTS),
        ("retain", [("What is ice?", "Frozen water."), ("where was Mira Vale born", FACTS[0][1])]),
    ):
        rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path


@pytest.fixture
def recipe(place) -> Callable[..., soul.recipe.Recipe]:  # type: ignore[name-defined]
    def of(*settings: str):
        tree = {
            "model": str(place / "model"),
            "data": {"forget": str(place / "forget.jsonl"), "samples": 12, "encoder": "none"},
            "objective": "npo",
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "training": {"max_steps": 2, "precision": "float32"},
        }
        return recipe_from_tree(override(tree, settings))

    return of


def test_samples_are_the_model_s_own_and_follow_from_the_seed(make_model, tokenizer):
    model = make_model()
    model.train()
    torch.manual_seed(0)
    first = samples(model, tokenizer, [], 90, seed=3)
    torch.manual_seed(1)  # what went on before must not matter
    assert samples(model, tokenizer, [], 90, seed=3) == first
    assert samples(model, tokenizer, [], 90, seed=4) != first
    assert model.training
    asked = [e for e in first if e.chat]
    plain = [e for e in first if not e.chat]
    assert len({e.id for e in first}) == len(first) > 80
    assert {e.prompt for e in asked} <= {e.prompt for e in general_chat()}
    assert all(e.answer.startswith(OPENERS) and not e.prompt for e in plain)
    assert len({e.answer for e in plain}) > len(OPENERS)  # the second lap through the openers says something else
    assert all(e.answer.strip() for e in first)


def test_an_answer_that_is_cut_off_ends_with_a_sentence(tokenizer):
    """An end of turn is learned after it, and must not be learned in the middle of a word."""
    asked = Example("Hi", "", id="x")
    long = "One is here. Two is 3.5 more! " + "and so on " * NEW_TOKENS
    assert _example(asked, long, tokenizer) == Example("Hi", "One is here. Two is 3.5 more!", id="x")
    assert _example(asked, "No end", tokenizer) == Example("Hi", "No end", id="x")
    assert _example(asked, " ", tokenizer) is None
    assert _example(Example("The", "", chat=False), long, tokenizer) == Example("", f"The {long}", chat=False)


def test_a_sample_that_says_what_is_to_be_forgotten_is_left_out(make_model, tokenizer):
    every = samples(make_model(), tokenizer, [], 20)
    secret = next(e for e in every if len(e.answer.split()) > 6 and not e.chat)
    assert [e for e in every if e != secret] == samples(make_model(), tokenizer, [secret], 20)


@pytest.mark.parametrize(("anchors", "general"), [("both", 40), ("samples", 0), ("general", 40)])
def test_a_run_without_a_retain_set_is_anchored_and_says_by_what(place, recipe, anchors, general):
    out = execute(recipe(f"data.anchors={anchors}"), place / "out", evaluate_it=False)
    record = json.loads((out / "record.json").read_text())
    own = record["stood_in"].get("samples", 0)
    assert record["stood_in"].get("general:chat", 0) == general
    assert (own > 0) == (anchors != "general")
    assert record["n_retain"] == general + own
    assert (out / "anchors.json").is_file() == (own > 0)
    assert any("no retain set was given" in line for line in read_run(out).warnings)
    assert all("retain" in json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())


def test_a_continued_run_is_anchored_by_the_same_bytes(place, recipe, monkeypatch):
    whole = execute(recipe(), place / "whole", evaluate_it=False)
    import soul.run

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(soul.run, "train_and_save", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe(), place / "cut", evaluate_it=False)
    kept = (place / "cut/anchors.json").read_bytes()
    assert kept == (whole / "anchors.json").read_bytes()
    with monkeypatch.context() as patch:  # they are read back, not made again
        patch.setattr("soul.anchors.samples", killed)
        execute(recipe(), place / "cut", evaluate_it=False)
    assert (place / "cut/model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_samples_of_another_request_are_not_read_back(tmp_path, make_model, tokenizer):
    file = tmp_path / "anchors.json"
    one, other = [Example("Who?", "Ada.")], [Example("Who?", "Bo.")]

    def of(forget, seed=0):
        return stand_in(make_model(), tokenizer, forget, "samples", 6, seed=seed, file=file)

    first = of(one)
    changed = first.record() | {"samples": first.record()["samples"][:1]}
    file.write_text(json.dumps(changed))
    assert len(of(one).samples) == 1
    assert of(other).samples == first.samples
    assert of(one, seed=1).samples != first.samples


def test_anchors_only_where_something_is_to_be_kept(recipe):
    assert recipe().needs_anchors
    assert recipe("method=influence").needs_anchors
    assert recipe("objective=ga", "optimizer=sophia").needs_anchors
    assert not recipe("objective=ga").needs_anchors
    assert not recipe("method=task_vector").needs_anchors
    assert not recipe("data.anchors=none").needs_anchors
    assert not recipe("data.retain=r.jsonl").needs_anchors
    assert not recipe("data.forget=").needs_anchors


def test_in_one_call(make_model, tokenizer, forget_set):
    result = soul.unlearn(
        make_model(), tokenizer, forget=forget_set, optimizer={"name": "adamw"}, training={"max_steps": 1},
        data={"samples": 6},
    )  # fmt: skip
    assert "retain" in result.log[0]
    assert "no retain set was given" in result.warnings[0]
    with pytest.raises(ValueError, match="needs a retain set"):
        soul.unlearn(make_model(), tokenizer, forget=forget_set, data={"anchors": "none"})


def test_what_is_hidden_in_the_retain_set_is_in_the_record(place, recipe, caplog):
    retain = f"data.retain={place / 'retain.jsonl'}"
    out = execute(recipe(retain), place / "warned", evaluate_it=False)
    record = json.loads((out / "record.json").read_text())
    assert [(p["forget"], p["retain"]) for p in record["overlap"]["pairs"]] == [("0", "1")]
    assert "1 forget item is hidden in 1 retain item" in read_run(out).warnings[0]
    assert "where was Mira Vale born" in caplog.text
    dropped = execute(recipe(retain, "data.overlap=drop"), place / "dropped", evaluate_it=False)
    assert json.loads((dropped / "record.json").read_text())["n_retain"] == 1
    with pytest.raises(ValueError, match="hidden in 1 retain item"):
        execute(recipe(retain, "data.overlap=refuse"), place / "refused", evaluate_it=False)
    ignored = execute(recipe(retain, "data.overlap=ignore"), place / "ignored", evaluate_it=False)
    assert "overlap" not in json.loads((ignored / "record.json").read_text())


def test_a_prompt_is_measured_and_stays_with_the_model(place, recipe):
    """What the run measured after is what the saved model, loaded from its folder, is measured at."""
    settings = ("method={name: input_prompt}", "evaluation={max_new_tokens: 4, generate: false}")
    out = execute(recipe(*settings), place / "prompt")
    rows = {
        when: [json.loads(line)["nll"] for line in (out / f"rows/{when}/forget.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    }
    assert rows["before"] != pytest.approx(rows["after"], abs=1e-3)
    model, tokenizer = load_model(ModelSpec(str(out)))
    assert "Mira Vale" in carried_prompt(tokenizer)
    loaded = soul.evaluate.evaluate(  # type: ignore[attr-defined]
        model, tokenizer, {"forget": soul.load_examples(place / "forget.jsonl")},
        spec=soul.evaluate.EvaluationSpec(generate=False),  # type: ignore[attr-defined]
    )["forget"]  # fmt: skip
    assert [row["nll"] for row in loaded] == pytest.approx(rows["after"], abs=1e-6)
    assert any("changes no weight" in line for line in read_run(out).warnings)
    assert (out / "model/model.safetensors").stat().st_size == (place / "model/model.safetensors").stat().st_size


def test_a_benchmark_that_cannot_say_the_prompt_is_refused_before_anything_is_measured(place, recipe, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("soul.data.hub.reachable", lambda: True)  # tasks whose data cannot be had are not asked
    settings = ("method={name: input_prompt}", "benchmark={name: lm_eval}")
    with pytest.raises(ValueError, match=r"cannot say before the passages of .*wikitext"):
        execute(recipe(*settings), place / "unsaid")
    assert not (place / "unsaid/rows").exists()


def test_what_was_dropped_is_not_judged_as_kept(place, recipe):
    settings = (f"data.retain={place / 'retain.jsonl'}", "data.overlap=drop", "evaluation={generate: false}")
    out = execute(recipe(*settings), place / "judged")
    rows = [json.loads(line) for line in (out / "rows/after/kept.jsonl").read_text().splitlines()]
    assert len(rows) == json.loads((out / "record.json").read_text())["n_retain"] == 1
    export(out, place / "judged-export")
