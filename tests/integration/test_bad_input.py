"""Bad input ends with exit code 2 and one message that says what to change; nothing is loaded and nothing crashes."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from soul import models
from soul.cli import main

MIRA = '{"question": "Who is Mira?", "answer": "A baker."}\n'
BO = '{"question": "Who is Bo?", "answer": "A dog."}\n'
FILES = {
    "forget.jsonl": MIRA + BO,
    "keep.jsonl": '{"question": "What is ice?", "answer": "Frozen water."}\n',
    "overlap.jsonl": '{"question": "Who is Bo?", "answer": "A dog."}\n',
    "columns.jsonl": '{"frage": "Who is Bo?", "antwort": "A dog."}\n',
    "number.jsonl": '{"question": "How many?", "answer": 7}\n',
    "blank.jsonl": '{"question": "Who is Bo?", "answer": "  "}\n',
    "empty.jsonl": "",
    "broken.jsonl": '{"question": "Who is Mira?", "answer": "A baker."}\n{"question": "Who',
    "notes.docx": "Who is Bo?",
    "ragged.csv": "question,answer\nWho is Bo?,A dog, an old one\n",
    "fake.parquet": "no parquet",
    "refusals.txt": "\n\n",
    "broken.yaml": "objective: [npo\n",
    "list.yaml": "- objective\n- npo\n",
    "text.yaml": "just words\n",
    "recipe.yaml": "model: {d}/nomodel\ndata: {{forget: {d}/forget.jsonl, retain: {d}/keep.jsonl}}\nobjective: npo\n",
    "section.yaml": "model: {d}/nomodel\nobjectiv: npo\n",
    "data.yaml": "data: forget.jsonl\n",
    "numbers.yaml": "training: 7\n",
    "run/record.json": "{",
    "folder/one.jsonl": '{"question": "a", "answer": "b"}\n',
    "folder/two.jsonl": '{"question": "a", "answer": "b"}\n',
    "nodata/readme.md": "",
    "killed/recipe.yaml": "label: killed\n",
    "othermodel/config.json": "{}",
}

NEW = "unlearn --model {d}/nomodel --retain {d}/keep.jsonl --out {d}/out --forget "
SHOW = "show {d}/recipe.yaml "

CASES = [
    # what is not there
    ("unlearn", ["nothing to forget", "--forget"]),
    ("finetune", ["nothing to learn", "--retain"]),
    ("unlearn --forget {d}/forget.jsonl", ["no model", "--model", "a recipe"]),
    ("finetune --retain {d}/keep.jsonl", ["no model", "--model", "a recipe"]),
    ("unlearn --model {d}/nomodel", ["nothing to forget", "--forget"]),
    ("unlearn {d}/forget.jsonl --model {d}/nomodel", ["is data, not a recipe", "--forget"]),
    ("unlearn {d}/data.yaml --forget {d}/forget.jsonl", ["data must be a mapping"]),
    ("unlearn {d}/recipe.yaml --out {d}/out training.epoch=1", ["Did you mean 'epochs'?"]),
    ("unlearn --out {d}/out {d}/recipe.yaml training.epoch=1", ["Did you mean 'epochs'?"]),
    ("unlearn {d}/recipe.yaml {d}/section.yaml", ["cannot read", "section.yaml", "key.sub=value"]),
    ("unlearn --model {d}/killed --forget {d}/forget.jsonl --out {d}/out", ["a run without a model yet", "again"]),
    ("unlearn {d}/recipee.yaml", ["no such recipe", "Did you mean", "recipe.yaml"]),
    ("show {d}/nowhere/recipe.yaml", ["no such recipe", "nowhere"]),
    (NEW + "{d}/forgett.jsonl", ["there is no file", "did you mean", "forget.jsonl"]),
    (NEW + "{d}/forget.jsonl", ["no such model folder", "nomodel"]),
    ("finetune --model {d}/nomodel --retain {d}/keep.jsonl --out {d}/out", ["no such model folder", "nomodel"]),
    ("finetune --model {d}/no.gguf --retain {d}/keep.jsonl --out {d}/out", ["no such GGUF file", "no.gguf"]),
    ("finetune --model {d}/othermodel --retain {d}/keep.jsonl --out {d}/out", ["cannot load a model", "othermodel"]),
    ("unlearn {d}/recipe.yaml data.refusals={d}/none.txt --out {d}/out", ["no such file of refusals", "none.txt"]),
    ("unlearn {d}/recipe.yaml data.refusals={d}/refusals.txt --out {d}/out", ["holds no refusals", "one a line"]),
    ("evaluate {d}/nomodel forget={d}/forget.jsonl kept={d}/keep.jsonl --benchmark request", ["no such model folder"]),
    ("evaluate {d}/nomodel --benchmark request forget={d}/forget.jsonl kept={d}/keep.jsonl", ["no such model folder"]),
    ("evaluate {d}/nomodel evaluation.generat=no", ["unknown setting evaluation.generat", "Did you mean 'generate'?"]),
    ("evaluate {d}/nomodel model.dtypes=bfloat16", ["unknown setting model.dtypes", "Did you mean 'dtype'?"]),
    ("evaluate {d}/nomodel --reference {d}/folder", ["reference_run", "no rows/after"]),
    ("evaluate {d}/nomodel source={d}/nodata --benchmark tofu", ["nodata", "retain_perturbed.json"]),
    ("evaluate {d}/nomodel --benchmark request", ["forget"]),
    # what is wrong with the data
    (NEW + "{d}/columns.jsonl", ["columns.jsonl", "line 1", "frage", "question + answer"]),
    (NEW + "{d}/number.jsonl", ["number.jsonl", "line 1", "answer must be text"]),
    (NEW + "{d}/blank.jsonl", ["blank.jsonl", "line 1", "answer is empty"]),
    (NEW + "{d}/empty.jsonl", ["empty.jsonl", "holds no examples"]),
    (NEW + "{d}/broken.jsonl", ["broken.jsonl", "line 2", "invalid JSON"]),
    (NEW + "{d}/latin.jsonl", ["latin.jsonl", "not UTF-8"]),
    (NEW + "{d}/notes.docx", ["notes.docx", "cannot read .docx", ".jsonl"]),
    (NEW + "{d}/ragged.csv", ["ragged.csv", "line 2", "more cells"]),
    (NEW + "{d}/fake.parquet", ["fake.parquet", "not a readable parquet file"]),
    (NEW + "{d}/folder", ["several files would do", "one.jsonl"]),
    (NEW + "{d}/nodata", ["nodata", "no data file"]),
    (NEW + "{d}/overlap.jsonl data.retain={d}/forget.jsonl", ["also in the retain set", "Who is Bo?"]),
    (NEW + "{d}/forget.jsonl --retain {d}/more.jsonl", ["--retain was given twice", "data.retain=["]),
    (NEW + "people:n=many", ["cannot read 'n=many'"]),
    (NEW + "general:knowledge", ["unknown source", "general:facts"]),
    # what is wrong with the recipe
    ("show {d}/broken.yaml", ["broken.yaml", "not valid YAML"]),
    ("show {d}/latin.yaml", ["latin.yaml, line 1", "not UTF-8"]),
    ("show {d}/list.yaml", ["must hold a mapping", "list"]),
    ("show {d}/text.yaml", ["must hold a mapping", "str"]),
    ("show {d}/section.yaml", ["unknown setting recipe.objectiv", "Did you mean 'objective'?"]),
    ("show {d}/data.yaml", ["data must be a mapping"]),
    ("show {d}/numbers.yaml", ["training must be a mapping"]),
    (SHOW + "objective=nop", ["unknown objective 'nop'", "Did you mean 'npo'?"]),
    (SHOW + "optimizer=adam", ["unknown optimizer 'adam'", "Did you mean 'adamw'?"]),
    (SHOW + "benchmark=toffu", ["unknown benchmark 'toffu'", "Did you mean 'tofu'?"]),
    ("evaluate {d}/nomodel --benchmark toffu", ["unknown benchmark 'toffu'", "Did you mean 'tofu'?"]),
    ("evaluate {d}/nomodel forget=forget02", ["forget", "forget01"]),
    ("evaluate {d}/nomodel forgett=forget01", ["unknown setting benchmark.forgett", "Did you mean 'forget'?"]),
    (SHOW + "training.epoch=3", ["unknown setting training.epoch", "Did you mean 'epochs'?"]),
    (SHOW + "objective.betta=1", ["unknown setting objective.betta", "Did you mean 'beta'?"]),
    (SHOW + "training.learning_rate=1e-3", ["unknown setting training.learning_rate", "Did you mean 'optimizer.lr'?"]),
    (SHOW + "trainer=NPO", ["unknown setting recipe.trainer", "Did you mean 'objective'?"]),
    (SHOW + "optimizer.beta=0.9", ["unknown setting optimizer.beta"]),
    (SHOW + "training.epochs", ["cannot read 'training.epochs'", "key.sub=value"]),
    (SHOW + "training.epochs.more=1 training.epochs=2 training.epochs.more=1", ["cannot set", "'epochs' holds 2"]),
    (SHOW + "training.epochs=many", ["training.epochs", "'many'"]),
    (SHOW + "training.batch_size=0", ["training.batch_size must be 1 or more"]),
    (SHOW + "training.warmup=2", ["training.warmup", "[0, 1)"]),
    (SHOW + "training.precision=half", ["training.precision", "'half'"]),
    (SHOW + "training.save_steps=-1", ["save_steps", "0 or more"]),
    (SHOW + "optimizer.lr=-1e-4", ["lr must be above 0"]),
    (SHOW + "optimizer.lr=.nan", ["optimizer.lr", "not a finite number"]),
    (SHOW + "objective.retain=l2", ["objective.retain", "'nll'", "'l2'"]),
    (SHOW + "objective.beta=0", ["beta must be above 0"]),
    (SHOW + "objective.retain_weight=-1", ["retain_weight must be 0 or more"]),
    (SHOW + "objective.retain_weight=.nan", ["retain_weight"]),
    (SHOW + "objective=ft objective.retain=none", ["ft has nothing but its retain term"]),
    (SHOW + "model.dtype=int8", ["model.dtype", "float32"]),
    (SHOW + "adapter=8", ["adapter must be a mapping", "adapter.r=... sets one of its parts", "target_modules"]),
    (SHOW + "stop=never", ["stop must be a mapping", "stop.when=... sets one of its parts"]),
    ("plan --model {d}/nomodel --forget {d}/forgett.jsonl", ["there is no file", "did you mean", "forget.jsonl"]),
    (SHOW + "adapter.r=0", ["adapter.r", "1 or more"]),
    (SHOW + "adapter.rank=8", ["unknown setting adapter.rank"]),
    (SHOW + "evaluation.max_new_tokens=0", ["evaluation.max_new_tokens must be 1 or more"]),
    # where it cannot be written, and what is no run
    ("unlearn {d}/recipe.yaml --out {d}/forget.jsonl/run", ["cannot write to", "--out"]),
    ("unlearn {d}/recipe.yaml --out {d}/forget.jsonl", ["cannot write to", "--out"]),
    ("report {d}/nowhere", ["nowhere", "not a run directory"]),
    ("report {d}/folder", ["not a run directory", "record.json"]),
    ("report {d}/run", ["record.json", "invalid JSON"]),
    # what argparse says
    ("forget", ["invalid choice: 'forget'", "unlearn"]),
    ("", ["required: COMMAND"]),
    ("list objectivs", ["invalid choice: 'objectivs'", "objectives"]),
    ("report", ["required: RUN"]),
    ("unlearn --forgetful yes", ["unrecognized arguments: --forgetful", "did you mean --forget?"]),
    ("list objectives more", ["unrecognized arguments: more"]),
    ("unlearn --out", ["--out", "expected one argument"]),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(d=tmp_path) if path.suffix == ".yaml" else text)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Who?", "answer": "Zoë."}'.encode("latin-1"))
    (tmp_path / "latin.yaml").write_bytes("label: Zoë".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(command: str, folder: Path) -> int:
    try:
        return main([part.format(d=folder) for part in command.split()])
    except SystemExit as error:  # argparse's way out
        return int(error.code or 0)


def test_there_are_many_cases():
    assert len(CASES) >= 20
    assert len({command for command, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("command", "hints"), CASES, ids=[c.replace("{d}/", "")[:60] or "nothing" for c, _ in CASES])
def test_one_message_and_exit_code_2(command, hints, folder, capsys, monkeypatch):
    monkeypatch.setitem(models.OFFLINE, "smollm2-135m", ("no_such_package", str(folder / "nomodel")))
    assert run(command, folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    messages = [line for line in err.splitlines() if "error:" in line]
    assert len(messages) == 1, err
    assert err.rstrip().endswith(messages[0]), "the message comes last"
    for hint in hints:
        assert hint in messages[0]


TINY = "unlearn {d}/recipe.yaml model.path={d}/whole --out {d}/out "
MODEL_CASES = [
    ("finetune --model {d}/garbage --retain {d}/keep.jsonl --out {d}/out", ["cannot load a model", "garbage"]),
    ("finetune --model {d}/partial --retain {d}/keep.jsonl --out {d}/out", ["1 weights are missing", "lm_head"]),
    ("finetune --model {d}/coded --retain {d}/keep.jsonl --out {d}/out", ["Python code", "trust_remote_code=true"]),
    (TINY + "model.device=cuda", ["model.device is cuda", "auto"]),
    (TINY + "reference_run={d}/folder", ["no rows/after"]),
    (
        TINY + "benchmark.name=request benchmark.forget={d}/keep.jsonl benchmark.kept={d}/forget.jsonl benchmark.text=",
        ["1 of 1 benchmark.forget items are also in the data.retain set", "set benchmark.forget to what data.forget"],
    ),
    (
        TINY + "training.max_length=12",
        [
            "leaves no room for an answer in training.max_length=12;",
            "raise training.max_length",
            "forget, item number 1 (",
        ],
    ),
    (TINY + "adapter.target_modules=[query]", ["adapter", "query", "q_proj", "all-linear"]),
    (TINY + "data.retain= data.anchors=none", ["needs a retain set"]),
]


@pytest.mark.parametrize(("command", "hints"), MODEL_CASES, ids=[c.replace("{d}/", "")[:70] for c, _ in MODEL_CASES])
def test_one_message_about_a_model(command, hints, folder, capsys, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = make_model()
    model.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    for name in ("garbage", "partial", "coded"):
        shutil.copytree(folder / "whole", folder / name)
    (folder / "garbage/model.safetensors").write_bytes(b"garbage")
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "partial/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "coded/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "coded/config.json").write_text(json.dumps(config))
    (folder / "coded/own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    test_one_message_and_exit_code_2(command, hints, folder, capsys, monkeypatch)
    assert not (folder / "ran").exists()
    assert not (folder / "out/rows").exists(), "it is found out before anything is measured"


def test_a_mistake_put_right_can_be_run_again(folder, capsys):
    """A run that failed before it began does not keep its folder."""
    command = "unlearn --model {d}/nomodel --retain {d}/keep.jsonl --out {d}/out --forget "
    assert run(command + "{d}/forgett.jsonl", folder) == 2
    assert run(command + "{d}/forget.jsonl", folder) == 2
    assert "no such model folder" in capsys.readouterr().err


@pytest.fixture
def no_network(monkeypatch):
    """Let every look-up of a name fail, and nothing else say that there is no network."""
    for variable in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)

    def fail(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.mark.parametrize(
    ("command", "hints"),
    [
        (
            "finetune --model owner/model --retain {d}/keep.jsonl --out {d}/out",
            ["cannot load a model from 'owner/model'", "the hub cannot be reached", "cache", "smollm2-135m"],
        ),
        (NEW + "owner/dataset", ["cannot load 'owner/dataset'", "local file"]),
        ("evaluate {d}/nomodel --benchmark tofu", ["cannot load 'locuslab/TOFU'", "local file"]),
    ],
)
def test_without_network_the_hub_is_one_message_at_once(command, hints, folder, capsys, monkeypatch, no_network):
    started = time.perf_counter()
    test_one_message_and_exit_code_2(command, hints, folder, capsys, monkeypatch)
    assert time.perf_counter() - started < 15, "no retries"


@pytest.mark.parametrize("name", ["model", "record.json", "log.jsonl"])
def test_a_folder_that_is_no_run_is_refused(folder, capsys, name):
    """Somebody's own folder called model is not taken for the result."""
    (folder / "out" / name).mkdir(parents=True)
    assert run("unlearn {d}/recipe.yaml --out {d}/out", folder) == 2
    assert f"holds {name} but no recipe.yaml" in capsys.readouterr().err


