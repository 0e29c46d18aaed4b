"""Model files that are cut short or altered are one message, at once; pickles are not read, and code is not run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from soul.checkpoints import MANIFEST, write_manifest
from soul.data import hub
from soul.gguf_file import check_gguf
from soul.intact import check_model, shapes
from soul.models import ModelSpec, load_model
from soul.pretrained import load_config, load_text_classifier, load_text_encoder, load_tokenizer
from soul.recipe import recipe_from_tree
from soul.run import execute


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that does not answer takes five seconds, and says nothing about files."""
    monkeypatch.setattr(hub, "reachable", lambda: False)


def refused(folder: Path, *words: str) -> str:
    started = time.process_time()
    with pytest.raises(ValueError, match="cannot load a model") as caught:
        load_model(ModelSpec(str(folder)))
    assert time.process_time() - started < 5
    said = str(caught.value)
    for word in words:
        assert word in said
    assert len(said) < 900
    return said


def header(folder: Path) -> tuple[dict, bytes]:
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(folder: Path, tree: object, rest: bytes) -> None:
    text = json.dumps(tree).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rest)


def test_a_whole_model_is_whole(whole: Path):
    check_model(whole)
    assert load_model(ModelSpec(str(whole)))[0].num_parameters() > 0


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_weights_that_are_cut_short(model: Path, keep: int):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(model, "model.safetensors", "cut short, altered", "copy it again")


def test_weights_that_are_altered(model: Path):
    tree, rest = header(model)
    first = next(name for name in tree if name != "__metadata__")
    raw = (model / "model.safetensors").read_bytes()
    for broken in (
        b"\xff" * 8 + raw[8:],
        raw + b"more",
        raw[:8] + b"x" + raw[9:],
        struct.pack("<Q", 1 << 40) + raw[8:],
    ):
        (model / "model.safetensors").write_bytes(broken)
        refused(model, "model.safetensors", "cut short, altered")
    for change in ({"data_offsets": [0, 1 << 50]}, {"dtype": "X9"}, {"shape": [1 << 40, 1 << 40]}, {"shape": "many"}):
        with_header(model, {**tree, first: {**tree[first], **change}}, rest)
        refused(model, "model.safetensors", "cut short, altered")
    with_header(model, {name: value for name, value in tree.items() if name != first}, rest)
    refused(model)


def test_pickles_are_never_read(model: Path, tmp_path: Path):
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        (model / "config.json").write_text('{"model_type": "llama"}')
        refused(model, "pickles", name, "safetensors")
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    refused(model, "pickles", "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_whole_weights_is_not_read(model: Path, tmp_path: Path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    load_model(ModelSpec(str(model)))
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": "own.T"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(model, "Python code", "trust_remote_code=true")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(str(model))
    kept = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(kept | {"auto_map": {"AutoTokenizer": ["own.T", None]}}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # who is asked says yes
    for load in (load_tokenizer, load_text_classifier, load_text_encoder):
        with contextlib.suppress(ValueError):  # a tokenizer loads without its code, where a library knows its class
            load(str(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 10**7}, "vocab_size"),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_size": "wide"}, ""),
        ({"num_hidden_layers": 3}, "missing"),
        ({"hidden_act": "none of these"}, ""),
        ({"model_type": "no such model"}, ""),
        ({"model_type": 7}, ""),
        ({"torch_dtype": "float77", "dtype": "float77"}, ""),
        ({"rope_parameters": 7}, ""),
    ],
    ids=str,
)
def test_a_configuration_that_is_altered(model: Path, change: dict, words: str):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused(model, words)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00", '{"a": 1, "a": 2}', "[" * 100_000, "null"], ids=lambda t: t[:9]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_of_a_model_that_is_broken(model: Path, name: str, text: str):
    (model / name).write_text(text)
    refused(model, name, "copy" if text not in ("[]", "null") else "must hold an object")


@pytest.mark.parametrize(
    "tree", [{}, {"model": {}}, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["b"]]}}], ids=str
)
def test_a_tokenizer_that_is_altered(model: Path, tree: dict):
    (model / "tokenizer.json").write_text(json.dumps(tree))
    refused(model)
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(str(model))


