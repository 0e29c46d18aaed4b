"""The command ``soul``: parses and prints, nothing else. Bad input ends with one message and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from soul.recipe import Recipe

KINDS = ("objectives", "optimizers", "benchmarks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except ValueError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soul", description="Make a language model forget chosen data, and prove that it did."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    for name, run, text in (
        ("unlearn", _unlearn, "Forget a set of examples; keep the rest."),
        ("finetune", _finetune, "Teach a model a set of examples."),
    ):
        command = add(name, run, text)
        command.add_argument("recipe", nargs="?", help="YAML recipe; without one, give --model and the data")
        command.add_argument("set", nargs="*", metavar="key.sub=value", help="settings that override the recipe")
        command.add_argument("--model", help="hub id, folder, GGUF file or smollm2-135m")
        if name == "unlearn":
            command.add_argument("--forget", help="what to forget: a file, folder or hub dataset")
        command.add_argument("--retain", help="what to keep (unlearn) or learn (finetune)")
        command.add_argument("--out", help="run directory (default: runs/NAME)")
        command.add_argument("--no-evaluate", action="store_true", help="train and save only")
    command = add("evaluate", _evaluate, "Measure a model on a benchmark.")
    command.add_argument("model", help="a model, or a run directory")
    command.add_argument("set", nargs="*", metavar="key=value", help="settings of the benchmark, e.g. forget=forget01")
    command.add_argument("--benchmark", default="tofu")
    command.add_argument("--reference", default="", help="evaluated run of a retained model, for forget quality")
    command.add_argument("--out", help="where the record goes (default: runs/evaluate-NAME)")
    command = add("report", _report, "Make one HTML report of one or more runs.")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--out", default="report.html")
    command = add("list", _list, "List what can be chosen.")
    command.add_argument("kind", nargs="?", choices=KINDS)
    command = add("show", _show, "Print a recipe with every setting resolved.")
    command.add_argument("recipe")
    command.add_argument("set", nargs="*", metavar="key.sub=value")
    return parser


@contextlib.contextmanager
def progress_bars() -> Iterator[Any]:
    """Show one bar for each thing that is under way; yields the function that moves them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tick(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tick


def _recipe(args: argparse.Namespace, base: dict[str, Any]) -> Recipe:
    from soul import config
    from soul.recipe import recipe_from_tree

    first = args.recipe
    assignments = list(args.set)
    if first and "=" in first and not Path(first).exists():  # settings without a recipe
        assignments.insert(0, first)
        first = None
    if not first and not args.model:
        raise ValueError("give a recipe (soul unlearn RECIPE.yaml), or --model and the data (--forget F.jsonl)")
    tree = config.read_yaml(Path(first)) if first else base
    args.recipe = first
    for flag, key in (("model", "model.path"), ("forget", "data.forget"), ("retain", "data.retain")):
        value = getattr(args, flag, None)
        if value:
            if flag == "model" and isinstance(tree.get("model"), str):
                tree["model"] = {}
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
    return recipe_from_tree(config.override(tree, assignments))


def _run(args: argparse.Namespace, base: dict[str, Any], default_name: str) -> int:
    recipe = _recipe(args, base)
    from soul.report import read_run, render_terminal, write_report
    from soul.run import execute, precision_warnings
    from soul.trainer import quiet

    quiet()
    for warning in precision_warnings(recipe):
        Console(stderr=True, highlight=False).print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    out = Path(args.out or f"runs/{Path(args.recipe).stem if args.recipe else default_name}")
    with progress_bars() as tick:
        execute(recipe, out, progress=tick, evaluate_it=not args.no_evaluate)
    console = Console()
    render_terminal([read_run(out)], console)
    console.print(f"model:  {escape(str(out / 'model'))}", soft_wrap=True)
    console.print(f"report: {escape(str(write_report([out], out / 'report.html')))}", soft_wrap=True)
    return 0


def _unlearn(args: argparse.Namespace) -> int:
    if not args.recipe and not args.forget:
        raise ValueError("nothing to forget: give --forget FILE (JSONL with question/answer), or a recipe")
    base: dict[str, Any] = {}
    if not args.recipe and not args.retain:
        base = {"data": {"retain": "general:chat"}}  # something must hold the model in place
    return _run(args, base, "unlearn")


def _finetune(args: argparse.Namespace) -> int:
    if not args.recipe and not args.retain:
        raise ValueError("nothing to learn: give --retain FILE (JSONL with question/answer), or a recipe")
    base = {"objective": "ft", "optimizer": {"name": "adamw", "lr": 1e-4}}
    return _run(args, base, "finetune")


def _evaluate(args: argparse.Namespace) -> int:
    from soul import config
    from soul.evaluate import evaluate
    from soul.models import ModelSpec, load_model
    from soul.registry import BENCHMARKS
    from soul.run import environment, read_reference, score_dict, write_json
    from soul.trainer import quiet

    quiet()
    benchmark = config.component(BENCHMARKS, config.override({"name": args.benchmark}, args.set), args.benchmark)
    reference = read_reference(args.reference)
    splits = benchmark.splits()
    model, tokenizer = load_model(ModelSpec(args.model))
    out = Path(args.out or f"runs/evaluate-{args.benchmark}-{Path(args.model).name}")
    identity = {"model": args.model, "benchmark": config.plain(benchmark)}
    _claim(out, config.dump(identity))
    with progress_bars() as tick:
        rows = evaluate(model, tokenizer, splits, folder=out / "rows/after", progress=tick)
    write_json(out / "scores.json", {"after": [score_dict(s) for s in benchmark.score(rows, reference)]})
    write_json(out / "environment.json", environment())
    label = f"{args.model} on {args.benchmark}"
    write_json(out / "record.json", {"format": 1, "label": label, "asked": f"Measure {label}.", "model": args.model})
    return _report(argparse.Namespace(runs=[str(out)], out=str(out / "report.html")))


def _claim(out: Path, text: str) -> None:
    """Take a folder for an evaluation, or refuse one that holds another."""
    file = out / "recipe.yaml"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds another evaluation: choose another --out, or delete that folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error


def _report(args: argparse.Namespace) -> int:
    from soul.report import read_run, render_terminal, write_report

    records = [read_run(run) for run in args.runs]
    console = Console()
    render_terminal(records, console)
    try:
        path = write_report(args.runs, Path(args.out))
    except OSError as error:
        raise ValueError(f"cannot write {args.out}: {error.strerror or error}; choose another --out") from error
    console.print(f"report: {escape(str(path))}", soft_wrap=True)
    return 0


def _list(args: argparse.Namespace) -> int:
    from soul.registry import BENCHMARKS, OBJECTIVES, OPTIMIZERS

    console = Console(highlight=False)
    for kind, registry in zip(KINDS, (OBJECTIVES, OPTIMIZERS, BENCHMARKS), strict=True):
        if args.kind in (None, kind):
            console.print(f"[bold]{kind}[/]")
            for name in registry.names():
                console.print(f"  {name:<14} {escape(registry.summary(name))}", soft_wrap=True)
    return 0


def _show(args: argparse.Namespace) -> int:
    from soul import config
    from soul.recipe import read_recipe

    print(config.dump(read_recipe(Path(args.recipe), args.set)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
