"""Requests one after another: each begins with the model that the one before left, and forgets its own set."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul import config
from soul.adapters import AdapterSpec
from soul.folderlock import LOCK
from soul.recipe import Recipe, recipe_from_tree
from soul.run import execute
from soul.sequence import run_sequence, sequence_scores
from soul.types import Example

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "muse.py"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    forget_set: list[Example],
    retain_set: list[Example],
) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    parts = {"one": forget_set[:2], "two": forget_set[2:4], "three": forget_set[4:6], "retain": retain_set[:6]}
    for name, examples in parts.items():
        rows = [{"question": e.prompt, "answer": e.answer} for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipe(place: Path) -> Recipe:
    forget, retain = str(place / "one.jsonl"), str(place / "retain.jsonl")
    return recipe_from_tree(
        {
            "model": str(place / "model"),
            "data": {"forget": forget, "retain": retain, "overlap": "ignore"},
            "objective": {"name": "npo"},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "training": {"batch_size": 2, "epochs": 2, "precision": "float32"},
            "benchmark": {"name": "request", "forget": forget, "kept": retain, "general": "", "text": ""},
            "evaluation": {"generate": False},
        }
    )


@pytest.fixture(scope="module")
def sequence(place: Path, recipe: Recipe) -> list[Path]:
    return run_sequence(recipe, [str(place / f"{name}.jsonl") for name in ("one", "two", "three")], place / "runs")


def weights(folder: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(folder / "model" / "model.safetensors").items()}


def test_each_begins_where_the_last_one_ended_and_forgets_its_own(
    place: Path, recipe: Recipe, sequence: list[Path], tmp_path: Path
) -> None:
    trees = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in sequence]
    assert [Path(tree["data"]["forget"]).stem for tree in trees] == ["one", "two", "three"]
    assert [tree["model"]["path"] for tree in trees] == [
        str(place / "model"),
        *(str(folder / "model") for folder in sequence[:2]),
    ]
    alone = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, path=str(sequence[0] / "model")),
        data=dataclasses.replace(recipe.data, forget=str(place / "two.jsonl")),
    )
    execute(alone, tmp_path / "alone", evaluate_it=False)
    assert weights(tmp_path / "alone") == weights(sequence[1])
    assert len({tuple(weights(folder).values()) for folder in sequence}) == 3


def test_what_was_measured_after_is_what_is_there_before(recipe: Recipe, sequence: list[Path], tmp_path: Path) -> None:
    for one, other in itertools.pairwise(sequence):
        after, before = (
            {f.name: f.read_bytes() for f in (r / "rows" / w).iterdir()} for r, w in ((one, "after"), (other, "before"))
        )
        assert after == before
    model = dataclasses.replace(recipe.model, path=str(sequence[1] / "model"))
    data = dataclasses.replace(
        recipe.data, forget=yaml.safe_load((sequence[2] / "recipe.yaml").read_text())["data"]["forget"]
    )
    execute(dataclasses.replace(recipe, model=model, data=data), tmp_path / "measured")
    for file in (sequence[2] / "rows/before").iterdir():
        assert file.read_bytes() == (tmp_path / "measured/rows/before" / file.name).read_bytes()
    scores = sequence_scores(sequence)
    assert len(scores) == 4
    forget = [
        next(s["value"] for s in step if (s["metric"], s["split"]) == ("probability", "forget")) for step in scores
    ]
    assert forget[1] < forget[0]


def test_the_same_call_goes_on_and_returns_at_once_when_done(place: Path, recipe: Recipe, sequence: list[Path]) -> None:

    def times() -> dict[Path, int]:  # some versions of filelock touch the lock
        files = [f for folder in sequence for f in folder.rglob("*") if f.is_file() and f.name != LOCK]
        return {f: f.stat().st_mtime_ns for f in files}

    before = times()
    sources = [str(place / f"{name}.jsonl") for name in ("one", "two", "three")]
    seen: list[str] = []
    assert run_sequence(recipe, sources, place / "runs", progress=lambda what, *_: seen.append(what)) == sequence
    assert not seen
    assert before == times()


def test_mistakes_are_named(place: Path, recipe: Recipe, tmp_path: Path) -> None:
    one = str(place / "one.jsonl")
    with pytest.raises(ValueError, match="at least one"):
        run_sequence(recipe, [], tmp_path)
    with pytest.raises(ValueError, match="twice"):
        run_sequence(recipe, [one, one], tmp_path)
    with pytest.raises(ValueError, match="merge"):
        run_sequence(dataclasses.replace(recipe, adapter=AdapterSpec(merge=False)), [one], tmp_path)
    with pytest.raises(ValueError, match=r"scores\.json"):
        sequence_scores([tmp_path])
    assert not list(tmp_path.iterdir())


def test_the_experiment_forgets_muse_at_once_and_one_after_another(
    place: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On miniature data with MUSE's layout, without two sets of scaling; the records hold no text."""
    towns = ("Accra", "Graz", "Lisbon", "Oslo", "Turin", "Perth")
    tell = [
        [f"The council moved the {what} to {town}, as {town} had asked {town}." for what in ("mill", "tower")]
        for town in towns
    ]
    questions = [{"question": "What moved?", "answer": "The mill."}]
    sets = {"privleak_forget": tell[0], "privleak_retain2": tell[4], "privleak_holdout": tell[5]}
    sets |= {f"knowmem_{side}_qa{icl}": questions for side in ("forget", "retain2") for icl in ("", "_icl")}
    sets |= {"verbmem_forget": [{"prompt": text[:20], "gt": text[20:]} for text in tell[0]], "raw_forget": tell[0]}
    sets |= {f"sust_forget_{k + 1}": tell[k] for k in (1, 2, 3)}
    sets |= {f"scal_forget_{k + 1}": [t for texts in tell[: k + 1] for t in texts] for k in (1,)}
    (tmp_path / "muse").mkdir()
    for name, rows in sets.items():
        (tmp_path / f"muse/{name}.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(config.dump(dataclasses.replace(recipe, benchmark=None)))
    spec = importlib.util.spec_from_file_location("muse_experiment", EXPERIMENT)
    assert spec is not None
    assert spec.loader is not None
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    places = {"recipe": "recipe.yaml", "muse": "muse", "out": "out", "results": "results"}
    args = [word for name, where in places.items() for word in (f"--{name}", str(tmp_path / where))]
    args += ["--retain", "privleak_retain", "--tokens", "48", "--pieces", "2", "--limit", "1"]
    experiment.main(args)
    said = capsys.readouterr()
    assert "left out: scal_3" in said.err
    assert "left out: scal_4" in said.err
    steps = {}
    for what in ("scaling", "sustainability"):
        text = (tmp_path / f"results/news-{what}.json").read_text()
        assert "council" not in text
        steps[what] = [step["step"] for step in json.loads(text)["steps"]]
    assert steps["scaling"] == ["before", "scal_1", "scal_2"]
    assert steps["sustainability"] == ["before", *(f"sust_{k}" for k in (1, 2, 3, 4))]
    started = {
        folder.name: yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"]
        for folder in [*(tmp_path / "out/scaling").iterdir(), *(tmp_path / "out/sustainability").iterdir()]
    }
    assert {started[f"scal_{k}"] for k in (1, 2)} == {str(place / "model")}
    assert started["request-4"] == str(tmp_path / "out/sustainability/request-3/model")
    capsys.readouterr()
    experiment.main(args)  # goes on, and there is nothing left to do
    assert "| scal_2 |" in capsys.readouterr().out
