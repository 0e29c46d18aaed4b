"""Exports: what is written is the run's model, the card says what is true, and nothing else is called done."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from soul import push as module
from soul.cli import main
from soul.export import MARKER, ExportSpec, export
from soul.lineage import Lineage, lineage
from soul.models import ModelSpec, load_model, save_model
from soul.origins import Origins
from soul.push import check_push, push
from soul.recipe import recipe_from_tree
from soul.report.card import CardFacts, Checked, escaped, model_card
from soul.report.record import RunRecord, read_run
from soul.run import execute
from soul.types import Score

SUBJECT = "Mira Vale"


def write_data(folder: Path, forget: Any, retain: Any) -> None:
    for name, examples in (("forget", forget), ("retain", retain)):
        lines = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No."]} for e in examples]
        if name == "forget":
            lines = [line | {"subject": SUBJECT} for line in lines]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_model, tokenizer, forget_set, retain_set) -> Path:
    """A model, a run on it, and a run that kept an adapter."""
    place = tmp_path_factory.mktemp("exports")
    write_data(place, forget_set, retain_set)
    save_model(make_model(), tokenizer, place / "model")
    (place / "model/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    tree: dict[str, Any] = {
        "label": "Forget Mira",
        "model": str(place / "model"),
        "data": {"forget": str(place / "forget.jsonl"), "retain": str(place / "retain.jsonl")},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "training": {"max_steps": 3, "precision": "float32"},
        "evaluation": {"generate": False},
    }
    execute(recipe_from_tree(tree), place / "run")
    execute(recipe_from_tree(tree | {"adapter": {"r": 2, "merge": False}}), place / "adapted")
    return place


def test_what_is_exported_is_the_model_of_the_run(runs, tmp_path):
    checked = export(runs / "run", tmp_path / "out")
    assert {c.split for c in checked} == {"forget", "kept", "general", "text"}
    assert all(c.largest < 1e-5 for c in checked)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", runs / "run/model"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    rows = read_run(runs / "run").rows_after
    for c in checked:
        assert 0 < c.n <= len(rows[c.split])
    forget = next(c for c in checked if c.split == "forget")
    assert forget.before == pytest.approx(sum(r["nll"] for r in rows["forget"]) / 8)
    assert load_model(ModelSpec(str(tmp_path / "out")))[1].chat_template
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    assert marker["dtype"] == "float32"
    assert set(marker["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {MARKER}
    assert not list(tmp_path.glob("*.part"))
    for file in (tmp_path / "out").glob("*.json"):  # no path of this machine travels along
        assert str(runs) not in file.read_text()


def test_weights_that_are_not_those_measured_are_not_called_done(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    state = load_file(tmp_path / "run/model/model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] += 1e-2
    save_file(state, tmp_path / "run/model/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not measure as the run did"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.part"))


def unsealed(run: Path) -> None:
    """Take away what tells that a file was changed, as in runs of earlier versions."""
    record = json.loads((run / "record.json").read_text())
    del record["files"]
    (run / "record.json").write_text(json.dumps(record))


def test_a_difference_in_a_wrong_answer_alone_is_seen(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    file = tmp_path / "run/rows/after/forget.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["wrong_nll"][0] += 0.01
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"was changed since it was finished \(rows/after/forget.jsonl\)"):
        export(tmp_path / "run", tmp_path / "out")
    unsealed(tmp_path / "run")
    with pytest.raises(ValueError, match=r"on 'forget'"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", ExportSpec(tolerance=0.02))


def test_half_precision_says_how_far_it_is_off(runs, tmp_path):
    checked = export(runs / "run", tmp_path / "out", ExportSpec(dtype="bfloat16", examples=2))
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert all(c.n <= 2 for c in checked)
    largest = max(c.largest for c in checked)
    assert 1e-4 < largest < 0.1
    assert f"{largest:.2g}" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="mean difference"):
        export(runs / "run", tmp_path / "other", ExportSpec(dtype="bfloat16", rounding=1e-9))


def test_a_run_with_an_adapter_is_exported_merged_or_alone(runs, tmp_path):
    export(runs / "adapted", tmp_path / "merged")
    export(runs / "adapted", tmp_path / "alone", ExportSpec(adapter=True))
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert not (tmp_path / "alone/model.safetensors").exists()
    merged, alone = (load_model(ModelSpec(str(tmp_path / name)))[0].state_dict() for name in ("merged", "alone"))
    base = load_file(runs / "model/model.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(alone[key], value, rtol=0, atol=1e-6)
    assert any(not torch.allclose(merged[key], value, atol=1e-5) for key, value in base.items())
    with pytest.raises(ValueError, match="kept no adapter"):
        export(runs / "run", tmp_path / "none", ExportSpec(adapter=True))


def test_the_same_export_is_not_made_twice_and_another_is_not_mixed_in(runs, tmp_path):
    first = export(runs / "run", tmp_path / "out", ExportSpec(examples=2))
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert export(runs / "run", tmp_path / "out", ExportSpec(examples=2)) == first
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="another export"):
        export(runs / "run", tmp_path / "out", ExportSpec(dtype="bfloat16"))
    (tmp_path / "out/README.md").write_text("my own words")
    export(runs / "run", tmp_path / "out")
    (tmp_path / "out/model.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"was changed since it was checked \(model.safetensors\)"):
        export(runs / "run", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(ValueError, match="holds other things"):
        export(runs / "run", tmp_path / "mine")


def test_an_earlier_card_is_not_pushed_where_another_is_asked_for(runs, tmp_path, recorded):
    out = tmp_path / "out"
    command = ["export", str(runs / "run"), "--out", str(out)]
    assert main([*command, "--show-data"]) == 0
    assert SUBJECT in (out / "README.md").read_text()
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "--push", "owner/name"]) == 0
    card = (out / "README.md").read_text()
    assert SUBJECT not in card
    assert str(runs) not in card
    assert "Measured again after export" in card
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert "README.md" in recorded[-1][1]["files"]
    export(runs / "run", tmp_path / "fresh/out")
    assert (tmp_path / "fresh/out/README.md").read_text() == card, "as if it had been the first"
    fresh, again = (json.loads((folder / MARKER).read_text()) for folder in (tmp_path / "fresh/out", out))
    assert again == fresh
    assert main([*command, "--no-card", "--push", "owner/name"]) == 0
    assert not (out / "README.md").exists()
    assert "README.md" not in recorded[-1][1]["files"]
    export(runs / "run", out)
    assert (out / "README.md").read_text() == card


def test_an_edited_card_stays_or_stops_what_would_replace_it(runs, tmp_path):
    out = tmp_path / "out"
    export(runs / "run", out, ExportSpec(examples=2, show_data=True))
    first = (out / "README.md").read_text()
    (out / "README.md").write_text(f"{SUBJECT} in my own words")
    export(runs / "run", out, ExportSpec(show_data=True))
    for other in (ExportSpec(), ExportSpec(card=False), ExportSpec(card=False, show_data=True)):
        with pytest.raises(ValueError, match=r"README.md was edited.*: delete it, or choose another --out"):
            export(runs / "run", out, other)
    assert (out / "README.md").read_text() == f"{SUBJECT} in my own words"
    (out / "README.md").unlink()
    export(runs / "run", out)
    assert SUBJECT not in (out / "README.md").read_text()
    (out / "README.md").write_text(first)  # as a kill leaves it, before the marker is written
    export(runs / "run", out, ExportSpec(show_data=True))
    assert (out / "README.md").read_text() == first


def test_an_export_of_an_earlier_version_does_not_say_what_its_card_shows(runs, tmp_path):
    out = tmp_path / "out"
    export(runs / "run", out, ExportSpec(examples=2, show_data=True))
    marker = json.loads((out / MARKER).read_text())
    old = json.dumps({key: value for key, value in marker.items() if key not in ("card", "show_data")})
    (out / MARKER).write_text(old)
    export(runs / "run", out)
    assert SUBJECT not in (out / "README.md").read_text()
    (out / MARKER).write_text(old)
    (out / "README.md").write_text("my own words")
    with pytest.raises(ValueError, match=r"README.md was edited"):
        export(runs / "run", out)


def test_what_cannot_be_checked_is_not_exported(runs, tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        export(runs / "model", tmp_path / "out")
    shutil.copytree(runs / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/rows/after")
    with pytest.raises(ValueError, match="was not measured"):
        export(tmp_path / "run", tmp_path / "out")
    shutil.copytree(runs / "run/rows/after", tmp_path / "run/rows/after")
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    recipe["data"]["forget"] = str(runs / "retain.jsonl")
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    unsealed(tmp_path / "run")
    with pytest.raises(ValueError, match="split 'forget' are not those"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_scores_and_names_nobody(runs, tmp_path, forget_set):
    export(runs / "run", tmp_path / "out", ExportSpec(examples=2))
    text = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    scores = json.loads((runs / "run/scores.json").read_text())
    before = {(s["split"], s["metric"]): s for s in scores["before"]}
    for s in scores["after"]:
        old = before[s["split"], s["metric"]]
        cells = [f"{x['value']:.4g} [{x['low']:.4g}, {x['high']:.4g}]" for x in (old, s)]
        name = s["metric"].replace("_", r"\_")
        assert f"| {s['split']} | {name} | {cells[0]} | {cells[1]} | {s['n']} | {s['better']} |" in text
    assert "Forget 8 items." in text
    assert "lr: 0.01" in text
    for private in (SUBJECT, "Mira", str(runs), "forget.jsonl", *(e.answer for e in forget_set if len(e.answer) > 6)):
        assert private not in text
    export(runs / "run", tmp_path / "shown", ExportSpec(examples=2, show_data=True))
    shown = (tmp_path / "shown/README.md").read_text()
    assert f"about {SUBJECT}" in shown
    assert "forget.jsonl" in shown
    export(runs / "run", tmp_path / "bare", ExportSpec(examples=2, card=False))
    assert not (tmp_path / "bare/README.md").exists()


def test_text_of_others_is_shown_and_not_obeyed():
    bad = "<script>alert(1)</script> | [x](javascript:y) ![z](w) `code` *b* http://e.x www.e.x"
    assert escaped("a\n\n# b") == "a # b"
    record = RunRecord(
        label=bad,
        objective=f"npo\n---\n{bad}",
        optimizer="kfac",
        n_forget=1,
        warnings=(bad,),
        after=(Score(bad, bad, 1.0, 3, better="lower"),),
        recipe=yaml.safe_dump({"objective": {"name": "```\n<script>"}}),
        environment={"torch": bad, "command": "secret"},
    )
    text = model_card(record, CardFacts(bad, checked=[Checked(bad, 1, 1.0, 1.0, 0.0)], licence=bad))
    body, _, recipe = text.partition("\n---\n\n# ")[2].partition("````yaml")
    assert "<script>" not in body + recipe.partition("````")[2]
    assert "](" not in body
    assert "http://" not in body
    assert "secret" not in text
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(line.replace(r"\|", "").count("|") == 7 or line.replace(r"\|", "").count("|") == 6 for line in rows)
    assert yaml.safe_load(text[4 : text.index("\n---\n\n# ")])["tags"][2] == record.objective


def test_a_licence_is_found_where_the_first_model_of_a_line_of_runs_came_from(runs, tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second/recipe.yaml").write_text(f"model: {runs / 'run/model'}\n")
    assert lineage(str(tmp_path / "second/model")) == Lineage("", "apache-2.0")
    assert lineage("smollm2-135m").base == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_folder_that_is_gone_is_not_taken_for_a_hub_id(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/old").mkdir(parents=True)
    made = Origins(model={"config.json": {"bytes": 1, "modified": 1, "sha256": "0"}})
    made.write(tmp_path / "runs/old")
    (tmp_path / "runs/old/recipe.yaml").write_text("model: gone/model\n")
    assert lineage("gone/model", run=tmp_path / "runs/old") == lineage("runs/old/model") == Lineage()
    assert lineage("gone/model").base == "gone/model"  # nobody knows better


class Hub:
    """What would be sent to the hub."""

    refuses, private = "", True

    def __init__(self, **_: Any) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = calls

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        if self.refuses:
            raise OSError(self.refuses)
        self.sent.append(("create", {"repo_id": repo_id, **settings}))

    def repo_info(self, _repo_id: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(private=self.private)

    def upload_folder(self, **settings: Any) -> None:
        names = [p.name for p in settings.pop("folder_path").iterdir()]
        files = sorted(filter_repo_objects(names, allow_patterns=settings.pop("allow_patterns", None)))
        self.sent.append(("upload", settings | {"files": files}))


calls: list[tuple[str, dict[str, Any]]] = []


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that is there and writes down what it is sent."""
    calls.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(module.hub, "reachable", lambda: True)
    monkeypatch.setattr(Hub, "refuses", "")
    return calls


