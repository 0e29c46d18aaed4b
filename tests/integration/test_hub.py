"""Models of the hub, as a cache without a network has them: adapters are merged, and revisions are kept to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from soul.adapters import AdapterSpec, add_adapter
from soul.cli import main
from soul.data import hub
from soul.lineage import lineage
from soul.models import ModelSpec, load_model, save_model
from soul.origins import Origins, commit_of, read_origins
from soul.pretrained import load_config, load_tokenizer

DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
SHORT = ["training.max_steps=1", "--no-evaluate"]
REQUEST = ["forget=forget.jsonl", "kept=retain.jsonl"]
KEPT = ["adapter.r=2", "adapter.merge=false"]


class Cache:
    """The hub's cache: each commit of a repository in a folder of its own, and which of them is the newest."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def push(self, repo: str, save: Callable[[Path], object], tag: str = "") -> str:
        """Add what ``save`` writes as the newest commit, and return that."""
        self.count += 1
        commit = f"{self.count:040x}"
        place = self.root / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        for name in filter(None, ("main", tag)):
            (place / "refs" / name).write_text(commit)
        save(place / "snapshots" / commit)
        return commit


@pytest.fixture
def cache(tmp_path, forget_set, retain_set, monkeypatch) -> Cache:
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    return Cache(tmp_path / "hub")


@pytest.fixture
def whole(make_model, tokenizer) -> Callable[[int], Callable[[Path], object]]:
    """Write the model of a seed."""
    return lambda seed: lambda folder: save_model(make_model(seed), tokenizer, folder)


@pytest.fixture
def adapter(cache, whole, make_model, tokenizer, moved_adapter) -> dict[str, torch.Tensor]:
    """Put ``owner/lora`` on the hub, an adapter on ``owner/base``, and return the weights of both together."""
    cache.push("owner/base", whole(3))
    adapted = moved_adapter(make_model(3))
    cache.push("owner/lora", lambda folder: save_model(adapted, tokenizer, folder, "owner/base"))
    return adapted.merge_and_unload().state_dict()


def close(model, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, state[key], rtol=0, atol=1e-6) for key, value in model.state_dict().items())


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_an_adapter_of_the_hub_is_merged(adapter):
    model, tokenizer = load_model(ModelSpec("owner/lora"))
    assert close(model, adapter)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert tokenizer.chat_template
    assert load_config("owner/lora").vocab_size == model.config.vocab_size
    assert load_tokenizer("owner/lora")("Who?").input_ids == tokenizer("Who?").input_ids


def test_an_adapter_of_the_hub_without_a_tokenizer_takes_its_bases(cache, whole, make_model, tokenizer, moved_adapter):
    """As peft's own ``save_pretrained`` leaves it."""
    cache.push("owner/base", whole(3))
    adapted = moved_adapter(make_model(3))
    adapted.peft_config["default"].base_model_name_or_path = "owner/base"
    cache.push("owner/lora", adapted.save_pretrained)
    assert load_model(ModelSpec("owner/lora"))[1]("Who?").input_ids == tokenizer("Who?").input_ids
    assert load_tokenizer("owner/lora")("Who?").input_ids == tokenizer("Who?").input_ids


def test_a_run_on_an_adapter_of_the_hub_trains_what_that_says(adapter, tmp_path, capsys):
    words = ["--model", "owner/lora", *DATA, "adapter.r=2", "optimizer.name=adamw", "optimizer.lr=1e-8"]
    assert main(["plan", *words[:-1]]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["unlearn", *words, *SHORT, "--out", "run"]) == 0
    assert close(load_model(ModelSpec("run"))[0], adapter)  # and not the bare base
    assert main(["unlearn", *words, *SHORT, "--out", "kept", "adapter.merge=false"]) == 2
    assert "owner/lora is an adapter itself (on owner/base)" in said(capsys)


def test_an_adapter_that_transformers_put_on_is_refused(adapter, monkeypatch):
    injected = AutoModelForCausalLM.from_pretrained("owner/lora", local_files_only=True)
    with pytest.raises(ValueError, match=r"adapter that transformers put on it: load it with soul\.load_model"):
        add_adapter(injected, AdapterSpec(r=2))
    monkeypatch.setattr(hub, "file_of", lambda *_: None)  # as where the hub does not answer at first, and then does
    with pytest.raises(ValueError, match=r"transformers put an adapter on owner/lora by itself.*merge the two"):
        load_model(ModelSpec("owner/lora"))


