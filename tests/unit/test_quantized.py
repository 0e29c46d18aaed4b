"""A base in 8 or 4 bits under an adapter: what is trained, merged, saved and loaded again stays one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import soul
from soul import quantized
from soul.adapters import AdapterSpec, add_adapter
from soul.attacks.quantize import Quantize
from soul.evaluate import EvaluationSpec, evaluate
from soul.export import export
from soul.models import ModelSpec, load_model, save_model
from soul.quantized import is_quantized
from soul.recipe import recipe_from_tree
from soul.run import execute
from soul.types import Example

needs_library = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def saved(tmp_path: Path, make_model: Any, tokenizer: Any) -> Path:
    save_model(make_model(3), tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


def nlls(model: Any, tokenizer: Any, examples: list[Example]) -> list[float]:
    rows = evaluate(model, tokenizer, {"forget": examples}, spec=EvaluationSpec(generate=False))
    return [row["nll"] for row in rows["forget"]]


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_without_the_library_one_message_says_what_to_do(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^model\.quantize=nf4 needs bitsandbytes.*pip install"):
        load_model(ModelSpec(str(saved), quantize="nf4"))


def test_plain_weights_that_were_quantized_once_are_never_quantized_again(
    make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(3)
    model.config.dequantized_from = "nf4"
    save_model(model, tokenizer, tmp_path / "merged")
    monkeypatch.setattr("soul.models.check_library", lambda kind: None)
    loaded, _ = load_model(ModelSpec(str(tmp_path / "merged"), quantize="nf4", device="cpu"))
    assert not is_quantized(loaded)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in make_model(3).state_dict().items())


@needs_library
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_is_near_the_model_and_not_it(
    saved: Path, tokenizer: Any, forget_set: list[Example], make_model: Any, kind: Any
) -> None:
    model, _ = load_model(ModelSpec(str(saved), quantize=kind, device="cpu"))
    assert is_quantized(model)
    found, plain = nlls(model, tokenizer, forget_set), nlls(make_model(3), tokenizer, forget_set)
    assert found != plain
    assert found == pytest.approx(plain, abs=0.1 if kind == "int8" else 1.0)


@needs_library
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_on_it_is_trained_and_merged_without_rounding(
    saved: Path, tokenizer: Any, forget_set: list[Example], retain_set: list[Example], tmp_path: Path, kind: Any
) -> None:
    spec = ModelSpec(str(saved), quantize=kind, device="cpu")
    adapted = add_adapter(load_model(spec)[0], AdapterSpec(r=4))
    before = nlls(adapted, tokenizer, forget_set)
    training = {"max_steps": 4, "precision": "float32", "schedule": "constant"}
    optimizer = {"name": "kfac", "lr": 0.1}
    soul.unlearn(adapted, tokenizer, forget=forget_set, retain=retain_set, optimizer=optimizer, training=training)
    after = nlls(adapted, tokenizer, forget_set)
    assert sum(after) > sum(before) + 1
    save_model(adapted, tokenizer, tmp_path / "adapter", str(saved))
    merged = adapted.merge_and_unload()
    # LLM.int8 rounds what goes into a layer too, which plain weights do not
    assert nlls(merged, tokenizer, forget_set) == pytest.approx(after, abs=1e-4 if kind == "nf4" else 0.3)
    save_model(merged, tokenizer, tmp_path / "merged")
    for folder in ("merged", "adapter"):
        loaded, _ = load_model(ModelSpec(str(tmp_path / folder), quantize=kind, device="cpu"))
        assert not is_quantized(loaded)
        for key, value in merged.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=1e-6)
    plain, _ = load_model(ModelSpec(str(tmp_path / "merged"), device="cpu"))
    Quantize(bits=8)(plain, None)  # type: ignore[arg-type]  # looks at no data


@needs_library
def test_gradients_through_it_are_right_after_an_evaluation_too(
    saved: Path, tokenizer: Any, forget_set: list[Example]
) -> None:
    spec = ModelSpec(str(saved), quantize="nf4", device="cpu")
    adapted = add_adapter(load_model(spec)[0], AdapterSpec(r=4))
    nlls(adapted, tokenizer, forget_set)
    dense = add_adapter(load_model(spec)[0], AdapterSpec(r=4)).merge_and_unload()  # adds nothing: B is 0
    twin = add_adapter(dense, AdapterSpec(r=4))
    found, expected = gradients_of(adapted), gradients_of(twin)
    assert found.keys() == expected.keys()
    assert sum("lora_B" in name for name in found) == 14
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


@needs_library
def test_a_run_on_it_is_measured_saved_and_exported(
    saved: Path, forget_set: list[Example], retain_set: list[Example], tmp_path: Path
) -> None:
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        lines = [f'{{"question": "{e.prompt}", "answer": "{e.answer}"}}' for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tree: dict[str, Any] = {
        "model": {"path": str(saved), "quantize": "nf4", "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")},
        "training": {"max_steps": 2, "precision": "float32"},
        "evaluation": {"generate": False},
    }
    execute(recipe_from_tree(tree), tmp_path / "run")
    assert all(c.largest < 1e-5 for c in export(tmp_path / "run", tmp_path / "merged"))
    with pytest.raises(ValueError, match="adapter"):
        execute(recipe_from_tree({k: v for k, v in tree.items() if k != "adapter"}), tmp_path / "no adapter")
