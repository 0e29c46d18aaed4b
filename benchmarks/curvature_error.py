"""How exact curvature estimators are, by how sure the model is, and what a pass of each costs.

    python benchmarks/curvature_error.py error
    python benchmarks/curvature_error.py cost --tofu ../shared/data/tofu
    python benchmarks/curvature_error.py memorised --tofu ../shared/data/tofu --model runs/first-run/taught

``error``: a two-layer transformer in float64 (about 6,000 weights, 32 words) is taught 12 sequences of 10 answer tokens
until it gives every taught token the probability .5, .9, .99 or .999, and is compared with exact diagonals: of the
Gauss-Newton matrix and of the empirical Fisher matrix from Jacobians, of the Hessian entry by entry.

``cost``: SmolLM2-135M in the precision it trains in, 8 retained questions of TOFU: seconds of a refresh (median; and of
all processors together, which other work on the machine disturbs less) and peak memory above the weights and the
rule's state, beside a training step on the same 8. Each case has a process of its own, since memory once taken is not
given back.

``memorised``: the same estimators on a 135M model that knows the answers by heart (``recipes/first-run/taught.yaml``).

Each writes its part of ``docs/results/curvature.json`` and prints its tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from _machine import autocast, table
from soul.console import quiet
from soul.curvature import cache
from soul.curvature.estimators import ESTIMATORS, Estimator
from soul.curvature.hutchinson import hutchinson_diagonal
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import collate_rows
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate, Encoded
from soul.forward import forward_answers
from soul.machine import has_bf16
from soul.models import ModelSpec, load_model
from soul.optim import Sophia
from soul.optim.base import UpdateRule
from soul.run import peak_memory, reset_peak_memory

RECORD = Path(__file__).parents[1] / "docs/results/curvature.json"
WITH_PASSES = [name for name, kind in ESTIMATORS.items() if kind.needs_pass]
CONFIDENCE = (0.5, 0.9, 0.99, 0.999)
WORDS, SEQUENCES, ANSWER = 32, 12, 10
EXAMPLES = 8
BY_DIFFERENCES = "hutchinson, by differences"


class Silent(UpdateRule):
    """A rule that nothing is told."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})


def record(part: str, value: Any) -> None:
    """Put one part's results into the record."""
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "bf16": has_bf16()}
    known[part] = {"environment": environment, "results": value}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


# --- error -----------------------------------------------------------------------------------------------------------


def sequences() -> list[Encoded]:
    """Return prompts of unequal length, each with ten answer tokens that are not to be guessed."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(SEQUENCES):
        ids = torch.randint(2, WORDS, (3 + i % 4 + ANSWER,), generator=generator)
        ids[0] = i + 2  # different beginnings, or the answers could not be told apart
        rows.append(Encoded(tuple(ids.tolist()), len(ids) - ANSWER))
    return rows


def taught_model(rows: list[Encoded], confidence: float) -> LlamaForCausalLM:
    """Return a model that gives each answer token ``confidence`` and shares the rest among the other words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, pad_token_id=None,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parent in list(model.modules()):
        for name in dict(parent.named_children()):
            if "norm" in name:  # Llama's own computes in fp32 whatever its weights
                setattr(parent, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    model = model.double()
    batch, steps = collate_rows(rows), 4000
    targets = forward_answers(model, batch).targets_N
    wanted = torch.full((len(targets), WORDS), (1 - confidence) / (WORDS - 1), dtype=torch.float64)
    wanted[torch.arange(len(targets)), targets] = confidence
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward_answers(model, batch).logits_NV, wanted).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return model