def test_an_adapter_on_an_adapter_of_the_hub_is_refused(adapter, make_model, tokenizer, moved_adapter, tmp_path):
    save_model(moved_adapter(make_model(3)), tokenizer, tmp_path / "second", "owner/lora")
    with pytest.raises(ValueError, match="names owner/lora, which is an adapter itself: merge that one first"):
        load_model(ModelSpec("second"))


def test_a_revision_is_that_of_weights_tokenizer_and_configuration(cache, make_model, make_tokenizer, tmp_path):
    plain = make_tokenizer(template=False)
    first = cache.push("owner/name", lambda folder: save_model(make_model(3), plain, folder), tag="v1")
    cache.push("owner/name", lambda folder: save_model(make_model(4), make_tokenizer(), folder))
    folder = tmp_path / f"hub/models--owner--name/snapshots/{first}"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    for revision in (first, "v1"):
        model, tokenizer = load_model(ModelSpec("owner/name", revision))
        assert close(model, make_model(3).state_dict())
        assert commit_of(model) == first
        assert tokenizer.chat_template is None
        assert load_tokenizer("owner/name", revision).chat_template is None
        assert load_config("owner/name", revision).rms_norm_eps == 1e-3
    model, tokenizer = load_model(ModelSpec("owner/name"))
    assert close(model, make_model(4).state_dict())
    assert tokenizer.chat_template
    assert load_config("owner/name").rms_norm_eps != 1e-3


def test_a_revision_that_is_not_there_is_named(cache, whole):
    cache.push("owner/name", whole(3))
    with pytest.raises(ValueError, match="no copy of revision v9 is in this machine's cache"):
        load_model(ModelSpec("owner/name", "v9"))


@pytest.mark.parametrize("command", ["unlearn", "plan", "evaluate"])
def test_a_local_folder_has_no_revisions(cache, whole, tmp_path, command, capsys):
    whole(3)(tmp_path / "model")
    words = {"evaluate": ["model", "--benchmark", "request", *REQUEST]}
    words |= {"unlearn": ["--model", "model", *DATA, *SHORT], "plan": ["--model", "model", *DATA]}
    assert main([command, *words[command], "model.revision=v1"]) == 2
    assert "model.revision=v1 is for models of the hub, and model is on this machine: leave it out" in said(capsys)


def test_a_run_goes_on_with_the_revision_it_began_with(cache, whole, tmp_path, capsys):
    first = cache.push("owner/name", whole(3))
    command = ["unlearn", "--model", "owner/name", *DATA, *SHORT, "--out", "run"]
    assert main(command) == 0
    assert (read_origins(tmp_path / "run") or Origins()).commit == first
    (tmp_path / "run/record.json").unlink()
    second = cache.push("owner/name", whole(4))
    assert main(command) == 2
    assert f"commit {first:.12} then, {second:.12} now" in (words := said(capsys))
    assert f"model.revision={first} goes on with what was begun" in words
    for name in ("model", "log.jsonl"):  # so that it is trained, and not only measured
        place = tmp_path / "run" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    (tmp_path / "run/rows/before").mkdir(parents=True)
    assert main([*command, f"model.revision={first}"]) == 0
    assert main(["unlearn", *command[1:-1], "again", f"model.revision={first}"]) == 0
    pair = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "again")]
    assert pair[0] == pair[1]
    assert main([*command, f"model.revision={second}"]) == 2  # though it is finished
    assert "model.revision was '' there" in said(capsys)


def test_changed_data_are_not_brought_back_by_a_revision(cache, whole, tmp_path, capsys):
    cache.push("owner/name", whole(3))
    command = ["unlearn", "--model", "owner/name", *DATA, *SHORT, "--out", "run"]
    assert main(command) == 0
    (tmp_path / "run/record.json").unlink()
    cache.push("owner/name", whole(4))
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}')
    assert main(command) == 2
    assert "model.revision" not in said(capsys)


