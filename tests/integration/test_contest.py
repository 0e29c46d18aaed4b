"""A whole contest on a tiny model: every phase, interruption and report."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from soul.cli import main
from soul.contest import trial
from soul.contest.book import Book
from soul.contest.entry import Entry
from soul.contest.jobs import Contest, Job
from soul.contest.matrix import matrix_from_tree, read_matrix
from soul.contest.measure import Meter, load_sets
from soul.contest.trial import Run, do
from soul.curvature.picks import text_rows
from soul.data.batches import VIEWS, collate_items
from soul.evaluate import EvaluationSpec
from soul.metrics.contest import Cell, choose, points_of, runs_of
from soul.metrics.frontier import lost_area
from soul.models import ModelSpec, load_model
from soul.report.contest import ContestRecord, contest_tables, write_contest
from soul.stored import write_lines


def write(file: Path, examples) -> None:
    rows = [
        {
            "question": e.prompt,
            "answer": e.answer,
            "paraphrased_question": f"Please tell: {e.prompt}",
            "perturbed_answer": ["No.", "Yes."],
        }
        for e in examples
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def matrix_file(tmp_path_factory, make_model, tokenizer, forget_set, retain_set):
    """Two requests of four questions; the model was taught all of it, the retrained ones all but a request."""
    folder = tmp_path_factory.mktemp("contest")
    make_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    requests = {"first": forget_set[:4], "second": forget_set[4:]}
    for name, lost in requests.items():
        write(folder / name / "forget.jsonl", lost)
        write(folder / name / "retain.jsonl", retain_set[:4])
        write(folder / name / "curvature.jsonl", retain_set[4:7])
        write(folder / name / "unseen.jsonl", retain_set[7:])
        write(folder / name / "kept.jsonl", [*(e for e in forget_set if e not in lost), *retain_set])
    write(folder / "all.jsonl", [*forget_set, *retain_set])
    taught = {"taught": "all.jsonl"} | {f"gold-{name}": f"{name}/kept.jsonl" for name in requests}
    for out, data in taught.items():
        words = ["--model", str(folder / "base"), "--retain", str(folder / data), "--out", str(folder / out)]
        settings = ["--no-evaluate", "optimizer.lr=3e-3", "training.epochs=30", "training.save_steps=0"]
        assert main(["finetune", *words, *settings]) == 0
    task: dict[str, Any] = {
        name: str(folder / "{request}" / f"{name}.jsonl") for name in ("forget", "retain", "curvature", "unseen")
    }
    task |= {"model": str(folder / "taught/model"), "gold": str(folder / "gold-{request}/model")}
    task |= {"seen": task["retain"], "text": str(folder / "text.jsonl"), "tune": ["first"], "report": ["second"]}
    (folder / "text.jsonl").write_text('{"text": "The river runs by the small house."}\n')
    task["facts"] = {"facts": str(folder / "second/unseen.jsonl")}
    tree = {
        "label": "tiny <b>contest</b>",
        "tasks": {"tiny": task},
        "objectives": ["npo"],
        "optimizers": [
            {"name": "signum", "knob": {"setting": "momentum", "low": 0.5, "high": 0.95, "scale": "complement"}},
            {"name": "kfac", "order": "second", "curvature": {"warm_start": 2}}
            | {"knob": {"setting": "damping", "low": 0.01, "high": 1.0}},
            {"method": {"name": "influence", "inverse": "kfac", "steps": 1, "target_nll": 0.0}}
            | {"order": "second", "knob": {"setting": "max_kl", "low": 0.01, "high": 1.0}},
        ],
        "training": {"batch_size": 2, "max_steps": 6, "precision": "float32", "frozen": "embeddings"},
        "budget": {"points": 3, "checkpoints": 3, "update_rms": 3e-3},
        "evaluation": {"max_new_tokens": 6},
        "attacks": [{"name": "relearn", "lr": 1e-3, "share": 0.5}, {"name": "quantize", "bits": 3, "label": "3 bits"}],
    }
    file = folder / "matrix.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def done(matrix_file, tmp_path_factory):
    """The finished contest, run by the command in two sittings."""
    out = matrix_file.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOUL_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main(["bench", str(matrix_file), "--out", str(out), "--phase", "reference"]) == 0
        first = len(Book(out).lines())
        assert main(["bench", str(matrix_file), "--out", str(out)]) == 0
    return out, first


def test_every_job_is_done_once(done, matrix_file):
    out, first = done
    lines = Book(out).lines()
    kinds = [line["kind"] for line in lines]
    assert first == 2  # before and gold of the request to tune on; the others wait for the tuning
    counts = {k: kinds.count(k) for k in kinds}
    cells = [Cell("tiny", "npo", name) for name in ("signum", "kfac", "influence")]
    chosen = [set(choose(lines, c, ["first"], 3, 2, relative=r) or ()) for r in (False, True) for c in cells]
    reports = sum(len(a | b) for a, b in zip(chosen[:3], chosen[3:], strict=True))  # those that either utility chooses
    assert counts == {"reference": 4, "pilot": 2, "tune": 9, "report": reports, "attack": 4}
    before = (out / "trials.jsonl").read_bytes()
    assert main(["bench", str(matrix_file), "--out", str(out)]) == 0
    assert (out / "trials.jsonl").read_bytes() == before


def test_trials_have_the_settings_of_their_point(done, matrix_file):
    out, _ = done
    matrix, lines = read_matrix(matrix_file), Book(out).lines()
    centre = {x["optimizer"]: x["centre"] for x in lines if x["kind"] == "pilot"}
    assert centre["signum"] == pytest.approx(3e-3, rel=0.35)  # its step is its rate, wherever the sign stays the same
    for x in lines:
        if x["kind"] in ("tune", "report"):
            assert x["settings"] == matrix.settings(x["optimizer"], x["point"], centre.get(x["optimizer"], 1.0))
            expected = [(2, 1.0), (4, 1.0), (6, 1.0)]
            if x["optimizer"] == "influence":  # measured on its way, which is straight
                shares = (1 / 3, 0.5, 2 / 3, 1.0) if x["kind"] == "report" else (1 / 3, 2 / 3, 1.0)
                expected = [(1, share) for share in shares]
                assert x["settings"].keys() == {"knob"}
            elif x["kind"] == "report":
                expected.append((6, 0.5))
            if x["state"] == "done":
                assert [(m["step"], m["share"]) for m in x["measures"]] == expected
            for m in x["measures"]:
                assert ("paraphrased_rougeL" in m["values"]) == (x["kind"] == "report")


def test_the_model_before_and_the_retrained_one_differ_on_what_is_forgotten(done):
    out, _ = done
    thin = {x["which"]: x["thin"] for x in Book(out).lines() if x["kind"] == "reference" and x["request"] == "first"}
    assert thin["before"]["forget_probability"] > thin["gold"]["forget_probability"] + 0.2


def test_a_request_without_its_references_is_not_judged_yet(done, tmp_path):
    out, _ = done
    shutil.copy(out / "matrix.yaml", tmp_path / "matrix.yaml")
    lines = [x for x in Book(out).lines() if x["kind"] != "attack"]
    write_lines(tmp_path / "trials.jsonl", [x for x in lines if x["key"] != "reference/tiny/second/gold"])
    assert "second" in {x["request"] for x in lines if x["kind"] == "report"}
    (_, _, standings), *_ = ContestRecord(tmp_path).squares()
    assert all(not standing.lost for standing in standings)
    assert contest_tables(tmp_path)


def test_each_side_is_attacked_beside_the_references(done):
    out, _ = done
    lines = Book(out).lines()
    attacked = {x.get("which") or x["optimizer"]: x["attacked"] for x in lines if x["kind"] == "attack"}
    assert {"before", "gold", "signum"} < attacked.keys()  # and the better one of the second-order side
    assert len(attacked) == 4
    assert all(found.keys() == {"relearn", "3 bits"} for found in attacked.values())
    for x in lines:  # trained in fp32 here: the same twice
        if x["kind"] == "attack" and "which" not in x:
            assert x["exact"] == x["measures"][-1]["values"]
        if x["kind"] == "reference":
            assert x["exact"] == x["full"]
            assert x["thin"].items() < x["full"].items()
    whole = {x["which"]: x["full"] for x in lines if x["kind"] == "reference" and x["request"] == "second"}
    gold, before = attacked["gold"]["relearn"], attacked["before"]["3 bits"]
    assert gold["forget_probability"] > whole["gold"]["forget_probability"]  # it learned what it was shown
    assert before["forget_probability"] != whole["before"]["forget_probability"]


def test_an_attacker_who_had_everything_leaves_nothing_to_judge(done, tmp_path):
    out, _ = done
    (tmp_path / "matrix.yaml").write_bytes((out / "matrix.yaml").read_bytes())
    lines = Book(out).lines()
    for x in lines:
        for found in x.get("attacked", {}).values():
            if found["had"]:
                found["had"] = list(range(len(found["knowledge"])))
    write_lines(tmp_path / "trials.jsonl", lines)
    told = contest_tables(tmp_path).split("after attacks")[1]
    assert "3 bits" in told
    assert "relearn" not in told


def test_the_report_tells_what_the_record_says(done, tmp_path, capsys):
    out, _ = done
    record = ContestRecord(out)
    lines = record.lines
    for name in ("signum", "kfac"):
        cell = Cell("tiny", "npo", name)
        standing = record.standing(cell)
        assert standing.chosen == choose(lines, cell, ["first"], 3, 2)
        assert standing.lost["second"] == lost_area(points_of(lines, cell, "report", "second"))
        alone = record.standing(cell, settings=1)
        assert alone.chosen == choose(lines, cell, ["first"], 3, 1)
        ran = {x["point"] for x in runs_of(lines, cell, "report", "second")}
        assert alone.lost.keys() == ({"second"} if ran.issuperset(alone.chosen) else set())
        assert alone.lost.get("second", 1.0) >= standing.lost["second"]
    text = contest_tables(out)
    assert "on the report requests" in text
    assert "signum (rival)" in text
    assert "npo: on the report requests, with one setting of each alone" in text
    best = next(line for line in text.split("best of 3")[1].splitlines() if line.startswith("| signum"))
    alone = [lost_area(points_of(lines, Cell("tiny", "npo", "signum"), "tune", "first", [i])) for i in range(3)]
    assert best.endswith(f"| {min(alone):.3f} |")
    assert best.startswith(f"| signum | {sum(alone) / 3:.3f} |")
    assert "| (before) | 1 |" in text.split("after attacks")[1]
    attack = next(x for x in lines if x.get("which") == "gold" and x["kind"] == "attack")["attacked"]["relearn"]
    whole = next(x for x in lines if x.get("which") == "gold" and x["request"] == "second" and "full" in x)["full"]
    own = [sum(side["knowledge"][i] for i in attack["had"]) / len(attack["had"]) for side in (whole, attack)]
    gold = next(line for line in text.split("after attacks")[1].splitlines() if line.startswith("| (retrained)"))
    assert f"| {own[0]:.3f} -> {own[1]:.3f} |" in gold
    assert f"| {whole['unseen_probability']:.3f} -> {attack['unseen_probability']:.3f} |" in gold
    assert "| unseen_probability | 6 | +0.0000 | 0.0000 |" in text
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;contest" in page
    assert "<b>contest" not in page
    assert page.count("<svg") == 1
    assert "contest" in capsys.readouterr().out
    words = ["report", str(out), "--out", str(tmp_path / "r.html"), "--figures"]
    assert main([*words, str(tmp_path / "figures")]) == 0
    (figure,) = (tmp_path / "figures").iterdir()
    assert figure.read_text() in page
    ElementTree.fromstring(figure.read_text())
    assert main([*words, str(out / "trials.jsonl")]) == 2
    assert "choose another --figures" in capsys.readouterr().err


def test_the_report_needs_the_folder_only(done, tmp_path):
    out, _ = done
    for name in ("matrix.yaml", "trials.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    assert contest_tables(tmp_path) == contest_tables(out)
    assert write_contest(tmp_path, tmp_path / "a.html").read_bytes() == write_contest(out, out / "b.html").read_bytes()


def test_what_is_missing_is_found_before_the_first_job(matrix_file, tmp_path):
    tree = yaml.safe_load(matrix_file.read_text())
    task = tree["tasks"]["tiny"]
    lost = {**tree, "tasks": {"tiny": {**task, "gold": task["gold"].replace("{request}", "{request}-lost")}}}
    with pytest.raises(ValueError, match=r"tasks.tiny.gold of first: no such model folder: .*first-lost"):
        Contest(matrix_from_tree(lost), tmp_path / "gold").work(lambda *_: None)
    later = {**tree, "tasks": {"tiny": {**task, "report": [*task["report"], "third"]}}}
    with pytest.raises(ValueError, match=r"tasks.tiny.gold of third"):
        Contest(matrix_from_tree(later), tmp_path / "later").work(lambda *_: None)
    assert not Book(tmp_path / "later").lines()
    contest = Contest(matrix_from_tree(later), tmp_path / "later")
    assert contest.work(lambda *_: None, phases=("pilot",), seconds=0) == 0  # which need no third request


def test_a_retrained_model_that_is_on_record_need_not_be_there(done, matrix_file, tmp_path):
    out, _ = done
    tree = yaml.safe_load(matrix_file.read_text())
    task = tree["tasks"]["tiny"]
    lost = {**tree, "tasks": {"tiny": {**task, "gold": task["gold"].replace("{request}", "{request}-lost")}}}
    contest = Contest(matrix_from_tree(lost), tmp_path)
    for line in Book(out).lines():
        contest.book.append(line)
    assert contest.work(lambda *_: None, phases=("tune",)) == 0
    with pytest.raises(ValueError, match=r"tasks.tiny.gold of second"):  # attacks are made on it again
        contest.work(lambda *_: None)


def test_what_curvature_is_made_of_comes_beside_the_retain_examples(matrix_file):
    tree = yaml.safe_load(matrix_file.read_text())
    tree["optimizers"] = [{"name": "signum", "extra_batches": True}]
    matrix = matrix_from_tree(tree)
    contest = Contest(matrix, matrix_file.parent / "besides")
    run = contest.run_of(Job("pilot", "tiny", "first", Cell("tiny", "npo", "signum")))
    _, tokenizer = load_model(ModelSpec(run.task.model))
    data, plain = (
        trial._dataset(tokenizer, run),
        trial._dataset(tokenizer, dataclasses.replace(run, entry=Entry({"name": "signum"}))),
    )
    keys = [(epoch, anchor, partner) for epoch in range(3) for anchor, partner in data.pairing.epoch(epoch)]
    batch = collate_items([data[key] for key in keys[:2]])
    assert [VIEWS[v] for v in batch["view"]] == ["forget"] * 2 + ["retain"] * 4
    assert all({k: v for k, v in data[key].items() if k != "retain+1"} == plain[key] for key in keys)
    more = [data[key]["retain+1"].key for key in keys]
    known = {row.key for row in [*data.curvature, *text_rows(data)]}
    assert len(data.curvature) == 3
    assert set(more) <= known
    assert len(set(more)) == len(more) == 12  # three epochs, and none of it twice
    retained = {data[key]["retain"].key for key in keys} | set(more)
    assert {row.key for row in data.rows("retain", 3)} == retained  # what a reference has to know
    pairing = copy.copy(data)
    pairing.views = (*data.views, "retain_refusal")
    with pytest.raises(ValueError, match="extra_batches is not for objectives that pair"):
        trial._Besides(pairing)
    with pytest.raises(ValueError, match="extra_batches"):
        Entry({"name": "signum"}, extra_batches=True, extra_retain=True)


def test_what_curvature_costs_is_measured_in_turns(done, matrix_file, tmp_path):
    out, _ = done
    for name in ("matrix.yaml", "trials.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    script = Path(__file__).parents[2] / "experiments/contest_cost.py"
    words = [sys.executable, str(script), str(matrix_file), str(tmp_path), "--rounds", "1", "--sides", "signum", "kfac"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in printed.splitlines()]
    assert [row[:3] for row in rows[2:]] == [["signum", "none", "1"], ["kfac", "cold", "1"], ["kfac", "warm", "1"]]
    assert rows[2][5] == "1.00 (1.00 to 1.00)"
    lines = [json.loads(line) for line in (tmp_path / "cost.jsonl").read_text().splitlines()]
    (cold, warm) = (x["seconds"]["curvature"] for x in lines if x["side"] == "kfac")
    assert cold > warm >= 0  # rounded to hundredths
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == printed  # nothing was left to do
    assert subprocess.run([*words, "--objectives", "npo"], check=True, capture_output=True, text=True).stdout == printed
    assert {x["objective"] for x in lines} == {"npo"}
    for line in lines:
        del line["objective"]  # as records of before have none
    (tmp_path / "cost.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == printed
    wrong = subprocess.run([*words, "--objectives", "ga"], capture_output=True, text=True)
    assert (wrong.returncode, "the contest has no ga; it has npo" in wrong.stderr) == (2, True)


def test_an_entry_that_comes_back_as_another_is_refused(done, matrix_file, tmp_path):
    """Also where the matrix that stood between knew nothing of it."""
    out, _ = done
    tree = yaml.safe_load(matrix_file.read_text())
    contest = Contest(matrix_from_tree(tree), tmp_path)
    for line in Book(out).lines():
        contest.book.append(line)
    assert contest.work(lambda *_: None) == 0
    kfac = tree["optimizers"][1]
    Contest(matrix_from_tree({**tree, "optimizers": [tree["optimizers"][0]]}), tmp_path)
    changed = matrix_from_tree({**tree, "optimizers": [tree["optimizers"][0], {**kfac, "every": 2}]})
    with pytest.raises(ValueError, match=r"kfac.* was run with optimizer.every 1, and would be run with 2 now"):
        Contest(changed, tmp_path).work(lambda *_: None)
    moved = {**tree, "tasks": {"tiny": {**tree["tasks"]["tiny"], "text": "general:text"}}}
    (tmp_path / "matrix.yaml").unlink()
    with pytest.raises(ValueError, match=r"was run with data '\w+'"):
        Contest(matrix_from_tree(moved), tmp_path).work(lambda *_: None)


def test_another_model_at_the_same_path_is_refused(done, matrix_file, tmp_path):
    """What one model does is not measured by what another was before."""
    tree = yaml.safe_load(matrix_file.read_text())
    place = tmp_path / "there"
    shutil.copytree(tree["tasks"]["tiny"]["model"], place)
    moved = matrix_from_tree({**tree, "tasks": {"tiny": {**tree["tasks"]["tiny"], "model": str(place)}}})
    contest = Contest(moved, tmp_path / "record")
    for line in Book(done[0]).lines():
        contest.book.append(line)
    assert contest.work(lambda *_: None) == 0  # the same weights elsewhere
    shutil.copytree(tree["tasks"]["tiny"]["gold"].format(request="second"), place, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"reference/tiny/first/before was run with weights '\w+'"):
        Contest(moved, tmp_path / "record").work(lambda *_: None)


def test_another_contest_is_refused_and_a_wider_one_is_not(done, matrix_file):
    out, _ = done
    with pytest.raises(ValueError, match=r"another contest \(training"):
        Contest(read_matrix(matrix_file, ["training.max_steps=9"]), out)
    tree = yaml.safe_load(matrix_file.read_text())
    with pytest.raises(ValueError, match=r"another contest \(objectives.npo"):
        Contest(matrix_from_tree({**tree, "objectives": [{"name": "npo", "beta": 0.5}]}), out)
    with pytest.raises(ValueError, match=r"another contest \(evaluation"):
        Contest(matrix_from_tree({**tree, "evaluation": {"max_new_tokens": 7}}), out)
    text = (out / "matrix.yaml").read_text()
    try:
        wider = Contest(read_matrix(matrix_file, ["budget.points=4"]), out)
        assert wider.left() == 3  # a trial more for each cell; reports wait for it
        entries = [dict(entry, points=3) if entry.get("name") == "signum" else entry for entry in tree["optimizers"]]
        budget = {**tree["budget"], "points": 4}
        some = Contest(matrix_from_tree({**tree, "optimizers": entries, "budget": budget}), out)
        assert some.left() == 2  # the one with fewer points has all of its own
        assert some.matrix.sizes("signum") == (3, 2)
        assert next(s for s in ContestRecord(out).squares()[0][2] if s.cell.optimizer == "signum").chosen
        assert not next(s for s in ContestRecord(out).squares()[0][2] if s.cell.optimizer == "kfac").chosen
        one = [dict(entry, settings=1) if entry.get("name") == "signum" else entry for entry in tree["optimizers"]]
        fewer = Contest(matrix_from_tree({**tree, "optimizers": one}), out)
        cell = Cell("tiny", "npo", "signum")
        runs = [job.point for job in fewer.jobs() if job.kind == "report" and job.cell == cell]
        lines = Book(out).lines()
        best = [choose(lines, cell, ["first"], 3, 1, relative=relative) or [] for relative in (False, True)]
        assert sorted(set(runs)) == sorted({number for numbers in best for number in numbers})
        standing = next(s for s in ContestRecord(out).squares()[0][2] if s.cell.optimizer == "signum")
        assert standing.chosen == best[0]
    finally:
        (out / "matrix.yaml").write_text(text)


def test_trials_are_taken_over_and_what_they_chose_is_judged_anew(done, matrix_file, tmp_path, capsys):
    """A contest of fewer sides runs none of the trials again, and measures its own report requests."""
    out, new = done[0], tmp_path / "new"
    tree = yaml.safe_load(matrix_file.read_text())
    entries = tree["optimizers"][:2]
    fewer = tmp_path / "fewer.yaml"
    fewer.write_text(yaml.safe_dump({**tree, "optimizers": entries}))
    words = ["bench", str(fewer), "--out", str(new), "--trials-of", str(out), "--phase", "reference"]
    assert main(words) == 0
    assert "10 lines taken over" in capsys.readouterr().out  # of two cells, two pilots and three trials each
    theirs = {line["key"]: line for line in Book(out).lines()}
    lines = Book(new).lines()
    measured = [line for line in lines if line["request"] == "second"]
    assert [line["kind"] for line in measured] == ["reference", "reference"]
    assert all(line == theirs[line["key"]] for line in lines if line not in measured)
    contest = Contest(read_matrix(fewer), new)
    there = {key for key, line in theirs.items() if line["kind"] == "report" and line["optimizer"] != "influence"}
    assert {job.key for job in contest.jobs() if job.kind == "report"} == there
    assert contest.take_over(out) == (0, 0)


def test_trials_of_another_kind_are_not_taken_over(done, matrix_file, tmp_path):
    out, tree = done[0], yaml.safe_load(matrix_file.read_text())
    changes = {"training": {"seed": 3}, "budget": {"decades": 1.0}, "evaluation": {"max_new_tokens": 7}}
    for name, change in changes.items():
        other = Contest(matrix_from_tree({**tree, name: {**tree[name], **change}}), tmp_path / name)
        with pytest.raises(ValueError, match=rf"\({name} was .*: its trials cannot be taken over"):
            other.take_over(out)
        assert not other.book.lines()
    with pytest.raises(ValueError, match="is no contest's folder"):
        Contest(read_matrix(matrix_file), tmp_path / "same").take_over(tmp_path)
    changed = tmp_path / "changed"
    shutil.copytree(out, changed)
    text = (changed / "trials.jsonl").read_text()
    (changed / "trials.jsonl").write_text(text.replace('"reseed": 0', '"reseed": 3'))
    with pytest.raises(ValueError, match="was run with reseed 3, and would be run with 0 now"):
        Contest(read_matrix(matrix_file), tmp_path / "same").take_over(changed)


def test_an_objective_that_is_not_tuned_yet_holds_up_no_other(done, matrix_file, tmp_path):
    contest = Contest(read_matrix(matrix_file), tmp_path)
    for line in Book(done[0]).lines():
        contest.book.append(line)
    tree = yaml.safe_load(matrix_file.read_text())
    wider = Contest(matrix_from_tree({**tree, "objectives": ["npo", "grad_diff"]}), tmp_path)
    assert {job.key for job in wider.jobs()} > {line["key"] for line in contest.book.lines()}
    entries = [dict(tree["optimizers"][0], objectives=["npo"]), *tree["optimizers"][1:]]
    Contest(matrix_from_tree({**tree, "objectives": ["npo", "grad_diff"], "optimizers": entries}), tmp_path)
    assert {(j.kind, j.cell.objective) for j in wider.jobs() if j.cell} == {
        *(("pilot", objective) for objective in ("npo", "grad_diff")),
        *((kind, "npo") for kind in ("tune", "report", "attack")),
        ("tune", "grad_diff"),  # of the method, which has no pilot
    }


def test_who_takes_no_part_is_missed_by_no_table(done, matrix_file, tmp_path):
    tree = yaml.safe_load(matrix_file.read_text())
    entries = [{"name": "lion", "objectives": ["grad_diff"]}, *tree["optimizers"]]
    wider = matrix_from_tree({**tree, "objectives": ["npo", "grad_diff"], "optimizers": entries})
    contest = Contest(wider, tmp_path)
    for line in Book(done[0]).lines():
        contest.book.append(line)
    narrow, wide = (contest_tables(folder) for folder in (done[0], tmp_path))
    assert "after attacks" in narrow
    assert wide == narrow  # nothing of grad_diff has run
    record = ContestRecord(tmp_path)
    assert [[s.cell.optimizer for s in standings] for _, _, standings in record.squares()] == [
        ["signum", "kfac", "influence"],
        ["lion", "signum", "kfac", "influence"],
    ]


def test_a_claim_ends_with_its_process(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from soul.contest.book import Book\n"
        "with Book(Path(sys.argv[1])).claim('a/b') as ours:\n    print(ours, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == "True"
    book = Book(tmp_path)
    with book.claim("a/b") as ours:
        assert not ours
    with book.claim("a/c") as ours:
        assert ours
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    with book.claim("a/b") as ours:
        assert ours


def test_a_line_that_a_kill_cut_short_goes(tmp_path):
    book = Book(tmp_path)
    book.append({"key": "a"})
    with book.file.open("ab") as file:
        file.write(b'{"key": "b", "half')
    assert [x["key"] for x in book.lines()] == ["a"]
    book.append({"key": "c"})
    assert [x["key"] for x in book.lines()] == ["a", "c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "nowhere.yaml", "--out", "x"], "no such recipe"),
        (["bench", "seed=1", "--out", "x"], "no matrix"),
        (["bench", "{m}", "--out", "{d}/x", "--minutes", "-1"], "--minutes must be"),
        (["bench", "{m}", "--out", "{m}/x"], "cannot write"),
        (["bench", "{m}", "--out", "{d}/x", "tasks.tiny.facts.unseen={m}"], "facts.unseen: a measure has that name"),
        (["bench", "{m}", "--out", "{d}/x", "--trials-of", "{d}"], "is no contest's folder"),
        (["bench", "{m}", "--out", "{d}/x", "optimizers=[{{name: lion, points: 9}}]"], "lion: points must be from"),
        (["report", "{d}/out", "{d}/out"], "one at a time"),
    ],
)
def test_bad_input_ends_with_one_message(words, message, matrix_file, done, capsys):
    given = [w.format(m=matrix_file, d=matrix_file.parent) for w in words]
    assert main(given) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_exact_measurements_are_in_the_weights_own_precision(matrix_file):
    """Accelerate leaves autocast around a model's forward pass; what is published must not be in bf16."""
    task = read_matrix(matrix_file).tasks["tiny"]
    folder = task.source("model", "second")
    model, tokenizer = load_model(ModelSpec(folder))
    meter = Meter(load_sets(task, "second"), tokenizer, EvaluationSpec(max_new_tokens=4))
    alone = meter(model, full=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have made one of another precision
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert meter(wrapped, full=True, exact=True) == alone
    assert meter(wrapped, full=True)["forget_probability"] != alone["forget_probability"]
    assert "forward" in wrapped.__dict__


def test_another_order_of_the_data_says_how_large_noise_is(matrix_file, tmp_path):
    tree = yaml.safe_load(matrix_file.read_text())
    entries = {"signum": {}, "again": {"label": "again"}, "reseeded": {"label": "reseeded", "reseed": 1}}
    tree |= {"optimizers": [{"name": "signum", "lr": 3e-3} | more for more in entries.values()], "attacks": []}
    tree["budget"] |= {"points": 1, "settings": 1}
    contest = Contest(matrix_from_tree(tree), tmp_path)
    contest.work(lambda *_: None, phases=("reference",))
    for kind in ("pilot", "tune"):
        contest.work(lambda *_: None, phases=(kind,))
    found = {x["optimizer"]: x["measures"] for x in contest.book.lines() if x["kind"] == "tune"}
    assert found.keys() == entries.keys()
    assert found["signum"] == found["again"] != found["reseeded"]


def test_an_entry_of_fewer_steps_ends_its_schedule_with_them(matrix_file, tmp_path):
    tree = yaml.safe_load(matrix_file.read_text())
    short = {"name": "signum", "label": "short", "steps": 3}
    tree |= {"optimizers": ["signum", short, {**short, "label": "as far", "match": "run"}], "attacks": []}
    tree["budget"] |= {"points": 1, "settings": 1}
    contest = Contest(matrix_from_tree(tree), tmp_path)
    for kind in ("reference", "pilot", "tune"):
        contest.work(lambda *_: None, phases=(kind,))
    found = {x["optimizer"]: x for x in contest.book.lines() if x["kind"] == "tune"}
    rates = {name: x["settings"]["lr"] for name, x in found.items()}
    assert rates["short"] == rates["signum"]
    assert rates["as far"] == pytest.approx(2 * rates["short"], rel=1e-12)  # half of the steps, twice as long
    assert found["as far"]["steps"] == 3
    assert [found[name]["steps"] for name in ("signum", "short")] == [6, 3]
    assert [[m["step"] for m in found[name]["measures"]] for name in ("signum", "short")] == [[2, 4, 6], [1, 2, 3]]
    lines = {x["optimizer"]: x for x in contest.book.lines() if x["kind"] == "pilot"}
    assert lines["short"]["centre"] == lines["signum"]["centre"]
    tree["optimizers"][1]["steps"] = 4
    (tmp_path / "matrix.yaml").unlink()
    with pytest.raises(ValueError, match="short/0 was run with steps 3, and would be run with 4 now"):
        Contest(matrix_from_tree(tree), tmp_path).work(lambda *_: None)


def test_a_lost_model_is_a_result(matrix_file):
    matrix = read_matrix(matrix_file)
    task, entry = matrix.tasks["tiny"], matrix.entry("signum")
    run = Run(
        task, "second", load_sets(task, "second"), entry, matrix.objective("npo", {}), entry.spec({"lr": 1e30}),
        matrix.training, matrix.evaluation, [2, 4, 6],
    )  # fmt: skip
    line = do(run, lambda *_: None)
    assert line["state"] == "lost"
    assert "the model is lost" in line["why"]
    assert line["steps"] < 6
    json.dumps(line, allow_nan=False)