def jacobian_diagonals(model: nn.Module, rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the diagonals of the Gauss-Newton and of the empirical Fisher matrix of the mean loss."""
    params = list(model.parameters())
    answers = forward_answers(model, collate_rows(rows))
    ggn = empirical = torch.zeros((), dtype=torch.float64)
    for logits_V, label in zip(answers.logits_NV, answers.targets_N.tolist(), strict=True):
        jacobian = torch.stack([flat(torch.autograd.grad(z, params, retain_graph=True)) for z in logits_V])
        p = logits_V.detach().softmax(-1)
        mean = p @ jacobian
        ggn = ggn + (p[:, None] * jacobian**2).sum(0) - mean**2
        empirical = empirical + (mean - jacobian[label]) ** 2
    return ggn / len(answers.targets_N), empirical / len(answers.targets_N)


def hessian_diagonal(model: nn.Module, rows: list[Encoded]) -> torch.Tensor:
    """Return the diagonal of the Hessian of the mean loss, a derivative of each entry of the gradient in turn."""
    params = list(model.parameters())
    entries = []
    with sdpa_kernel(SDPBackend.MATH):
        loss = -forward_answers(model, collate_rows(rows)).token_logps().mean()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        for p, grad in zip(params, grads, strict=True):
            for i, g in enumerate(grad.flatten()):
                (row,) = torch.autograd.grad(g, p, retain_graph=True, materialize_grads=True)
                entries.append(row.flatten()[i])
    return torch.stack(entries)


def flat(tensors: Any) -> torch.Tensor:
    """Return tensors as one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def draw(model: nn.Module, passes: CurvaturePasses, count: int) -> torch.Tensor:
    """Return ``count`` refreshes' estimates, one a row."""
    rule, draws = Silent(model), []
    for step in range(count):
        estimate = passes.estimate(model, rule, passes.plan(step))
        assert estimate is not None
        draws.append(flat(estimate.values()))
    return torch.stack(draws)


def spread(draws: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return how refreshes scatter around the exact diagonal.

    ``whole``: error of a refresh as a vector, relative to the diagonal's norm (rms). ``sum``: relative standard
    deviation of the sum of all entries. ``empty``: share of refreshes whose sum is below 1 % of the true one.
    ``median``: median of the refreshes' sums, relative to the true one. ``bias``: relative error of the mean of all
    refreshes' sums, which should be within a few of ``bias_se``.
    """
    sums, true = draws.sum(1), truth.sum()
    return {
        "whole": float((draws - truth).square().sum(1).mean().sqrt() / truth.norm()),
        "sum": float(sums.std() / true.abs()),
        "empty": float((sums < 0.01 * true).double().mean()),
        "median": float(sums.median() / true),
        "bias": float(sums.mean() / true - 1),
        "bias_se": float(sums.std() / true.abs() / math.sqrt(len(sums))),
    }


def measure_error(draws: int) -> None:
    """Compare estimators with exact diagonals at four confidences."""
    rows, found = sequences(), []
    for confidence in CONFIDENCE:
        model = taught_model(rows, confidence)
        answers = forward_answers(model, collate_rows(rows))
        p = answers.token_logps().exp().detach()
        ggn, empirical = jacobian_diagonals(model, rows)
        hessian = hessian_diagonal(model, rows)
        exact = {"ggn": ggn, "gnb": ggn, "empirical": empirical, "hutchinson": hessian}
        one = {
            "confidence": confidence,
            "p_min": float(p.min()),
            "p_mean": float(p.mean()),
            "p_max": float(p.max()),
            "weights": len(ggn),
            "draws": draws,
            "sum_relative_to_ggn": {name: float(value.sum() / ggn.sum()) for name, value in exact.items()},
            "cosine_to_ggn": {n: float(nn.functional.cosine_similarity(v, ggn, 0)) for n, v in exact.items()},
            "hessian_negative": float((hessian < 0).double().mean()),
            "estimators": {},
            "micro_batches": {},
        }
        for name in WITH_PASSES:
            passes = CurvaturePasses(CurvatureSpec(estimator=name, batch=SEQUENCES), rows)  # pyright: ignore[reportArgumentType]
            one["estimators"][name] = spread(draw(model, passes, draws), exact[name])
        for count in (1, 4, 16):  # the same examples, one after another micro-batch of them
            spec = CurvatureSpec(batch=SEQUENCES, micro_batches=count)
            many = draw(model, CurvaturePasses(spec, rows), max(100, draws // count))
            one["micro_batches"][str(count)] = spread(many, ggn)
        found.append(one)
        print(f"p = {confidence}: {one['p_min']:.4f} to {one['p_max']:.4f}", file=sys.stderr, flush=True)
    record("error", found)
    show_error(found)


def show_error(found: list[dict[str, Any]]) -> None:
    """Print the tables of ``error``."""
    by = [f"p = {one['confidence']:g}" for one in found]
    for key, title in (("sum", "sum"), ("whole", "vector"), ("median", "median"), ("empty", "empty")):
        rows = [[name, *(f"{one['estimators'][name][key]:.2g}" for one in found)] for name in WITH_PASSES]
        print(table([title, *by], rows) + "\n")
    rows = [
        [f"{m} micro-batches", *(f"{one['micro_batches'][m]['sum']:.2g}" for one in found)] for m in ("1", "4", "16")
    ]
    print(table(["ggn, sum", *by], rows) + "\n")
    names = ("empirical", "hutchinson")
    rows = [[f"{n}: sum / sum of ggn", *(f"{one['sum_relative_to_ggn'][n]:.3g}" for one in found)] for n in names]
    rows += [[f"{n}: cosine to ggn", *(f"{one['cosine_to_ggn'][n]:.3g}" for one in found)] for n in names]
    rows += [["negative entries of the Hessian", *(f"{one['hessian_negative']:.0%}" for one in found)]]
    print(table(["exact", *by], rows) + "\n")


# --- cost ------------------------------------------------------------------------------------------------------------


def tofu_rows(folder: Path, tokenizer: Any, count: int) -> list[Encoded]:
    """Return the first retained questions of TOFU, tokenised.

    Raises:
        ValueError: There is no such file.
    """
    template = ChatTemplate(tokenizer)
    return [template.encode(e, index=i) for i, e in enumerate(load_examples(folder / "retain90.json", limit=count))]


def cases() -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what is timed: a step, and refreshes of the same eight examples."""
    yield "step", {}
    yield "step, AdamW", {}
    for name in WITH_PASSES:
        yield name, {"batch": EXAMPLES}
    yield BY_DIFFERENCES, {"batch": EXAMPLES}
    yield "ggn", {"batch": 2, "micro_batches": EXAMPLES // 2}
    yield "ggn", {"batch": 1, "micro_batches": EXAMPLES}


def run_case(name: str, settings: dict[str, int], tofu: Path, repeats: int) -> dict[str, Any]:
    """Time one case in this process."""
    model, tokenizer = load_model(ModelSpec("smollm2-135m"))
    model.train()
    rows = tofu_rows(tofu, tokenizer, EXAMPLES)
    rule = torch.optim.AdamW(model.parameters()) if name == "step, AdamW" else Sophia(model.parameters(), lr=1e-9)
    batch = collate_rows(rows)
    estimator = name.split(",")[0]
    spec = CurvatureSpec(estimator=estimator, **settings) if estimator in WITH_PASSES else CurvatureSpec()  # pyright: ignore[reportArgumentType]
    passes = CurvaturePasses(spec, rows, autocast=autocast)
    agreement: dict[str, float] = {}
    if name == BY_DIFFERENCES:
        exact = passes.estimate(model, Silent(model), passes.plan(0))
        passes.estimator = Estimator(diagonal=differences)
        rough = passes.estimate(model, Silent(model), passes.plan(0))
        agreement["relative_error"] = relative_error(rough, exact)
        del exact, rough
    if isinstance(rule, Sophia):  # state made, as in the middle of a run
        passes.refresh(model, rule, 0)

    def once(step: int) -> None:
        if estimator in WITH_PASSES:
            assert isinstance(rule, Sophia)
            passes.refresh(model, rule, step)
            return
        with autocast():
            loss = -forward_answers(model, batch).token_logps().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()

    once(0)
    loaded = resident()
    reset_peak_memory()
    seconds, busy = [], []
    for step in range(1, repeats + 1):
        started, used = time.perf_counter(), time.process_time()
        once(step)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - used)
    return {
        "case": name,
        **settings,
        **agreement,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "processor_seconds": statistics.median(busy),
        "repeats": repeats,
        "peak_above_state_bytes": peak_memory() - loaded,
        "tokens": int(batch["attention_mask"].sum()),
        "answer_tokens": int(batch["answer_mask"].sum()),
    }


def differences(
    loss: Callable[[], torch.Tensor], params: Sequence[torch.Tensor], generator: torch.Generator, **_: bool
) -> list[torch.Tensor]:
    """Make Hutchinson's estimate from differences of gradients, whatever the model can do."""
    return hutchinson_diagonal(loss, params, generator, differences=True)


def relative_error(found: Any, exact: Any) -> float:
    """Return the norm of the difference of two estimates, relative to the second's."""
    off = sum(float((found[p] - value).square().sum(dtype=torch.float64)) for p, value in exact.items())
    return math.sqrt(off / sum(float(value.square().sum(dtype=torch.float64)) for value in exact.values()))


def resident() -> int:
    """Return the memory this process holds now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure_cost(tofu: Path, repeats: int) -> None:
    """Time every case in a process of its own, then what the cache costs."""
    found = []
    for name, settings in cases():
        command = [sys.executable, __file__, "cost", "--tofu", str(tofu), "--repeats", str(repeats)]
        case = json.dumps([name, settings])
        # or glibc keeps what was freed, and a peak cannot be told from what came before
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(  # noqa: S603 - this very file
            [*command, "--case", case], check=True, capture_output=True, text=True, env=environment
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(name, settings, f"{found[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    disk = measure_cache(repeats)
    record("cost", {"cases": found, "cache": disk})
    base = found[0]["processor_seconds"]
    rows = [
        [
            one["case"] + (f", {one['micro_batches']} x {one['batch']}" if "micro_batches" in one else ""),
            f"{one['seconds']:.2f} ({one['seconds_min']:.2f} to {one['seconds_max']:.2f})",
            f"{one['processor_seconds']:.2f}",
            f"{one['processor_seconds'] / base:.2f}",
            f"{one['peak_above_state_bytes'] / 1e9:.2f}",
        ]
        for one in found
    ]
    print(table(["", "seconds", "processor seconds", "of a step", "peak memory, GB"], rows) + "\n")
    rows = [[name, f"{seconds:.2f}"] for name, seconds in disk.items() if name != "bytes"]
    print(table(["cache", "seconds"], rows) + "\n")
    print(f"{disk['bytes'] / 1e6:.0f} MB on disk")
    errors = [one["relative_error"] for one in found if "relative_error" in one]
    print(f"differences against second derivatives, relative error: {errors[0]:.1e}")


def measure_cache(repeats: int) -> dict[str, float]:
    """Time fingerprint, writing and reading of an estimate of the 135M model."""
    model, _ = load_model(ModelSpec("smollm2-135m"))
    state = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    seconds: dict[str, list[float]] = {"fingerprint": [], "write": [], "read": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        for _ in range(repeats):
            for name, work in (
                ("fingerprint", lambda: cache.fingerprint(model)),
                ("write", lambda: cache.write(file, state, {})),
                ("read", lambda: sum(v.sum() for v in (cache.read(file, torch.device("cpu")) or {}).values())),
            ):
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        size = file.stat().st_size
    return {name: statistics.median(values) for name, values in seconds.items()} | {"bytes": size}


# --- memorised -------------------------------------------------------------------------------------------------------


def measure_memorised(tofu: Path, path: str, draws: int) -> None:
    """Draw refreshes of eight memorised answers and compare sums over layers of each kind."""
    found = []
    for name, where in (("as released", "smollm2-135m"), ("taught", path)):
        model, tokenizer = load_model(ModelSpec(where))
        rows = tofu_rows(tofu, tokenizer, EXAMPLES)
        with torch.no_grad(), autocast():
            p = forward_answers(model, collate_rows(rows)).token_logps().exp()
        one: dict[str, Any] = {
            "model": name,
            "p_mean": float(p.mean()),
            "p_median": float(p.median()),
            "tokens": len(p),
            "draws": draws,
            "estimators": {},
        }
        sums = {}
        for estimator in ("ggn", "gnb", "empirical"):
            passes = CurvaturePasses(CurvatureSpec(estimator=estimator, batch=EXAMPLES), rows, autocast=autocast)
            rule, values = Silent(model), []
            for step in range(draws):
                estimate = passes.estimate(model, rule, passes.plan(step))
                assert estimate is not None
                values.append(float(sum(v.sum(dtype=torch.float64) for v in estimate.values())))
            sums[estimator] = torch.tensor(values)
            print(name, estimator, file=sys.stderr, flush=True)
        truth = sums["ggn"].mean()  # gnb's own mean is of the same matrix, and known far worse
        for estimator, value in sums.items():
            one["estimators"][estimator] = {
                "mean_to_ggn": float(value.mean() / truth),
                "mean_se": float(value.std() / truth / math.sqrt(draws)),
                "relative_std": float(value.std() / value.mean()),
                "median_to_mean_of_ggn": float(value.median() / truth),
                "below_a_tenth": float((value < 0.1 * truth).double().mean()),
            }
        found.append(one)
    record("memorised", found)
    rows_out = [
        [
            f"{one['model']}, mean p {one['p_mean']:.2f}, median {one['p_median']:.3f}",
            estimator,
            f"{got['mean_to_ggn']:.2f} ± {got['mean_se']:.2f}",
            f"{got['relative_std']:.2f}",
            f"{got['median_to_mean_of_ggn']:.2f}",
            f"{got['below_a_tenth']:.0%}",
        ]
        for one in found
        for estimator, got in one["estimators"].items()
    ]
    print(table(["model", "estimator", "mean", "relative std", "median", "below a tenth"], rows_out) + "\n")


def main() -> None:
    """Read the command line and measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=("error", "cost", "memorised"))
    parser.add_argument("--tofu", type=Path, default=Path("../shared/data/tofu"))
    parser.add_argument("--model", default="runs/first-run/taught")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    if given.case:
        name, settings = json.loads(given.case)
        print(json.dumps(run_case(name, settings, given.tofu, given.repeats)))
    elif given.part == "error":
        torch.set_num_threads(1)
        measure_error(given.draws or 1000)
    elif given.part == "cost":
        measure_cost(given.tofu, given.repeats)
    else:
        measure_memorised(given.tofu, given.model, given.draws or 40)


if __name__ == "__main__":
    main()
