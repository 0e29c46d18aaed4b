"""The grammar of the command ``soul``, and its help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import version

KINDS = ("objectives", "optimizers", "methods", "benchmarks", "attacks")
MODEL = "hub id, folder, GGUF file, run directory or smollm2-135m"
SETTINGS = "settings to change, e.g. optimizer.lr=1e-5 (`soul show RECIPE` prints all of them)"
UNLEARN = """examples:
  soul unlearn --model M --forget forget.jsonl --retain retain.jsonl --out runs/request
  soul unlearn --model M --forget forget.jsonl training.epochs=10
  soul unlearn recipe.yaml optimizer.lr=1e-5

A line of forget.jsonl is {"question": "...", "answer": "..."}, or prompt and response, prompt and completion, messages,
or text; CSV, Parquet and JSON work too. Without --retain, everyday chat that comes with soul holds the model in place:
give examples of your own to keep what matters to you. The same command continues an interrupted run."""
FINETUNE = """examples:
  soul finetune --model M --retain facts.jsonl --out runs/taught
  soul finetune --model M --retain facts.jsonl optimizer.lr=2e-4 training.epochs=8"""
EVALUATE = """examples:
  soul evaluate runs/request --benchmark tofu forget=forget01
  soul evaluate M --benchmark request forget=forget.jsonl kept=retain.jsonl
  soul evaluate M --benchmark tofu source=path/to/tofu limit=100 evaluation.generate=false

Settings without a section are the benchmark's; model.* and evaluation.* are those of a recipe."""


BENCH = """examples:
  soul bench recipes/contests/tofu20.yaml --out docs/results/contest
  soul bench contest.yaml --out DIR --phase tune --minutes 60
  soul bench contest.yaml --out DIR budget.points=24

Every cell (task x objective x optimizer) gets the same trials, by the same rules; the best settings then serve the
report requests. Several workers may run the same command on the same folder. The same command continues a contest, and
`soul report DIR` shows what there is so far."""
PHASES = ("reference", "pilot", "tune", "report", "attack")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with settings allowed after options too, where argparse alone gives up."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        parser.exit(2, f"{parser.format_help()}\nsoul: error: the following arguments are required: COMMAND\n")
    args, rest = parser.parse_known_args(words)
    command: argparse.ArgumentParser = args.parser
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "words")]
    if unknown:
        options = [option for action in command._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        command.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
    if rest:
        args.words = [*args.words, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soul",
        description="Make a language model forget chosen data, and prove that it did.",
        epilog="`soul COMMAND --help` says more about each.",
    )
    parser.add_argument("--version", action="version", version=f"soul {version('soul-unlearning')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_unlearn(commands)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    command = _add(commands, "report", "RUN [RUN ...] [--out FILE]", "Make one HTML report of runs, or of a contest.")
    help_runs = "run directories, in the order to show them in; or the folder of one contest"
    command.add_argument("words", nargs="+", metavar="RUN", help=help_runs)
    command.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    command = _add(commands, "list", "[KIND]", "List what can be chosen.")
    command.add_argument("kind", nargs="?", choices=KINDS, help="only these")
    usage = "[RECIPE.yaml] [key.sub=value ...]"
    command = _add(commands, "show", usage, "Print a recipe, or the defaults, with every setting resolved.")
    command.add_argument("words", nargs="*", metavar="RECIPE.yaml, key.sub=value", help=f"a recipe, and {SETTINGS}")
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, usage: str, text: str, more: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        usage=f"soul {name} {usage}",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(command=name, parser=command)
    return command


def _add_unlearn(commands: argparse._SubParsersAction) -> None:
    usage = "[RECIPE.yaml] [--model M] [--forget F] [--retain R] [--out DIR] [key.sub=value ...]"
    command = _add(commands, "unlearn", usage, "Forget a set of examples; keep the rest.", UNLEARN)
    command.add_argument("--forget", metavar="F", help="what to forget: a file, a folder or a hub dataset")
    command.add_argument("--retain", metavar="R", help="what to keep, likewise (default: everyday chat)")
    _add_run(command)


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    usage = "[RECIPE.yaml] [--model M] [--retain R] [--out DIR] [key.sub=value ...]"
    command = _add(commands, "finetune", usage, "Teach a model a set of examples.", FINETUNE)
    command.add_argument("--retain", metavar="R", help="what to learn: a file, a folder or a hub dataset")
    _add_run(command)


def _add_run(command: argparse.ArgumentParser) -> None:
    words = command.add_argument("words", nargs="*", metavar="RECIPE.yaml, key.sub=value")
    words.help = f"a recipe (not needed with --model and the data), and {SETTINGS}"
    command.add_argument("--model", metavar="M", help=MODEL)
    command.add_argument("--out", metavar="DIR", help="run directory (default: runs/ and the recipe's name)")
    command.add_argument("--no-evaluate", action="store_true", help="train and save only")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    usage = "MODEL [--benchmark NAME] [--reference RUN] [--out DIR] [key=value ...]"
    command = _add(commands, "evaluate", usage, "Measure a model on a benchmark.", EVALUATE)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("words", nargs="*", metavar="key=value", help="settings, e.g. forget=forget01")
    command.add_argument("--benchmark", metavar="NAME", default="tofu", help="tofu (default) or another (`soul list`)")
    command.add_argument("--reference", metavar="RUN", default="", help="evaluated retained model, for forget quality")
    command.add_argument("--out", metavar="DIR", help="where the record goes (default: runs/evaluate-BENCHMARK-MODEL)")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    usage = "MATRIX.yaml --out DIR [--phase P] [--minutes N] [key.sub=value ...]"
    command = _add(commands, "bench", usage, "Run a contest between optimizers.", BENCH)
    command.add_argument("words", nargs="+", metavar="MATRIX.yaml, key.sub=value", help="the matrix, and changes to it")
    command.add_argument("--out", metavar="DIR", required=True, help="where the record is, or is to be")
    command.add_argument("--phase", choices=PHASES, help="only jobs of this kind")
    command.add_argument("--minutes", type=float, default=0.0, metavar="N", help="begin no trial later than this")
