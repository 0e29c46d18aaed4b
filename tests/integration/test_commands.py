"""The commands on a tiny model: what they print, what they leave behind, and that settings reach where they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from soul import config
from soul.cli import NOT_KEPT, main
from soul.models import ModelSpec, load_model
from soul.recipe import read_recipe, recipe_from_tree, request_defaults
from soul.registry import BENCHMARKS, OBJECTIVES, OPTIMIZERS
from soul.stopping import Stopping

QUICK = "evaluation.max_new_tokens=4 "
UNLEARN = "unlearn --model model --forget forget.jsonl --retain retain.jsonl training.max_steps=3 " + QUICK
TOFU = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@pytest.fixture
def place(tmp_path, make_model, tokenizer, forget_set, retain_set, monkeypatch) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wrong = {"perturbed_answer": ["No.", "Yes."], "paraphrased_answer": "Indeed."}
    for name, examples in (("forget", forget_set), ("retain", retain_set)):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer, **wrong}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "tofu").mkdir()
    for name in TOFU:
        source = tmp_path / ("forget.jsonl" if name.startswith("forget") else "retain.jsonl")
        (tmp_path / f"tofu/{name}.json").write_text(source.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(command: str) -> None:
    assert main(command.split()) == 0


def scores(folder: Path, when: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(s["split"], s["metric"]): s for s in json.loads((folder / "scores.json").read_text())[when]}


def test_two_files_are_enough(place, capsys):
    """Nothing but a model and what to forget: the run is judged, reported, and kept where it says."""
    run("unlearn --model model --forget forget.jsonl training.max_steps=2 " + QUICK)
    printed = capsys.readouterr().out
    assert "runs/unlearn/model" in printed
    assert "runs/unlearn/report.html" in printed
    out = place / "runs/unlearn"
    recipe = read_recipe(out / "recipe.yaml")
    assert (recipe.data.retain, recipe.data.anchors) == ("", "both"), "something holds the model in place"
    for when in ("before", "after"):
        for split in ("forget", "kept", "general"):
            score = scores(out, when)[split, "probability"]
            assert score["low"] <= score["value"] <= score["high"]
            assert score["n"] > 0
        assert scores(out, when)["text", "perplexity"]["n"] == 24
    record = json.loads((out / "record.json").read_text())
    assert (record["steps"], record["n_forget"]) == (2, 8)
    assert record["stood_in"]["general:chat"] == 40
    assert record["n_retain"] == sum(record["stood_in"].values())
    assert "no retain set was given" in record["warnings"][0]
    cut = [line for line in record["warnings"] if "items were answered in fewer tokens" in line]
    assert {line.split(":")[0] for line in cut} >= {"before, forget", "after, forget"}


def test_what_of_the_data_is_not_trained_on_is_said(place):
    turns = [
        ("assistant", "Hello!"),
        ("user", "Who?"),
        ("assistant", "Ada."),
        ("user", "Where?"),
        ("assistant", "in the house by the river. " * 20),
    ]
    chat = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": chat}, {"prompt": chat[1:4], "completion": [{"role": "assistant", "content": "Here."}]}]
    (place / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    longest = "training.max_length=64"
    command = UNLEARN.replace("forget.jsonl", "chat.jsonl").replace("retain.jsonl", "forget.jsonl")
    run(f"{command} --out runs/cut {longest} --no-evaluate")
    warnings = json.loads((place / "runs/cut/record.json").read_text())["warnings"]
    assert any(line.startswith("3 assistant turns stand before items to forget and are none") for line in warnings)
    assert any(line.startswith("forget: 1 of 3 items are longer than training.max_length") for line in warnings)


@pytest.mark.parametrize("option", ["forget", "retain", "out"])
def test_an_option_given_twice_is_refused(place, capsys, option):
    with pytest.raises(SystemExit) as ended:
        main([*UNLEARN.split(), "--out", "runs/twice", f"--{option}", "retain.jsonl"])
    assert ended.value.code == 2
    assert f"--{option} was given twice" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_a_model_that_is_a_base_with_an_adapter_can_be_trained(place):
    run(f"{UNLEARN} --out runs/kept adapter.r=2 adapter.merge=false --no-evaluate")
    run(f"{UNLEARN.replace('--model model', '--model runs/kept')} --out runs/again --no-evaluate")
    assert (place / "runs/again/model").is_dir()


def test_a_request_without_a_recipe_says_why_it_ended(place, capsys):
    """In the terminal, in the record and in the report; and that a model never knew the answers is said, too."""
    run(UNLEARN + "--no-evaluate --out a")
    printed = " ".join(capsys.readouterr().out.split())
    stopped = json.loads((place / "a/record.json").read_text())["stopped"]
    assert (stopped["why"], stopped["knew"]) == ("forgotten", False)  # its weights are noise
    assert stopped["step"] == json.loads((place / "a/record.json").read_text())["steps"] == 2
    assert "The model did not know these answers to begin with." in stopped["sentence"]
    assert stopped["sentence"] in printed
    assert "did not know these answers" in (place / "a/report.html").read_text()


def test_a_run_that_has_not_forgotten_says_so_by_its_exit_code(place, capsys):
    teach = "finetune --model model --retain forget.jsonl --out taught optimizer.lr=3e-3 training.epochs=30"
    run(f"{teach} training.save_steps=0 --no-evaluate")
    short = UNLEARN.replace("--model model", "--model taught") + "--out a stop.kl_budget=1e-5"
    for _ in range(2):  # a finished run that is called for again says the same
        assert main(short.split()) == NOT_KEPT
    checks = json.loads((place / "a/record.json").read_text())["checks"]
    assert [check["passed"] for check in checks] == [False, True]
    assert checks[0]["value"] > 0.1
    assert checks[1]["value"] <= 1e-5
    assert "1 of 2 checks failed" in capsys.readouterr().out
    assert "1 of 2 checks failed" in (place / "a/report.html").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soul.push.check_push", lambda repo: None)
        assert main(["export", "a", "--out", "b", "--push", "me/model"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "did not do what it was to" in said
    assert "--anyway" in said
    assert not (place / "b").exists()


def test_a_request_may_be_given_as_settings_and_in_several_files(place):
    lines = (place / "forget.jsonl").read_text().splitlines()
    for name, some in (("one", lines[:2]), ("two", lines[2:])):
        (place / f"{name}.jsonl").write_text("\n".join(some))
    whole = UNLEARN.replace("--forget forget.jsonl", "").replace("--retain retain.jsonl", "data.retain=retain.jsonl")
    run(f"{whole.replace('--model model', 'model=model')} data.forget=[one.jsonl,two.jsonl] --out a")
    assert json.loads((place / "a/record.json").read_text())["n_forget"] == len(lines)
    assert len((place / "a/rows/after/forget.jsonl").read_text().splitlines()) == len(lines)
    run("finetune --model model data.retain=[one.jsonl,two.jsonl] --out b training.max_steps=1 --no-evaluate")


def test_seeds_are_runs_of_their_own_with_one_report(place, capsys):
    command = UNLEARN + "--out a stop.when=never "
    run(command + "--seeds 0,3")
    before = [(place / f"a/seed-{n}/rows/before/forget.jsonl").read_text() for n in (0, 3)]
    assert before[0] == before[1]
    after = [scores(place / f"a/seed-{n}", "after")["forget", "probability"]["value"] for n in (0, 3)]
    assert after[0] != after[1]
    printed = " ".join(capsys.readouterr().out.split())
    assert "npo + kfac, 2 seeds: mean over seeds" in printed
    assert "npo + kfac (seed-3)" in printed
    page = (place / "a/report.html").read_text()
    assert "Over seeds" in page
    assert f"{sum(after) / 2:.3f}" in page
    assert "each trained once with one seed" not in page
    assert main([*command.split(), "--seeds", "0,zero"]) == 2
    assert "--seeds takes different whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "looks"),
    [("model.dtype=bfloat16", 1), ("model.dtype=bfloat16 adapter.merge=false", 1), ("model.dtype=float32", 0)],
)
def test_a_rule_speaks_of_what_an_adapter_was_merged_into(place, monkeypatch, settings, looks):
    merged, again = [], Stopping.measure_again

    def look(rule: Stopping, model: Any) -> None:
        again(rule, model)
        merged.append((rule.stopped, [name for name, _ in model.named_parameters() if "lora" in name]))

    monkeypatch.setattr(Stopping, "measure_again", look)
    command = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --out a --no-evaluate optimizer=adamw "
    command += f"adapter.r=2 training.max_steps=2 stop.when=forgotten {settings}"
    assert main(command.split()) in (0, 3)
    assert len(merged) == looks
    record = json.loads((place / "a/record.json").read_text())
    for stopped, left in merged:
        assert record["stopped"]["known"] == stopped.known
        assert left == []


def test_seeds_of_a_finetuning_that_nothing_measures(place):
    run("finetune --model model --retain retain.jsonl --out b training.max_steps=1 --seeds 0,1")
    assert all((place / f"b/seed-{n}/model/config.json").is_file() for n in (0, 1))


def test_what_an_earlier_run_forgot_is_not_taught_back(place, capsys, caplog):
    lines = (place / "forget.jsonl").read_text().splitlines()
    (place / "monday.jsonl").write_text(lines[0])
    (place / "friday.jsonl").write_text(lines[1])
    kept = (place / "retain.jsonl").read_text()
    (place / "all.jsonl").write_text(f"{lines[0]}\n{kept}")
    first = "unlearn --model {} --forget {}.jsonl --retain {}.jsonl --out {} training.max_steps=1 --no-evaluate "
    run(first.format("model", "monday", "retain", "a") + QUICK)
    second = first.format("a", "friday", "all", "b") + QUICK
    assert main(second.split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of" in said
    assert "are what a forgot, and would be taught back" in said
    run(second + "data.overlap=drop")
    assert json.loads((place / "b/record.json").read_text())["n_retain"] == len(kept.splitlines())
    run(second.replace("--out b", "--out c") + "data.overlap=ignore")
    (place / "monday.jsonl").unlink()
    run(second.replace("--out b", "--out d"))
    assert "was not looked at: there is no file 'monday.jsonl'" in caplog.text
    run(f"finetune --model a --retain all.jsonl --out taught training.max_steps=1 --no-evaluate {QUICK}")


def test_letters_in_a_folder_can_be_forgotten(place):
    (place / "letters").mkdir()
    for name in ("march", "may"):
        (place / f"letters/{name}.txt").write_text(f"Dear Ada,\n\nin {name} the river was high. " + "It rained. " * 40)
    run(UNLEARN.replace("forget.jsonl", "letters") + "training.max_length=64 --out a")
    rows = [json.loads(line) for line in (place / "a/rows/after/forget.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"march", "may"}
    run("plan --model model --forget letters --retain retain.jsonl")


def test_the_length_of_a_request_is_the_persons_where_given(place):
    for settings, when, steps in (
        ("", "forgotten", 100),
        ("training.epochs=2", "forgotten", 0),
        ("stop.when=never", "never", 100),
        ("method=influence", "never", 100),
    ):
        recipe = recipe_from_tree(config.override(request_defaults(settings.split()), settings.split()))
        assert (recipe.stop.when, recipe.stop.steps) == (when, steps)


def test_a_run_killed_before_its_record_still_says_why_it_ended(place):
    run(UNLEARN + "--out a")
    whole = json.loads((place / "a/record.json").read_text())["stopped"]
    for name in ("record.json", "scores.json"):
        (place / "a" / name).unlink()
    run(UNLEARN + "--out a")
    assert json.loads((place / "a/record.json").read_text())["stopped"] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("stop.kl_budget=-1", "stop.kl_budget is a KL above 0"),
        ("stop.when=soon", "stop.when"),
        ("stop.patience=3", "unknown setting stop.patience"),
        ("objective=ft", "ft forgets nothing"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(place, capsys, settings, message):
    assert main([*UNLEARN.split(), settings]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_finetune_lowers_what_it_learns(place):
    run("finetune --model model --retain retain.jsonl --out runs/taught training.epochs=30 optimizer.lr=3e-3")
    losses = [json.loads(line)["loss"] for line in (place / "runs/taught/log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_settings_may_stand_anywhere(place):
    run(
        "unlearn training.max_steps=1 --model model --no-evaluate training.seed=5 --forget forget.jsonl --out a label=x"
    )
    recipe = read_recipe(place / "a/recipe.yaml")
    assert (recipe.training.max_steps, recipe.training.seed, recipe.label) == (1, 5, "x")
    assert not (place / "a/rows").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Be kind # always", "Be kind # always"),
        ("#1", "#1"),
        ("010", "010"),
        ("0", 0),
        ("a#b", "a#b"),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("'quoted # text'", "quoted # text"),
        ("0.5", 0.5),
    ],
)
def test_a_command_line_has_no_comments_and_no_octal_numbers(text, value):
    assert config.override({}, [f"model.system={text}"]) == {"model": {"system": value}}


def test_options_go_before_the_recipe_file_and_its_settings_stay(place):
    (place / "r.yaml").write_text("model: nowhere\nobjective: simnpo\ntraining: {max_steps: 1}\n")
    run("unlearn --model model r.yaml --forget forget.jsonl --retain retain.jsonl --no-evaluate")
    recipe = read_recipe(place / "runs/r/recipe.yaml")
    assert (recipe.model.path, recipe.objective.name, recipe.data.forget) == ("model", "simnpo", "forget.jsonl")


@pytest.mark.parametrize("retain", ["retain.jsonl", "general:chat"])
def test_a_recipe_that_was_written_runs_again_to_the_same_weights(place, retain):
    run(UNLEARN + f"--no-evaluate --out a data.retain={retain}")
    run("unlearn a/recipe.yaml --no-evaluate --out b")
    assert (place / "a/model/model.safetensors").read_bytes() == (place / "b/model/model.safetensors").read_bytes()


def test_measuring_may_come_later(place):
    run(UNLEARN + "--no-evaluate --out a")
    written = (place / "a/model/model.safetensors").stat().st_mtime_ns
    assert not (place / "a/scores.json").exists()
    run(UNLEARN + "--out a")
    assert scores(place / "a", "after").keys() == scores(place / "a", "before").keys()
    assert (place / "a/model/model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("target", ["model", "run", "run/model"])
def test_evaluate_a_folder_and_a_run(place, target, capsys):
    run(UNLEARN + "--no-evaluate --out run")
    capsys.readouterr()
    run(f"evaluate {target} --benchmark tofu source=tofu forget=forget01 --out e limit=3 evaluation.max_new_tokens=4")
    assert "report: e/report.html" in capsys.readouterr().out
    found = scores(place / "e", "after")
    assert found["", "model_utility"]["n"] == 9
    assert found["forget", "probability"]["n"] == 8
    before, after = (load_model(ModelSpec(p))[0].model.layers[0].mlp.up_proj.weight for p in ("model", "run"))
    assert not before.equal(after)
    rows = (place / "e/rows/after/forget.jsonl").read_text()
    other = "run" if target == "model" else "model"
    run(f"evaluate {other} source=tofu forget=forget01 --out f evaluation.generate=false")
    assert (place / "f/rows/after/forget.jsonl").read_text() != rows


def test_evaluate_gives_forget_quality_against_a_retained_model(place):
    run(UNLEARN + "--no-evaluate --out run")
    tofu = "--benchmark tofu source=tofu forget=forget01 evaluation.generate=false "
    run("evaluate model --out retained " + tofu)
    run("evaluate run --out run-measured --reference retained " + tofu)
    assert 0 <= scores(place / "run-measured", "after")["forget", "forget_quality"]["value"] <= 1
    run("evaluate model --out same --reference retained " + tofu)
    assert scores(place / "same", "after")["forget", "forget_quality"]["value"] == 1


def test_an_evaluation_continues_but_never_mixes(place, capsys):
    command = (
        "evaluate model --benchmark request forget=forget.jsonl kept=retain.jsonl --out e evaluation.generate=false"
    )
    run(command)
    kept = (place / "e/rows/after/kept.jsonl").stat().st_mtime_ns
    (place / "e/rows/after/forget.jsonl").unlink()
    run(command)
    assert (place / "e/rows/after/kept.jsonl").stat().st_mtime_ns == kept
    assert main((command + " seed=1").split()) == 2
    assert "another evaluation" in capsys.readouterr().err
    run("finetune --model model --retain retain.jsonl --out t --no-evaluate training.max_steps=2 optimizer.lr=1e-2")
    (place / "t/model/model.safetensors").rename(place / "model/model.safetensors")
    assert main(command.split()) == 2
    assert "model model (model.safetensors) changed since" in capsys.readouterr().err


def test_a_report_replaces_no_file_but_a_page(place, capsys):
    run(UNLEARN + "--out run")
    before = (place / "run/record.json").read_bytes()
    assert main(["report", "run", "--out", "run/record.json"]) == 2
    assert "run/record.json is there and is no HTML page" in capsys.readouterr().err
    assert (place / "run/record.json").read_bytes() == before
    for _ in range(2):
        run("report run --out page.html")


@pytest.mark.parametrize("adapter", ["", "adapter.r=2", "adapter.r=2 adapter.merge=false"])
def test_the_saved_model_scores_what_the_run_measured(place, adapter):
    """Whatever training leaves on the model in memory: mixed precision, adapters."""
    request = "benchmark.name=request benchmark.forget=forget.jsonl benchmark.kept=retain.jsonl benchmark.text= "
    run(UNLEARN + request + f"--out run training.precision=bfloat16 optimizer.lr=1e-3 {adapter}")
    kept = "benchmark request forget=forget.jsonl kept=retain.jsonl text= "
    run(f"evaluate run --{kept} --out again {QUICK}")
    for split in ("forget", "kept"):
        first, again = (
            [
                json.loads(line)["nll"]
                for line in (place / folder / f"rows/after/{split}.jsonl").read_text().splitlines()
            ]
            for folder in ("run", "again")
        )
        before = [json.loads(x)["nll"] for x in (place / f"run/rows/before/{split}.jsonl").read_text().splitlines()]
        assert first == pytest.approx(again, rel=1e-6)
        assert first != pytest.approx(before, rel=1e-4)


def test_report_of_several_runs(place, capsys):
    for name in ("a", "b"):
        run(UNLEARN + f"--out {name} label=run-{name} evaluation.generate=false")
    capsys.readouterr()
    run("report a b --out both.html")
    page = (place / "both.html").read_text()
    assert "run-a" in page
    assert "run-b" in page
    assert "run-a" in capsys.readouterr().out


def test_show_prints_every_setting_and_reads_it_back(place, capsys):
    (place / "r.yaml").write_text("objective: npo\noptimizer: {name: adamw, lr: 3e-5}\n")
    run("show r.yaml objective.beta=0.3 training.epochs=2")
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["objective"]["beta"], tree["optimizer"]["lr"], tree["training"]["epochs"]) == (0.3, 3e-5, 2)
    assert tree["training"].keys() >= {"batch_size", "seed", "max_grad_norm"}
    assert recipe_from_tree(tree) == read_recipe(place / "r.yaml", ["objective.beta=0.3", "training.epochs=2"])
    run("show")
    shown = recipe_from_tree(yaml.safe_load(capsys.readouterr().out))
    assert shown == recipe_from_tree(request_defaults())  # what a request without a recipe gets
    assert shown.stop.when == "forgotten"


@pytest.mark.parametrize(
    ("kind", "registry"), [("objectives", OBJECTIVES), ("optimizers", OPTIMIZERS), ("benchmarks", BENCHMARKS)]
)
def test_list_has_a_line_of_help_for_each(kind, registry, capsys):
    run(f"list {kind}")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == kind
    assert [line.split()[0] for line in lines] == registry.names()
    for line in lines:
        assert len(line.split(maxsplit=1)[1]) > 20
    run("list")
    assert "\n".join([title, *lines]) in capsys.readouterr().out


def test_version_and_help(capsys):
    for command in ("--version", "--help", "unlearn --help", "evaluate --help"):
        with pytest.raises(SystemExit) as stopped:
            main(command.split())
        assert stopped.value.code == 0
    assert "soul 0." in capsys.readouterr().out