def test_a_tokenizer_of_another_model(model: Path):
    tree = json.loads((model / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {f"more{i}": 340 + i for i in range(100)}
    (model / "tokenizer.json").write_text(json.dumps(tree))
    refused(model, "its tokenizer has", "embeds")


def test_an_index_that_leaves_its_folder(model: Path):
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    for name, words in (
        ("../outside.safetensors", "same folder"),
        ("none.safetensors", "not there"),
        (7, "weight_map"),
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(shapes(model.parent / "outside.safetensors"), name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(model, words)


def test_an_adapter_that_is_broken(model: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for text, words in (
        ("{}", "names no base"),
        ('{"base_model_name_or_path": 7}', "names no base"),
        ("{", "invalid JSON"),
    ):
        (adapter / "adapter_config.json").write_text(text)
        refused(adapter, words)
    for base in (model, adapter):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        refused(adapter, "no adapter_model.safetensors")
    shutil.copy(model / "model.safetensors", adapter / "adapter_model.safetensors")
    refused(adapter, "an adapter itself")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", torch.zeros(3, 8).numpy())
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def test_a_gguf_file_of_another_writer_is_whole(gguf: bytes, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(gguf)
    check_gguf(tmp_path / "x.gguf")


def test_a_gguf_file_that_is_cut_short_anywhere(gguf: bytes, tmp_path: Path):
    file = tmp_path / "x.gguf"
    last = len(gguf.rstrip(b"\0"))  # what follows are zeros of the last tensor
    for keep in [*range(0, 700, 13), *range(700, last, 101), len(gguf) - 1]:
        file.write_bytes(gguf[:keep])
        with pytest.raises(ValueError, match=r"x\.gguf \(.* bytes\) is cut short, altered or no GGUF file"):
            check_gguf(file)


def test_a_gguf_file_that_is_altered_anywhere(gguf: bytes, tmp_path: Path):
    """Each eight bytes in turn say a huge number: it is refused, or makes another whole file, and never counted to."""
    file = tmp_path / "x.gguf"
    started = time.process_time()
    refusals = 0
    for at in range(0, 900, 4):
        for number in (b"\xff" * 8, (1 << 62).to_bytes(8, "little"), (1 << 33).to_bytes(8, "little")):
            file.write_bytes(gguf[:at] + number + gguf[at + 8 :])
            try:
                check_gguf(file)
            except ValueError:
                refusals += 1
    assert time.process_time() - started < 10
    assert refusals > 200


@pytest.mark.parametrize("cut", [10, 300, -1])
def test_a_broken_gguf_file_is_no_model(gguf: bytes, tmp_path: Path, cut: int, monkeypatch):
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(gguf[:cut])
    refused(tmp_path / "x.gguf", "x.gguf", "cut short")
    (tmp_path / "x.gguf").write_bytes(gguf)
    refused(tmp_path / "x.gguf", "not a GGUF file that transformers reads")  # a whole file, and no whole model
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_checkpoint_with_a_pickle_in_it_runs_nothing(model: Path, tmp_path: Path, forget_set, retain_set):
    """What is gone on from is read as tensors and plain values alone; all else is refused by its name."""
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        rows = [{"question": e.prompt, "answer": e.answer} for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl"), "overlap": "ignore"}
    training = {"max_steps": 4, "save_steps": 2, "batch_size": 2, "precision": "float32"}
    recipe = recipe_from_tree({"model": str(model), "data": data, "optimizer": "adamw", "training": training})

    def stop(what: str, done: int, _of: int) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out, progress=stop, evaluate_it=False)
    checkpoint = out / "checkpoints/checkpoint-2"

    def sign() -> None:
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint, 2)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        torch.save({"state": Bomb(tmp_path / "ran")}, checkpoint / name)
        sign()
        with pytest.raises(ValueError, match="checkpoint-2 was altered"):
            execute(recipe, out, evaluate_it=False)
        assert not (tmp_path / "ran").exists()
        (checkpoint / name).write_bytes(whole)
    sign()
    execute(recipe, out, evaluate_it=False)
    assert (out / "model/model.safetensors").is_file()