def test_an_evaluation_goes_on_with_the_revision_it_began_with(cache, whole, tmp_path, capsys):
    first = cache.push("owner/name", whole(3))
    command = ["evaluate", "owner/name", "--benchmark", "request", *REQUEST, "--out", "e", "evaluation.generate=no"]
    assert main(command) == 0
    recipe = yaml.safe_load((tmp_path / "e/recipe.yaml").read_text())
    del recipe["model"]["revision"]  # as an earlier version left it
    (tmp_path / "e/recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(command) == 0
    cache.push("owner/name", whole(4))
    assert main(command) == 2
    assert f"model.revision={first} goes on" in said(capsys)
    assert main([*command, f"model.revision={first}"]) == 0
    assert main([*command, f"model.revision={first}", "model.dtype=bfloat16"]) == 2
    assert "another evaluation" in said(capsys)


def test_an_adapter_kept_alone_asks_for_the_revision_of_its_base(cache, whole, make_model, tmp_path):
    first = cache.push("owner/name", whole(3))
    words = ["--model", "owner/name", *DATA, *SHORT, *KEPT, "optimizer.name=adamw", "optimizer.lr=1e-8"]
    assert main(["unlearn", *words, "--out", "run"]) == 0
    described = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("owner/name", first)
    cache.push("owner/name", whole(4))
    model, _ = load_model(ModelSpec("run"))
    assert close(model, make_model(3).state_dict())
    assert commit_of(model) == first
    cache.push("owner/lora", lambda folder: shutil.copytree(tmp_path / "run/model", folder))
    model, _ = load_model(ModelSpec("owner/lora"))
    assert close(model, make_model(3).state_dict())
    assert commit_of(model).endswith(f"+{first}")


def test_a_base_that_moved_under_an_adapter_is_noticed(
    cache, whole, make_model, tokenizer, moved_adapter, tmp_path, capsys
):
    cache.push("owner/base", whole(3))
    adapted = moved_adapter(make_model(3))
    cache.push("owner/lora", lambda folder: save_model(adapted, tokenizer, folder, "owner/base"))
    command = ["unlearn", "--model", "owner/lora", *DATA, *SHORT, "--out", "run"]
    assert main(command) == 0
    (tmp_path / "run/record.json").unlink()
    cache.push("owner/base", whole(4))
    assert main(command) == 2
    assert "model owner/lora (commit" in (words := said(capsys))
    assert "model.revision" not in words  # which is the adapter's


def test_the_licence_is_that_of_the_revision(cache, whole, tmp_path):
    commits = []
    for seed, licence in enumerate(("mit", "apache-2.0")):
        commits.append(cache.push("owner/name", whole(seed)))
        card = tmp_path / f"hub/models--owner--name/snapshots/{commits[-1]}/README.md"
        card.write_text(f"---\nlicense: {licence}\n---\n")
    assert lineage("owner/name").licence == "apache-2.0"
    assert lineage("owner/name", commits[0]).licence == "mit"
    (tmp_path / "recipe.yaml").write_text(f"model: {{path: owner/name, revision: '{commits[0]}'}}\n")
    assert lineage(str(tmp_path / "model")).licence == "mit"


def test_an_adapter_is_not_kept_alone_on_a_run_that_kept_one(cache, whole, tmp_path, capsys):
    whole(3)(tmp_path / "model")
    words = [*DATA, *SHORT[:1], *KEPT]
    assert main(["unlearn", "--model", "model", *words, "--no-evaluate", "--out", "first"]) == 0
    again = ["unlearn", "--model", "first", *words, "--no-evaluate", "--out", "second"]
    for command in (again, ["plan", "--model", "first", *words]):
        assert main(command) == 2
        assert "first is an adapter itself" in (message := said(capsys))
        assert "set adapter.merge=true, or make whole weights of it first (of a run: `soul export" in message
    assert not (tmp_path / "second/log.jsonl").exists()
    assert main([*again, "adapter.merge=true"]) == 0
    described = json.loads((tmp_path / "first/model/adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "first")  # as earlier versions left it
    shutil.copytree(tmp_path / "first", tmp_path / "third")
    (tmp_path / "third/model/adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="which is an adapter itself: merge that one first"):
        load_model(ModelSpec("third"))


def test_plain_peft_loads_an_adapter_that_was_kept_alone_on_a_run(cache, whole, tmp_path):
    whole(3)(tmp_path / "model")
    assert main(["unlearn", "--model", "model", *DATA, *SHORT, "--out", "first"]) == 0
    assert main(["unlearn", "--model", "first", *DATA, *SHORT, *KEPT, "--out", "second"]) == 0
    described = json.loads((tmp_path / "second/model/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "first/model")
    plain = AutoPeftModelForCausalLM.from_pretrained("second/model").merge_and_unload()
    assert close(load_model(ModelSpec("second"))[0], plain.state_dict())
