"""Two processes do what one does: DDP, FSDP2 and ZeRO-2 as accelerate's configuration files in ``examples`` ask.

accelerate shards on CPUs too once it is told to (:mod:`soul.parallel`), so what runs here is what runs on GPUs, with
gloo in place of NCCL.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from packaging.version import Version
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import (
    HALF,
    JOBS,
    RESUMED,
    STEPS,
    ZERO3_JOBS,
    ZERO_JOBS,
    Job,
    experts,
    rounded,
    rows_of,
    run,
    trainer_for,
    work,
    work_by_zero,
)

EXAMPLES = Path(__file__).parents[2] / "examples/accelerate"
# With torch 2.9 a sharded run that makes curvature passes differs from one process by up to 1e-8, from 2.13 on by less.
CLOSE = 1e-9 if Version(torch.__version__) >= Version("2.13") else 1e-7
NUMBERS = ("nll", "paraphrased_nll", "wrong_nll", "token_logps", "token_z", "rougeL_recall", "gradient_norm")
PAIRS = [(job, way) for job in JOBS for way in job.ways]


def environment_of(way: str) -> dict[str, str]:
    """Return what accelerate's launcher tells the processes that it starts with a configuration file."""
    words = ["--config_file", str(EXAMPLES / f"{way}.yaml"), "--main_process_port", "0", "-m", "soul"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""  # the launcher knows which of them a file may not set again
    found: dict[str, str] = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: found[name] for name in found if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer, forget_set, retain_set):
    folder = tmp_path_factory.mktemp("processes")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, examples in (("forget", forget_set[:-1]), ("retain", retain_set)):
        lines = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": ["No.", "Yes."]} for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """The resumable run in one process, not interrupted; and half of it, for others to go on from."""
    run(dataclasses.replace(RESUMED, steps=HALF), place, place / "one", 1, save_steps=HALF)
    return run(RESUMED, place, place / "whole", 1)


@pytest.fixture(scope="module")
def two(place, whole):
    """What two processes found; one start of them for all tests, since starting takes most of the time."""
    spawn(work, args=(str(place), {way: environment_of(way) for way in ("ddp", "fsdp2")}), nprocs=2)
    ranks = [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for key, value in ranks[0].items():
        if isinstance(value, dict) and "weights" in value:
            assert all(torch.equal(v, ranks[1][key]["weights"][n]) for n, v in value["weights"].items()), key
            assert value["log"][-1]["loss"] == ranks[1][key]["log"][-1]["loss"]
    return ranks


@pytest.fixture(scope="module")
def by_zero(place):
    """What two processes found under DeepSpeed, by stage; it has no float64 and adds up in fp32."""
    if importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None:
        pytest.skip("DeepSpeed is not installed, or cannot compile what it needs on CPUs")

    @functools.cache
    def of(stage: int) -> list[dict[str, Any]]:
        spawn(work_by_zero, args=(str(place), stage, environment_of(f"zero{stage}")), nprocs=2)
        return [torch.load(place / f"zero-{stage}-{rank}.pt", weights_only=False) for rank in range(2)]

    return of


def compare(found: dict[str, Any], alone: dict[str, Any], job: Job, unsaid: tuple[str, ...] = ()) -> None:
    assert found["weights"].keys() == alone["weights"].keys()
    gaps = torch.cat([(found["weights"][n] - v).abs().flatten() for n, v in alone["weights"].items()])
    if job.dtype == "float64":
        assert gaps.max() < CLOSE
    elif job.precision == "bfloat16":  # a step of AdamW is as long however small its gradient
        assert gaps.median() < 0.02 * job.optimizer["lr"] * job.steps
    else:  # rounding turns the sign of a few steps, each of which is then two steps away
        assert (gaps > 1e-3 * job.optimizer["lr"]).float().mean() <= 1e-3
        assert gaps.max() <= 2.001 * job.optimizer["lr"] * job.steps
    rough = CLOSE if job.dtype == "float64" else 1e-3 if job.precision == "float32" else 2e-2
    assert len(found["log"]) in (job.steps, job.steps - HALF)  # all steps, or those after a checkpoint
    for one, other in zip(found["log"], alone["log"][-len(found["log"]) :], strict=True):
        assert one.keys() == {name for name in other if not name.startswith(unsaid)}
        for name in one.keys() - {"seconds", "curvature_seconds"}:
            border = 1e-3 if name.startswith("win_rate") else rough  # a coordinate may lie on the bound itself
            assert one[name] == pytest.approx(other[name], rel=rough, abs=border), name


@pytest.fixture(scope="module")
def alone(place):
    """What one process does, by job."""
    found: dict[str, Any] = {}

    def of(job: Job) -> dict[str, Any]:
        if job.name not in found:
            found[job.name] = run(job, place, place / "alone" / job.name, 1)
        return found[job.name]

    return of


@pytest.mark.parametrize(("job", "way"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_two_processes_do_what_one_does(place, two, alone, job, way):
    found, expected = two[0][f"{job.name}/{way}"], alone(job)
    compare(found, expected, job)
    fresh: Any = trainer_for(job, place, place / "start", 1).model
    start = {n: p.detach() for n, p in fresh.named_parameters()}
    moved = torch.cat([(v != start[n]).flatten() for n, v in expected["weights"].items()])
    assert moved.float().mean() > (0.01 if job.lora else 0.2)  # else there was nothing to agree on
    assert len(expected["log"]) == job.steps


def test_gradients_are_shards_between_micro_batches_too(two):
    for rank in two:  # put off to the last one they would be whole in every process
        found = rank["sophia/fsdp2"]["between"]
        assert found == [True] * STEPS


def test_a_trust_region_binds_where_weights_are_shards(two):
    records = two[0]["trust/fsdp2"]["log"]  # that they are those of one process is tested above
    assert all(0 < r["step_scale"] < 1 and r["step_kl"] <= 1e-3 < r["proposed_kl"] for r in records)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(place, two, whole, way):
    compare(two[0][f"onward/{way}"], whole, RESUMED)  # begun in one process, ended in two
    back = run(RESUMED, place, place / "back" / way, 1, resume=str(place / f"two/{way}/checkpoint-{HALF}"))
    compare(back, whole, RESUMED)
    kept = sorted(f.name for f in (place / f"two/{way}/checkpoint-{HALF}").iterdir() if not f.name.startswith("rng"))
    assert kept == sorted(f.name for f in (place / f"one/checkpoint-{HALF}").iterdir() if not f.name.startswith("rng"))


def test_what_shards_cannot_do_is_refused_at_the_start(two):
    ddp, fsdp2 = two[0]["refused/ddp"], two[0]["refused/fsdp2"]
    assert "kfac needs whole weight matrices, which sharded processes (FSDP2) do not have" in fsdp2["kfac"]
    assert "muon needs whole" in fsdp2["muon"]
    assert (
        "hutchinson differentiates twice, which sharded weights (FSDP2) cannot be: choose one of ggn"
        in fsdp2["hutchinson"]
    )
    assert "curvature.shuffled permutes whole tensors" in fsdp2["shuffled"]
    assert "several processes do not share" in fsdp2["dual"]
    assert "l1_sparse sums over whole weights, of which sharded processes (FSDP2, ZeRO-3) have parts" in fsdp2["l1"]
    assert set(ddp) == {"dual"}


@pytest.mark.parametrize(
    ("job", "stage"),
    [*((job, 2) for job in ZERO_JOBS), *((job, 3) for job in ZERO3_JOBS)],
    ids=lambda v: v.name if isinstance(v, Job) else str(v),
)
def test_parts_of_states_and_weights_step_as_the_whole_does(by_zero, alone, job, stage):
    for rank in by_zero(stage):  # numbers about steps are not reported
        compare(rank[job.name], alone(job), job, unsaid=("win_rate", "cos_", "rho", "moved"))
        if job.precision == "float32":
            gaps = [(rank[job.name]["weights"][n] - v).abs().max() for n, v in alone(job)["weights"].items()]
            assert max(gaps) < (1e-6 if stage == 2 else 1e-5)


def test_what_parts_cannot_do_is_refused_at_the_start(by_zero):
    said = by_zero(2)[0]["refused"]
    assert set(said) == {"kfac", "block", "own", "twice", "trust", "saves"}
    assert "kfac looks at whole tensors" in said["kfac"]
    assert "sophia looks at whole tensors" in said["block"]
    assert "objective_squared works with the parameters' gradients" in said["own"]
    assert "hutchinson works with" in said["twice"]
    assert "training.trust_kl scales weights" in said["trust"]
    assert "set training.save_steps to 0" in said["saves"]
    said = by_zero(3)[0]["refused"]
    assert set(said) == {"sophia", "kfac", "l1"}
    assert "sophia needs curvature passes, which have no seam in ZeRO-3: set zero_stage to 2" in said["sophia"]


def test_factors_of_layers_that_one_process_saw_are_those_of_all(two):
    alone, (found, other) = experts(range(2)), (rank["experts"] for rank in two)
    assert {key.rpartition(".")[2] for key in alone} == {"inputs", "outputs", "shares", "g_basis", "a_basis", "moments"}
    assert found.keys() == other.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(found[name], other[name])
        if not name.endswith("basis"):  # whose signs are free
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_noise_of_rounding_is_that_of_the_whole(two):
    for name, value in rounded(shards=False).items():
        for rank in two:
            assert torch.equal(rank["rounded"][name], value), name


def test_rows_are_measured_by_shares_and_come_back_in_order(place, two, tmp_path):
    alone = rows_of(place, tmp_path)
    for rank in two:
        assert rank["rows"].keys() == alone.keys()
        for split, rows in alone.items():
            assert len(rank["rows"][split]) == len(rows) > 0
            for one, other in zip(rank["rows"][split], rows, strict=True):
                assert one.keys() == other.keys()
                for name, value in other.items():
                    assert one[name] == (pytest.approx(value, rel=1e-9) if name in NUMBERS else value), name
    for split, rows in alone.items():
        lines = (place / f"rows/{split}.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in rows]


def test_what_the_main_process_found_or_could_not_find_all_hear(two):
    assert [rank["main"] for rank in two] == [0, 0]
    assert {rank["error"] for rank in two} == {"list index out of range"}