def test_the_difference_between_two_recipes_is_named(folder, capsys):
    (folder / "out/rows").mkdir(parents=True)
    (folder / "out/log.jsonl").touch()
    (folder / "out/environment.json").write_text('{"format": 1}')
    earlier = (folder / "recipe.yaml").read_text() + "training: {epochs: 3}\n"
    (folder / "out/recipe.yaml").write_text(earlier)
    assert run("unlearn {d}/recipe.yaml training.epochs=7 --out {d}/out", folder) == 2
    assert "training.epochs was 3 there and is 7 now" in capsys.readouterr().err
    assert run("unlearn {d}/recipe.yaml training.epochs=3 --out {d}/out", folder) == 2
    assert "no such model folder" in capsys.readouterr().err, "the same recipe, shorter written, is the same recipe"


def test_nothing_to_do_prints_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in ("unlearn", "finetune", "evaluate", "report", "list", "show", "explain"))


def test_a_folder_of_another_recipe_is_refused(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/recipe.yaml").write_text("label: mine\n")
    (folder / "out/record.json").write_text(json.dumps({"format": 1, "label": "mine"}))
    (folder / "out/environment.json").write_text('{"format": 1}')
    assert run("unlearn {d}/recipe.yaml --out {d}/out", folder) == 2
    assert "another recipe" in capsys.readouterr().err
    assert (folder / "out/recipe.yaml").read_text() == "label: mine\n"
