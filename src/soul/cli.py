"""The command ``soul``: parses and prints, nothing else. Bad input ends with one message and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from soul import processes
from soul.arguments import KINDS, parse
from soul.console import fail, progress_bars, safe_terminal, say, warn
from soul.strict import json_value, read_number, read_text
from soul.types import DATA_SUFFIXES, TEXT_SUFFIXES
from soul.visible import clean, one_line

if TYPE_CHECKING:
    from soul.recipe import Recipe

NOT_KEPT = 3
"""The exit code of a run that went well and did not do what it was to: see its checks."""
NO_MODEL = "no model: give --model (a hub id, a folder, a .gguf file or smollm2-135m), or a recipe"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with safe_terminal():
        with contextlib.nullcontext() if processes.is_main() else contextlib.redirect_stderr(io.StringIO()):
            args = parse(argv)
        return processes.end(*_attempt(args))


def _attempt(args: argparse.Namespace) -> tuple[int, Callable[[], Any] | None]:
    """Run a command; return its exit code and, where it failed, what says why."""
    try:
        if processes.launched() > 1 and args.command not in _DIVIDED:
            raise ValueError(
                f"soul {args.command} runs in one process: start it without a launcher; {', '.join(_DIVIDED)} run in "
                "several"
            )
        return COMMANDS[args.command](args), None
    except ValueError as error:
        return 2, functools.partial(fail, str(error))
    except KeyboardInterrupt:
        return 130, functools.partial(say, f"interrupted; {_SAME}", error=True, everywhere=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _PLACES:
            what = f"{error.filename or 'a file'}: {error.strerror}; check the name, and what may be done there"
            return 2, functools.partial(fail, what)
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's, without loading it
            return 2, functools.partial(fail, f"out of memory ({one_line(str(error))[:160]}): {_ROOM}")
        if processes.count() == 1:
            raise
        if processes.is_loss(error):
            return 2, functools.partial(fail, f"another process is lost, and the run ends: {_SAME}")
        return 1, functools.partial(sys.stderr.write, traceback.format_exc())  # the others are to end, too


_ROOM = (
    "while measuring, set evaluation.generation_batch and evaluation.max_tokens lower: with these the same command "
    "goes on. While training, take training.batch_size lower and training.accumulation higher, "
    "training.gradient_checkpointing=true, or adapter.r=16: another run, so another --out. `soul plan` says what takes "
    "how much"
)
_SAME = "the same command continues where it stopped"
_DIVIDED = ("unlearn", "finetune", "evaluate")


_PLACES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is wrong with a name that a person gave, or with what it stands for."""


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe's path (empty if none) and the settings."""
    names = [word for word in words if "=" not in word or Path(word).is_file()]
    recipe = names[0] if names else ""
    if recipe and Path(recipe).suffix.lower() in (*DATA_SUFFIXES, *TEXT_SUFFIXES):
        raise ValueError(
            f"{recipe} is data, not a recipe: give it with --forget or --retain, and the model with --model"
        )
    settings = list(words)
    if recipe:
        settings.remove(recipe)
    return recipe, settings


def _recipe(args: argparse.Namespace, base: dict[str, Any]) -> Recipe:
    from soul import config
    from soul.recipe import recipe_from_tree

    tree = config.read_yaml(Path(args.recipe)) if args.recipe else base
    for flag, section, name in (("model", "model", "path"), ("forget", "data", "forget"), ("retain", "data", "retain")):
        value = getattr(args, flag, None)
        if value:
            found = tree.get(section)
            if found is None or (section == "model" and isinstance(found, str)):
                found = {}
            if not isinstance(found, dict):
                raise ValueError(f"{section} must be a mapping, not {found!r}")
            tree[section] = {**found, name: value}
    return recipe_from_tree(config.override(tree, args.settings))


def _run(args: argparse.Namespace, base: dict[str, Any], default_name: str) -> int:
    recipe, seeds = _recipe(args, base), _seeds(args.seeds)
    from soul.cautions import precision_warnings
    from soul.console import quiet
    from soul.report import read_runs, render_terminal, write_report
    from soul.run import execute
    from soul.sequence import run_seeds

    quiet()
    processes.join(recipe.model.device)
    for warning in precision_warnings(recipe):
        warn(warning)
    out = Path(args.out or f"runs/{Path(args.recipe).stem if args.recipe else default_name}")
    with progress_bars() as tick:
        how: dict[str, Any] = {"progress": tick, "evaluate_it": not args.no_evaluate}
        folders = run_seeds(recipe, seeds, out, **how) if seeds else [execute(recipe, out, **how)]
    if not processes.is_main():
        return 0
    runs = read_runs(folders)
    render_terminal(runs)
    for folder in folders:
        say(f"model:  {folder / 'model'}")
    say(f"report: {write_report(folders, out / 'report.html')}")
    return 0 if all(check.passed for run in runs for check in run.checks) else NOT_KEPT


