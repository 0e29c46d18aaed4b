"""Where models come from: folders, runs, adapters, code of their own, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soul import models
from soul.adapters import AdapterSpec, add_adapter, check_adapter
from soul.evaluate import EvaluationSpec, evaluate
from soul.machine import cache_dir
from soul.models import ModelSpec, load_model, save_model

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def saved(tmp_path, make_model, tokenizer) -> Path:
    save_model(make_model(3), tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def own_code(saved, tmp_path, monkeypatch) -> Path:
    """A model that brings Python code, as some on the hub do."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    return saved


def same(one, other) -> bool:
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_a_model_survives_saving_and_loading(saved, make_model, tokenizer):
    model, again = load_model(ModelSpec(str(saved), device="cpu"))
    assert same(model, make_model(3))
    assert again.chat_template == tokenizer.chat_template
    assert not saved.with_name("saved.part").exists()
    assert {p.suffix for p in saved.iterdir() if p.stat().st_size > 10_000} <= {".safetensors", ".json"}


def test_saving_replaces_what_a_kill_left(saved, make_model, tokenizer):
    part = saved.with_name("saved.part")
    part.mkdir()
    (part / "model-00001-of-00002.safetensors").write_bytes(b"half")
    save_model(make_model(4), tokenizer, saved)
    assert same(load_model(ModelSpec(str(saved)))[0], make_model(4))
    assert not (saved / "model-00001-of-00002.safetensors").exists()