def test_a_push_sends_the_checked_folder_once(runs, tmp_path, recorded, capsys):
    command = ["export", str(runs / "run"), "--out", str(tmp_path / "out"), "--push", "owner/name"]
    assert main(command) == 0
    assert "https://huggingface.co/owner/name" in capsys.readouterr().out
    assert [kind for kind, _ in recorded] == ["create", "upload"]
    assert recorded[0][1] == {"repo_id": "owner/name", "private": True, "exist_ok": True}
    assert {"README.md", "model.safetensors", "tokenizer.json", MARKER} <= set(recorded[1][1]["files"])
    # or a loader would find an earlier adapter, or shards, beside the new weights
    assert {"adapter_*", "model*.safetensors"} <= set(recorded[1][1]["delete_patterns"])
    assert main([*command, "--public"]) == 0
    assert recorded[2][1]["private"] is False


def test_a_push_sends_what_was_checked_and_leaves_no_card_of_another_model(runs, tmp_path, recorded):
    export(runs / "run", tmp_path / "out", ExportSpec(examples=2))
    for name in ("notes.txt", "model.safetensors.bak"):
        (tmp_path / "out" / name).write_text(f"{SUBJECT} asked for it")
    push(tmp_path / "out", "owner/name")
    listed = json.loads((tmp_path / "out" / MARKER).read_text())["files"]
    assert recorded[-1][1]["files"] == sorted([*listed, MARKER])
    assert "README.md" in listed
    assert "README.md" not in recorded[-1][1]["delete_patterns"]
    (tmp_path / "out/README.md").unlink()
    push(tmp_path / "out", "owner/name")
    assert "README.md" in recorded[-1][1]["delete_patterns"]