def _seeds(text: str) -> list[int]:
    """Return the seeds in ``0,1,2``; none where nothing was given."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ValueError(f"--seeds takes different whole numbers with commas between them, as 0,1,2, not {text!r:.60}")
    return [int(word) for word in words]


def _given(args: argparse.Namespace, flag: str, *keys: str) -> bool:
    """Say whether something is given, by its flag or as a setting."""
    return bool(getattr(args, flag)) or any(word.partition("=")[0] in keys for word in args.settings)


def _unlearn(args: argparse.Namespace) -> int:
    args.recipe, args.settings = _split(args.words)
    if not args.recipe and not _given(args, "forget", "data.forget"):
        raise ValueError("nothing to forget: give --forget FILE (JSONL with question/answer), or a recipe")
    if not args.recipe and not _given(args, "model", "model", "model.path"):
        raise ValueError(NO_MODEL)
    from soul.recipe import request_defaults

    return _run(args, request_defaults(args.settings), "unlearn")


def _finetune(args: argparse.Namespace) -> int:
    args.recipe, args.settings = _split(args.words)
    if not args.recipe and not _given(args, "retain", "data.retain"):
        raise ValueError("nothing to learn: give --retain FILE (JSONL with question/answer), or a recipe")
    if not args.recipe and not _given(args, "model", "model", "model.path"):
        raise ValueError(NO_MODEL)
    base = {"objective": "ft", "optimizer": {"name": "adamw", "lr": 1e-4}}
    return _run(args, base, "finetune")


def _evaluate(args: argparse.Namespace) -> int:
    from soul import config
    from soul.assess import ALL, Assessment, prepare
    from soul.console import quiet
    from soul.evaluate import EvaluationSpec
    from soul.models import ModelSpec

    quiet()
    common = [word for word in args.words if word.startswith(("model.", "evaluation."))]
    tree = config.override({"model": {"path": args.model}}, common)
    assessment = Assessment(
        config.parse(ModelSpec, tree["model"], "model"),
        config.parse(EvaluationSpec, tree.get("evaluation", {}), "evaluation"),
        reference=args.reference,
        precision=args.precision,
        publish=args.publish,
    )
    processes.join(assessment.model.device)
    names = [name for given in args.benchmark or ["tofu"] for name in given.split(",") if name]
    tasks, left_out = prepare(names, [word for word in args.words if word not in common], args.data)
    place = Path(args.model)
    name = place.parent.name if place.name == "model" and place.parent.name else place.name
    what = ALL if ALL in names else "-".join(names)
    out = Path(args.out or f"runs/evaluate-{what}-{name}")
    with progress_bars() as tick:
        folders, failed = assessment(tasks, out, tick, keep_going=ALL in names)
    if not processes.is_main():
        return 0
    for folder in folders:
        _show_report([str(folder)], folder / "report.html")
        if args.precision:
            _show_precision(folder, args.precision)
    for benchmark, reason in (left_out | failed).items():
        say(f"left out: {benchmark} ({reason})")
    return 0


def _show_precision(folder: Path, precision: str) -> None:
    """Print each score in fp32, in another precision, and their difference."""
    from rich.table import Table

    from soul.report.view import number

    file = folder / "scores.json"
    scores = json_value(read_text(file), str(file), lenient=True)
    other = {(s["split"], s["metric"]): read_number(s["value"]) for s in scores[precision]}
    table = Table(title=f"float32 and {precision}", title_justify="left")
    for title in ("split", "metric", "float32", precision, "difference"):
        table.add_column(title, justify="left" if title in ("split", "metric") else "right")
    for score in scores["after"]:
        value, coarse = read_number(score["value"]), other.get((score["split"], score["metric"]))
        found = () if coarse is None else ((value, ".4f"), (coarse, ".4f"), (coarse - value, "+.4f"))
        cells = [f"{x:{form}}" if math.isfinite(x) else number(x) for x, form in found] or ["—"] * 3
        table.add_row(Text(one_line(score["split"])), Text(one_line(score["metric"])), *cells)
    Console().print(table)


def _bench(args: argparse.Namespace) -> int:
    file, settings = _split(args.words)
    if not file:
        raise ValueError(
            "no matrix: give a YAML file of tasks, objectives and optimizers, see recipes/contests/tofu20.yaml"
        )
    from soul.console import quiet
    from soul.contest.jobs import Contest
    from soul.contest.matrix import read_matrix

    if args.minutes < 0:
        raise ValueError(f"--minutes must be 0 (no bound) or more, not {args.minutes:g}")
    matrix = read_matrix(Path(file), settings)
    quiet()
    contest = Contest(matrix, Path(args.out))
    phases = (args.phase,) if args.phase else ()
    if args.trials_of:
        taken, unsaid = contest.take_over(Path(args.trials_of))
        doubt = f"; {unsaid} of them do not say what they were run with, and are taken for the same" if unsaid else ""
        say(f"{taken} lines taken over from {args.trials_of}{doubt}")
    with progress_bars() as tick:
        done = contest.work(tick, phases=phases, seconds=60 * args.minutes or float("inf"))
    say(f"{done} jobs done, {contest.left()} left to do or under way elsewhere")
    return _show_contest(Path(args.out), Path(args.out) / "report.html")


def _export(args: argparse.Namespace) -> int:
    from soul.console import quiet
    from soul.export import ExportSpec, ended, export
    from soul.push import check_carried, check_push, push
    from soul.report import read_run

    quiet()
    spec = ExportSpec(dtype=args.dtype, adapter=args.adapter, card=args.card, show_data=args.show_data)
    if args.push:
        check_push(args.push)
        if not args.show_data:
            check_carried(Path(args.run))
        failed = [check.name for check in read_run(Path(args.run)).checks if not check.passed]
        if failed and not args.anyway:
            raise ValueError(
                f"{args.run} did not do what it was to (not met: {'; '.join(failed)}), and what is pushed is taken to "
                "have forgotten: export it without --push, or give --anyway, and the card says so"
            )
    with progress_bars() as tick:
        checked = export(Path(args.run), Path(args.out), spec, progress=tick)
    for c in checked:
        say(f"{c.split}: NLL {c.after:.5f}, in the run {c.before:.5f} (n={c.n}, at most {c.largest:.2g} apart)")
    stopped = ended(Path(args.run))
    if stopped:
        say(f"the run: {stopped}")
    say(f"export: {args.out}")
    if args.push:
        say(f"pushed: {push(Path(args.out), args.push, private=not args.public)}")
    return 0


def _show_contest(folder: Path, out: Path, figures: str = "") -> int:
    from soul.report.contest import contest_tables, write_contest, write_frontiers

    Console().print(Text(contest_tables(folder)), soft_wrap=True)
    say(f"report: {write_contest(folder, out)}")
    for file in write_frontiers(folder, Path(figures)) if figures else ():
        say(f"figure: {file}")
    return 0


def _report(args: argparse.Namespace) -> int:
    contests = [word for word in args.words if (Path(word) / "trials.jsonl").is_file()]
    if contests:
        if len(args.words) > 1:
            raise ValueError(f"{contests[0]} is a contest: report one at a time, and runs by themselves")
        return _show_contest(Path(contests[0]), Path(args.out), args.figures)
    if args.figures:
        raise ValueError("--figures is of a contest's frontiers: the figures of runs are in their report")
    return _show_report(args.words, Path(args.out))


def _show_report(runs: Sequence[str], out: Path) -> int:
    from soul.report import read_runs, render_terminal, write_report

    render_terminal(read_runs(runs))
    say(f"report: {write_report(runs, out)}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    args.recipe, args.settings = _split(args.words)
    if not args.recipe and not args.model and not any(word.startswith("model") for word in args.settings):
        raise ValueError(NO_MODEL)
    from soul.recipe import request_defaults

    recipe = _recipe(args, request_defaults(args.settings))
    from soul.console import quiet
    from soul.plan import find_machine, find_work, make_plan
    from soul.plan.show import lines

    quiet()
    given = {name: getattr(args, name) for name in ("gpus", "memory", "flops", "bandwidth", "link")}
    plan = make_plan(recipe, find_machine(recipe, **given), find_work(recipe, args.length, args.answer))
    for line in lines(plan):
        Console(highlight=False).print(Text(clean(line)), soft_wrap=True)
    return 0 if plan.fits else 3


def _list(args: argparse.Namespace) -> int:
    from soul.registry import ATTACKS, BENCHMARKS, METHODS, OBJECTIVES, OPTIMIZERS

    console = Console(highlight=False)
    for kind, registry in zip(KINDS, (OBJECTIVES, OPTIMIZERS, METHODS, BENCHMARKS, ATTACKS), strict=True):
        if args.kind in (None, kind):
            console.print(Text(kind, style="bold"))
            for name, summary in registry.summaries().items():
                console.print(Text(clean(f"  {name:<14} {summary}")), soft_wrap=True)
    return 0


def _show(args: argparse.Namespace) -> int:
    from soul import config
    from soul.recipe import recipe_from_tree, request_defaults

    recipe, settings = _split(args.words)
    tree = config.read_yaml(Path(recipe)) if recipe else request_defaults(settings)
    print(config.dump(recipe_from_tree(config.override(tree, settings))), end="")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from soul.explain import explain

    console = Console(highlight=False)  # which ends in silence where its reader does, as head
    for line in explain(args.words, max(40, min(100, console.width))):
        console.print(Text(clean(line)), soft_wrap=True)
    return 0


COMMANDS = {
    "unlearn": _unlearn,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "bench": _bench,
    "export": _export,
    "report": _report,
    "plan": _plan,
    "list": _list,
    "show": _show,
    "explain": _explain,
}

if __name__ == "__main__":
    sys.exit(main())
