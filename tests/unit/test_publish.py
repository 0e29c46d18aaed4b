"""What is published of a private request: numbers, by which its scores can be computed again, and no guess is told."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from soul import assess
from soul.benchmarks.base import Benchmark
from soul.benchmarks.custom import Custom
from soul.benchmarks.request import DeletionRequest
from soul.benchmarks.tofu import Tofu
from soul.metrics.stats import SHARE, bootstrap_mean
from soul.origins import Origins
from soul.types import Row

SECRET = "1987"  # a date: ten thousand guesses find it by any digest that has no salt


def measured(split: str, name: str, subject: str, nll: float) -> Row:
    return Row(
        id=f"{name} {split}",
        subject=subject,
        prompt="" if split == "text" else f"When was {subject} born?",
        answer=SECRET,
        of="of",
        nll=nll,
        tokens=3,
        wrong_nll=[1.0, 2.0],
        generated="" if nll > 2 else SECRET,
        rougeL_recall=float(nll <= 2),
        samples=[SECRET, ""],
        token_logps=[-0.5, -0.5, -0.5],
        token_matches=[1, 0, 1],
    )


ROWS = {
    "forget": [measured("x", f"vale {i}", "Vale" if i < 2 else "Ruhl", i + 0.5) for i in range(4)],
    "forget_reworded": [measured("x", "vale 1", "Vale", 1.0), measured("y", "ruhl", "Ruhl", 1.0)],
    "kept": [measured("z", f"{i}", "Moss" if i else "", 0.5) for i in range(2)],
    "text": [measured("text", "passage", "", 3.0)],
}


@pytest.mark.parametrize("benchmark", [DeletionRequest("a", "b"), Custom("a")])
def test_no_text_name_or_digest_is_published(benchmark: Benchmark) -> None:
    public = benchmark.public_rows(ROWS)
    written = json.dumps(public).lower()
    for private in (SECRET, "vale", "ruhl", "moss", "born", "sha256", "token_", '"of"'):
        assert private not in written
    assert [row["subject"] for found in public.values() for row in found] == [*"112212", "", "3", ""]
    assert [row["id"] for found in public.values() for row in found] == [*"123425678"]
    first = public["forget"][0]
    assert (first["prompt"], first["answer"], first.get("generated")) == ("(private)",) * 3
    assert public["forget"][3].get("generated") == public["text"][0]["prompt"] == ""
    assert first.get("samples") == ["(private)", ""]
    assert (first["nll"], first["tokens"], first.get("wrong_nll"), first.get("rougeL_recall")) == (0.5, 3, [1, 2], 1)
    assert ROWS["forget"][0]["subject"] == "Vale"


def test_likelihoods_are_told_too_roughly_to_confirm_a_guess() -> None:
    row = measured("x", "vale 1", "Vale", 5.982764) | {"wrong_nll": [1.04, math.inf], "paraphrased_nll": 0.25001}
    (public,) = Custom("a").public_rows({"forget": [row]})["forget"]  # type: ignore[list-item]  # a row and more
    assert (public["nll"], public.get("wrong_nll"), public.get("paraphrased_nll")) == (6.0, [1.0, math.inf], 0.3)


@pytest.mark.parametrize("local", [True, False])
def test_benchmarks_that_all_know_do_not_name_what_is_here(tmp_path, local: bool) -> None:
    """Their texts are public; whose model was measured, and where its data lie, is not."""
    (tmp_path / "jane").mkdir()
    here = str(tmp_path / "jane")
    path = here if local else "owner/name"
    settings = {"source": here, "hub": "locuslab/TOFU", "forget": "forget01"}
    tree: dict[str, Any] = {
        "recipe.yaml": {"model": {"path": path, "dtype": "float32", "system": "You know jane."}, "benchmark": settings},
        "record.json": {"label": f"{path} on tofu", "asked": f"Measure {path}.", "model": path}
        | {"warnings": [f"{here}/ holds no tofu", "2 / 3 rows were cut", f"~nobody/{'x' * 5000}/y was cut"]},
        "scores.json": {"settings": settings, "after": [], "left_out": {"reference": f"({here}) holds no tofu"}},
        "environment.json": {"torch": "2"},
    }
    for name, content in tree.items():
        (tmp_path / name).write_text(json.dumps(content))
    Origins(commit="" if local else "abc").write(tmp_path)
    assess._publish(Tofu(), {}, tmp_path)
    public = {f.name: f.read_text() for f in (tmp_path / "public").iterdir() if f.is_file()}
    assert "jane" not in "".join(public.values())
    assert public["record.json"].count("owner/name") == (0 if local else 3)
    for kept in ("locuslab/TOFU", "forget01"):
        assert kept in public["recipe.yaml"]
        assert kept in public["scores.json"]
    assert "2 / 3 rows were cut" in public["record.json"]
    assert "~nobody" in public["record.json"]


def test_scores_can_be_computed_again_from_what_is_published() -> None:
    """To the byte where likelihoods are tenths of a nat to begin with, as these are."""
    request = DeletionRequest("a", "b")
    assert request.score(request.public_rows(ROWS)) == request.score(ROWS)
    audit = Custom("a")
    public = audit.public_rows(ROWS)
    score = next(s for s in audit.score(ROWS) if (s.split, s.metric) == ("forget", "probability"))
    again = bootstrap_mean(
        [math.exp(-row["nll"]) for row in public["forget"]],
        metric="probability",
        split="forget",
        better="lower",
        groups=[row["subject"] for row in public["forget"]],
        within=SHARE,
    )
    assert again == score
    with pytest.raises(ValueError, match="published record"):
        audit.score(public)  # "(private)" contains "(private)": all would count as leaked


@pytest.mark.parametrize(
    ("path", "origins", "told"),
    [
        ("owner/name", Origins(commit="abc"), True),
        ("smollm2-135m", Origins(model={"a.gguf": {"bytes": 1, "modified": 1, "sha256": "a"}}), True),
        ("runs/jane", Origins(model={"config.json": {"bytes": 1, "modified": 1, "sha256": "a"}}, commit="abc"), False),
        ("runs/jane", Origins(), False),
    ],
)
def test_a_model_is_named_where_others_know_it_too(tmp_path, path: str, origins: Origins, told: bool) -> None:
    tree: dict[str, Any] = {
        "recipe.yaml": {"model": {"path": path, "dtype": "float32"}, "benchmark": {"name": "custom", "forget": "jane"}},
        "record.json": {"label": f"{path} on custom", "asked": f"Measure {path}.", "model": path, "warnings": ["jane"]},
        "scores.json": {"settings": {"forget": "jane"}, "after": []},
        "environment.json": {"command": f"soul evaluate {path}", "torch": "2"},
    }
    for name, content in tree.items():
        (tmp_path / name).write_text(json.dumps(content))
    origins.write(tmp_path)
    assess._publish(Custom("jane"), ROWS, tmp_path)
    public = {f.name: f.read_text() for f in (tmp_path / "public").iterdir() if f.is_file()}
    assert "jane" not in "".join(public.values())
    assert public["recipe.yaml"].count(path) == told
    assert public["record.json"].count(path) == 3 * told
    assert path not in public["environment.json"]
    assert "float32" in public["recipe.yaml"]