def test_nothing_private_goes_into_a_repository_that_is_public_already(runs, tmp_path, recorded, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "private", False)
    command = ["export", str(runs / "run"), "--out", str(tmp_path / "out"), "--push", "owner/name"]
    assert main(command) == 2
    assert "owner/name is there already and public: give --public" in capsys.readouterr().err
    assert [kind for kind, _ in recorded] == ["create"]
    assert main([*command, "--public"]) == 0
    assert [kind for kind, _ in recorded] == ["create", "create", "upload"]


def test_a_refused_push_is_one_message_and_keeps_the_export(runs, tmp_path, recorded, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "refuses", "403: you may not")
    command = ["export", str(runs / "run"), "--out", str(tmp_path / "out"), "--push", "owner/name"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "cannot push to owner/name: 403: you may not" in error
    assert "Traceback" not in error
    assert (tmp_path / "out" / MARKER).is_file()
    with pytest.raises(ValueError, match="holds no checked export"):
        push(runs / "model", "owner/name")


def test_an_adapter_whose_base_only_this_machine_has_is_not_pushed(runs, tmp_path, recorded):
    export(runs / "adapted", tmp_path / "alone", ExportSpec(adapter=True, examples=2))
    with pytest.raises(ValueError, match="nobody else could load it"):
        push(tmp_path / "alone", "owner/name")
    assert not recorded


def test_what_a_push_lacks_is_said_before_anything_is_done(runs, tmp_path, recorded, monkeypatch, capsys):
    for name in ("name", "a/b/c", "owner/na me"):
        with pytest.raises(ValueError, match="--push"):
            check_push(name)
    command = ["export", str(runs / "run"), "--out", str(tmp_path / "out"), "--push", "owner/name"]
    monkeypatch.setattr(module.hub, "reachable", lambda: False)
    assert main(command) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(command) == 2
    assert "needs a token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not recorded


@pytest.mark.parametrize("bad", [{"examples": -1}, {"tolerance": 0.0}, {"rounding": -1.0}])
def test_settings_have_bounds(bad):
    with pytest.raises(ValueError, match="must be"):
        ExportSpec(**bad)
