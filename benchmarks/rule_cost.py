"""What every update rule and every inverse costs on a 135M model: seconds of a refresh, of a step, and memory.

    python benchmarks/rule_cost.py --tofu ../shared/data/tofu

Eight retained questions of TOFU. ``rules``: every registered optimizer at its defaults; ``refresh`` is a curvature pass
of one micro-batch with what the rule makes of it, ``gradient`` a forward and backward pass of the same eight, ``step``
the rule alone (the first step after a refresh, which computes inverses, apart from the later ones), ``memory`` the peak
above weights and gradients. ``inverses``: those of influence unlearning, over the linear layers of the blocks,
``prepare`` with the default number of draws, ``solve`` for one gradient, ``memory`` above weights and that gradient;
``cg`` and ``woodfisher`` look at the data again in every solve; ``cg`` is stopped after four iterations, and may
need a hundred.

Each has a process of its own. Medians of three where there are several. Writes ``docs/results/rule-cost.json`` line by
line: what is there is not measured again. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from _machine import autocast, in_own_process, table
from soul.console import quiet
from soul.curvature.ihvp import INVERSES, InverseSpec, make_inverse
from soul.curvature.kronecker import linear_layers
from soul.curvature.passes import CurvaturePasses
from soul.curvature.products import loss_gradient
from soul.data.batches import collate_rows
from soul.data.sources import load_examples
from soul.data.templates import ChatTemplate, Encoded
from soul.forward import forward_answers
from soul.machine import has_bf16, peak_memory, reset_peak_memory
from soul.models import ModelSpec, load_model
from soul.registry import OPTIMIZERS
from soul.stored import write_json

RECORD = Path(__file__).parents[1] / "docs/results/rule-cost.json"
EXAMPLES, REPEATS, CG_ITERATIONS = 8, 3, 4
Line = dict[str, Any]


def setting(tofu: Path, name: str) -> tuple[Any, list[Encoded]]:
    """Return the model and the rows."""
    quiet()
    model, tokenizer = load_model(ModelSpec(name))
    template = ChatTemplate(tokenizer)
    examples = load_examples(tofu / "retain90.json", limit=EXAMPLES)
    return model.train(), [template.encode(e, index=i) for i, e in enumerate(examples)]


def timed(work: Any) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cost_of_rule(name: str, tofu: Path, model_name: str) -> Line:
    """Measure one optimizer."""
    model, rows = setting(tofu, model_name)
    batch, spec = collate_rows(rows), OPTIMIZERS.get(name)()
    params = list(model.parameters())

    def gradient() -> None:
        model.zero_grad()
        with autocast():
            loss = -forward_answers(model, batch).token_logps().mean()
        loss.backward()

    gradient()
    reset_peak_memory()
    loaded = peak_memory()
    rule = spec.build(params, model)
    out: Line = {"rule": name, "gradient": [], "step": []}

    if getattr(spec, "needs_curvature", False):
        passes = CurvaturePasses(spec.curvature, rows, autocast=autocast)

        def refresh(step: int) -> None:
            model.zero_grad()
            rule.update_curvature(passes.estimate(model, rule, passes.plan(step)[:1], explicit=False))
            model.zero_grad()

        refresh(0)
        gradient()
        rule.step()
        out["refresh"] = timed(lambda: refresh(1))
        gradient()
        out["first_step"] = timed(rule.step)
    for _ in range(REPEATS):
        out["gradient"].append(timed(gradient))
        out["step"].append(timed(rule.step))
    for key in ("gradient", "step"):
        out[key] = statistics.median(out[key])
    out["memory"] = peak_memory() - loaded
    return out


def cost_of_inverse(name: str, tofu: Path, model_name: str) -> Line:
    """Measure one inverse."""
    model, rows = setting(tofu, model_name)
    moving = {id(layer.weight) for layer in linear_layers(model).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in moving)
    batches = [collate_rows(rows)]
    _, vector = loss_gradient(model, batches)
    reset_peak_memory()
    loaded = peak_memory()
    made: list[Any] = []
    prepare = timed(lambda: made.append(make_inverse(name, model, batches, InverseSpec(iterations=CG_ITERATIONS), 0)))
    repeats = 1 if name in ("cg", "woodfisher") else REPEATS
    solve = [timed(lambda: made[0](vector)) for _ in range(repeats)]
    return {
        "inverse": name,
        "prepare": prepare,
        "first_solve": solve[0],
        "solve": statistics.median(solve),
        "memory": peak_memory() - loaded,
        **made[0].report(),
    }


def show(record: dict[str, list[Line]]) -> None:
    """Print both tables."""

    def seconds(line: Line, key: str) -> str:
        return f"{line[key]:.2f}" if key in line else ""

    keys = ("refresh", "first_step", "step", "gradient")
    rows = [[x["rule"], *(seconds(x, k) for k in keys), f"{x['memory'] / 1e9:.2f}"] for x in record["rules"]]
    print(
        table(["rule", "refresh, s", "step after it, s", "later step, s", "gradient, s", "memory, GB"], rows),
        end="\n\n",
    )
    keys = ("prepare", "first_solve", "solve")
    rows = [[x["inverse"], *(seconds(x, k) for k in keys), f"{x['memory'] / 1e9:.2f}"] for x in record["inverses"]]
    print(table(["inverse", "prepare, s", "first solve, s", "later solve, s", "memory, GB"], rows) + "\n")


def main() -> int:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    if not (args.tofu / "retain90.json").is_file():
        parser.error(f"no {args.tofu / 'retain90.json'}: --tofu takes a folder with TOFU's files")
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {"rules": [], "inverses": []}
    # external takes an optimizer of another library, which has to be named
    everything = [("rules", "rule", n, cost_of_rule) for n in OPTIMIZERS.names() if n != "external"]
    everything += [("inverses", "inverse", n, cost_of_inverse) for n in INVERSES]
    for part, key, name, measure in everything:
        if name not in [line[key] for line in record[part]]:
            print(name, file=sys.stderr, flush=True)
            record[part].append(in_own_process(measure, name, args.tofu, args.model))
            record["environment"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "bf16": has_bf16()}
            write_json(RECORD, record)
    show(record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