def test_weights_are_kept_in_the_precision_asked_for(saved):
    assert load_model(ModelSpec(str(saved)))[0].dtype == torch.float32
    assert load_model(ModelSpec(str(saved), dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_a_padding_token_that_was_added_without_a_row_of_its_own(saved, make_model, tokenizer, forget_set):
    """As in fine-tunes that add [PAD] and do not resize: what rows are filled up with is looked up like all others."""
    added = copy.deepcopy(tokenizer)
    rows = make_model(3).get_input_embeddings().weight.shape[0]
    added.add_tokens([f"<extra {i}>" for i in range(rows - len(added))])
    added.add_special_tokens({"pad_token": "[PAD]"})
    assert added.pad_token_id >= rows
    added.save_pretrained(saved)
    model, again = load_model(ModelSpec(str(saved)))
    found = evaluate(model, again, {"forget": forget_set}, spec=EvaluationSpec(generate=False))["forget"]
    known = evaluate(model, tokenizer, {"forget": forget_set}, spec=EvaluationSpec(generate=False))["forget"]
    assert [row["nll"] for row in found] == pytest.approx([row["nll"] for row in known], abs=1e-6)


def test_a_run_directory_is_its_model(saved, tmp_path, make_model):
    shutil.copytree(saved, tmp_path / "run/model")
    (tmp_path / "run/recipe.yaml").write_text("label: x\n")
    assert same(load_model(ModelSpec(str(tmp_path / "run")))[0], make_model(3))
    shutil.rmtree(tmp_path / "run/model")
    with pytest.raises(ValueError, match="a run without a model yet"):
        load_model(ModelSpec(str(tmp_path / "run")))


def test_a_tokenizer_without_padding_pads_with_its_end(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    save_model(make_model(), tokenizer, tmp_path / "m")
    _, loaded = load_model(ModelSpec(str(tmp_path / "m")))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_missing_weights_are_an_error_not_noise(saved):
    state = load_file(saved / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing there, the first is model\.layers\.1\.mlp\.up_proj"):
        load_model(ModelSpec(str(saved)))


def test_weights_of_another_shape_are_an_error(saved):
    state = load_file(saved / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot load a model from .*saved"):
        load_model(ModelSpec(str(saved)))


def test_code_of_a_model_is_not_run_unless_asked_for(own_code, tmp_path, make_model):
    with pytest.raises(ValueError, match=r"Python code of its own.*model\.trust_remote_code=true"):
        load_model(ModelSpec(str(own_code)))
    assert not (tmp_path / "ran").exists()
    model, _ = load_model(ModelSpec(str(own_code), trust_remote_code=True))
    assert (tmp_path / "ran").exists()
    assert type(model).__name__ == "Own"
    assert same(model, make_model(3))


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_is_loaded_with_the_model_it_belongs_to(
    saved, tmp_path, tokenizer, merged, monkeypatch, moved_adapter
):
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(ModelSpec("saved" if merged else str(saved)))
    adapted = moved_adapter(model)
    if not merged:
        save_model(adapted, tokenizer, tmp_path / "adapter", "saved")
    whole = adapted.merge_and_unload()
    if merged:
        save_model(whole, tokenizer, tmp_path / "adapter")
    monkeypatch.chdir("/")  # a relative base must be found from elsewhere
    found, _ = load_model(ModelSpec(str(tmp_path / "adapter")))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=1e-6)


def test_an_adapter_starts_from_its_seed_alone(make_model):
    starts = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        starts.append(add_adapter(make_model(), AdapterSpec(r=2), seed))
    first, again, other = starts
    assert same(first, again)
    assert not same(first, other)


def test_only_the_modules_asked_for_get_an_adapter(make_model):
    model = make_model()
    check_adapter(model, AdapterSpec(target_modules=["q_proj", "v_proj"]))
    adapted = add_adapter(model, AdapterSpec(r=2, target_modules=["q_proj", "v_proj"]))
    trained = {n.split(".lora_")[0].rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    check_adapter(model, AdapterSpec(target_modules=r"model\.layers\.\d+\.mlp\..*_proj"))
    with pytest.raises(ValueError, match=r"no query or key; give all-linear, or some of .*k_proj.*q_proj"):
        check_adapter(make_model(), AdapterSpec(target_modules=["query", "key"]))
    with pytest.raises(ValueError, match="the model has no v_porj; give"):  # peft would adapt q_proj alone
        check_adapter(make_model(), AdapterSpec(target_modules=["q_proj", "v_porj"]))
    with pytest.raises(ValueError, match=r"'\*_proj' is no regular expression"):
        check_adapter(make_model(), AdapterSpec(target_modules="*_proj"))
    with pytest.raises(ValueError, match=r"no mlp.*_proj; give"):  # it is of whole names
        check_adapter(make_model(), AdapterSpec(target_modules="mlp\\..*_proj"))
    for nothing in ([], "", " "):
        with pytest.raises(ValueError, match="no name is given"):
            check_adapter(make_model(), AdapterSpec(target_modules=nothing))
    check_adapter(make_model(), AdapterSpec(target_modules=["all-linear"]))


@pytest.mark.parametrize("given", ["q_proj", "q_proj, self_attn.v_proj", r".*\.(q|v)_proj"])
def test_what_the_check_lets_through_is_what_peft_adapts(make_model, given):
    spec, model = AdapterSpec(r=2, target_modules=given), make_model()
    check_adapter(model, spec)
    adapted = {n.split(".")[-4] for n, _ in add_adapter(model, spec).named_parameters() if "lora_A" in n}
    assert adapted == ({"q_proj"} if given == "q_proj" else {"q_proj", "v_proj"})


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_adapter_settings_have_bounds(bad):
    with pytest.raises(ValueError, match="adapter"):
        AdapterSpec(**bad)


def test_files_of_one_size_and_other_content_have_other_names(tmp_path):
    content = bytearray(range(256)) * 40_000
    (tmp_path / "a.gguf").write_bytes(content)
    first = models._fingerprint(tmp_path / "a.gguf")
    content[len(content) // 2] ^= 1
    (tmp_path / "a.gguf").write_bytes(content)
    assert models._fingerprint(tmp_path / "a.gguf") != first
    (tmp_path / "a.gguf").write_bytes(content + b"\0")
    assert models._fingerprint(tmp_path / "a.gguf") != first
    (tmp_path / "empty").touch()
    assert models._fingerprint(tmp_path / "empty")


def test_a_broken_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ValueError, match=r"cannot load a model from .*model\.gguf .* no GGUF file"):
        load_model(ModelSpec(str(tmp_path / "model.gguf")))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("SOUL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b/soul"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/soul"


def test_an_adapter_without_a_tokenizer_takes_its_bases(tmp_path, make_model, tokenizer):
    """As peft's own ``save_pretrained`` leaves it."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load_model(ModelSpec(str(tmp_path / "base")))
    add_adapter(model, AdapterSpec(r=2)).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/tokenizer_config.json").exists()
    _, found = load_model(ModelSpec(str(tmp_path / "adapter")))
    assert found("Who?").input_ids == tokenizer("Who?").input_ids
