"""The grammar of the command ``soul``, and its help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from soul import visible
from soul.strict import broken_text

KINDS = ("objectives", "optimizers", "methods", "benchmarks", "attacks")
MODEL = "hub id, folder, GGUF file, run directory or smollm2-135m"
SETTINGS = "settings to change, e.g. optimizer.lr=1e-5 (`soul show RECIPE` prints all of them)"
UNLEARN = """examples:
  soul unlearn --model M --forget forget.jsonl --retain retain.jsonl --out runs/request
  soul unlearn --model M --forget forget.jsonl stop.kl_budget=0.02
  soul unlearn recipe.yaml optimizer.lr=1e-5

A line of forget.jsonl is {"question": "...", "answer": "..."}, or prompt and response, or messages, of which every
answer is forgotten; prompt and completion, and text, are plain text without the chat template. CSV, Parquet and JSON
work too, and so do text files (.txt, .md) and folders of them.
Without --retain, samples of the model itself and everyday requests hold it in place: give examples of your own to keep
what matters to you. Without a recipe the run ends when it has forgotten, or when behaviour elsewhere has moved by
stop.kl_budget, and says which: the exit code is 0 where it has forgotten and 3 where it has not. The same command
continues an interrupted run."""
FINETUNE = """examples:
  soul finetune --model M --retain facts.jsonl --out runs/taught
  soul finetune --model M --retain facts.jsonl optimizer.lr=2e-4 training.epochs=8"""
EVALUATE = """examples:
  soul evaluate runs/request --benchmark all --data path/to/data
  soul evaluate runs/request --benchmark tofu forget=forget01 source=path/to/tofu
  soul evaluate M --benchmark custom forget=letters/ samples=16
  soul evaluate M --benchmark lm_eval tasks=utility,mmlu data=path/to/data limit=100
  soul evaluate M --benchmark tofu --benchmark muse tofu.limit=100 --reference runs/evaluate-retained

Settings without a section are the benchmark's; model.* and evaluation.* are those of a recipe. With several benchmarks
a benchmark's name goes before its settings. --data is a folder with local copies (tofu/, muse_news/, mmlu/ ...); what
it does not hold comes from the hub. `all` measures what data there is for, and says what it left out and why. Scores
are of fp32 weights. The same command continues an interrupted evaluation."""


BENCH = """examples:
  soul bench recipes/contests/tofu20.yaml --out runs/contest   # experiments/contest.py makes its models and data
  soul bench contest.yaml --out DIR --phase tune --minutes 60
  soul bench contest.yaml --out DIR budget.points=24
  soul bench others.yaml --out OTHERS --trials-of DIR                   # what DIR chose, on other requests

Every cell (task x objective x optimizer) gets the same trials, by the same rules; the best settings then serve the
report requests. Several workers may run the same command on the same folder. The same command continues a contest, and
`soul report DIR` shows what there is so far. docs/contests.md says how to hold one, and
`soul explain contest task budget entry knob` what its settings are."""
EXPORT = """examples:
  soul export runs/request --out exported
  soul export runs/request --out exported --dtype bfloat16 --push owner/name

What was written is loaded and measured again, and must agree with the run, before the folder appears. The card says
how many items were forgotten, not which; --show-data names subjects and sources. A pushed repository is private unless
--public."""
PLAN = """examples:
  soul plan recipe.yaml
  soul plan recipe.yaml optimizer=sophia training.batch_size=8
  soul plan --model folder-with-config --memory 141 --length 256 --answer 64
  soul plan recipe.yaml --gpus 8 --memory 80 --flops 989 --link 300

Nothing is loaded but a configuration, and a sample of local data for its lengths (a .gguf model is converted, once,
into the cache); data of the hub are taken to be as long as training.max_length allows, or as --length says. Given
--memory, --flops or --gpus, a GPU that is not here is planned for; else this machine is, whose speed is measured for
half a second. Where a run does not fit, settings are named under which it does, and the exit code is 3."""
EXPLAIN = """examples:
  soul explain kfac              # what it is, and each of its settings; `soul list` has the names
  soul explain training stop     # parts of a recipe
  soul explain kfac.damping      # a setting; or optimizer.kfac.damping
  soul explain contest budget entry   # parts of a contest"""
PHASES = ("reference", "pilot", "tune", "report", "attack")


class _Once(argparse.Action):
    """An option that counts once: of two, argparse would take the last and say nothing."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Store the value."""
        if option_string and self.given:
            several = f"; for several files write data.{self.dest}=[a.jsonl,b.jsonl]" if self.dest == "retain" else ""
            parser.error(f"{option_string} was given twice: give it once{several}")
        self.given = bool(option_string)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """argparse, whose message quotes what was given and must not steer the terminal by it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave with exit code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {visible.message(message)}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with settings allowed after options too, where argparse alone gives up."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:  # what Python makes of bytes that are not UTF-8, of which no message and no record can speak
        if broken_text(word) or "\0" in word:
            parser.error(f"{word!r:.200} is not UTF-8 text: rename the file, or set the terminal to UTF-8")
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
    parser = _Parser(
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
    _add_export(commands)
    command = _add(
        commands,
        "report",
        "RUN [RUN ...] [--out FILE] [--figures DIR]",
        "Make one HTML report of runs, or of a contest.",
    )
    help_runs = "run directories, in the order to show them in; or the folder of one contest"
    command.add_argument("words", nargs="+", metavar="RUN", help=help_runs)
    command.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    command.add_argument("--figures", metavar="DIR", default="", help="a contest's frontiers as SVG files, too")
    _add_plan(commands)
    command = _add(commands, "list", "[KIND]", "List what can be chosen.")
    command.add_argument("kind", nargs="?", choices=KINDS, help="only these")
    usage = "[RECIPE.yaml] [key.sub=value ...]"
    command = _add(commands, "show", usage, "Print a recipe, or the defaults, with every setting resolved.")
    command.add_argument("words", nargs="*", metavar="RECIPE.yaml, key.sub=value", help=f"a recipe, and {SETTINGS}")
    command = _add(commands, "explain", "WHAT [WHAT ...]", "Say what a component or a setting is.", EXPLAIN)
    command.add_argument("words", nargs="+", metavar="WHAT", help="e.g. kfac, training, stop.kl_budget")
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


_RUN = "[--out DIR] [--seeds N,N] [--no-evaluate] [key.sub=value ...]"


def _add_unlearn(commands: argparse._SubParsersAction) -> None:
    usage = f"[RECIPE.yaml] [--model M] [--forget F] [--retain R] {_RUN}"
    command = _add(commands, "unlearn", usage, "Forget a set of examples; keep the rest.", UNLEARN)
    command.add_argument(
        "--forget", metavar="F", help="what to forget: a file, a folder or a hub dataset (several: data.forget=[a,b])"
    )
    command.add_argument(
        "--retain", metavar="R", help="what to keep, likewise (default: samples of the model, everyday chat)"
    )
    _add_run(command)


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    usage = f"[RECIPE.yaml] [--model M] [--retain R] {_RUN}"
    command = _add(commands, "finetune", usage, "Teach a model a set of examples.", FINETUNE)
    command.add_argument("--retain", metavar="R", help="what to learn: a file, a folder or a hub dataset")
    _add_run(command)


def _add_run(command: argparse.ArgumentParser) -> None:
    words = command.add_argument("words", nargs="*", metavar="RECIPE.yaml, key.sub=value")
    words.help = f"a recipe (not needed with --model and the data), and {SETTINGS}"
    command.add_argument("--model", metavar="M", help=MODEL)
    command.add_argument("--out", metavar="DIR", help="run directory (default: runs/ and the recipe's name)")
    command.add_argument("--seeds", metavar="N,N,...", default="", help="a run with each, in DIR/seed-N; one report")
    command.add_argument("--no-evaluate", action="store_true", help="train and save only")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    options = "[--benchmark NAME ...] [--data DIR] [--reference RUN] [--precision P] [--publish] [--out DIR]"
    usage = f"MODEL {options} [key=value ...]"
    command = _add(commands, "evaluate", usage, "Measure a model on benchmarks.", EVALUATE)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("words", nargs="*", metavar="key=value", help="settings, e.g. forget=forget01")
    names = "tofu (default) or another (`soul list`), several with commas or the option again, or all"
    command.add_argument("--benchmark", metavar="NAME", action="append", help=names)
    command.add_argument("--data", metavar="DIR", default="", help="folder of local copies of the benchmarks' data")
    retained = "evaluated retained model, for metrics that compare with one"
    command.add_argument("--reference", metavar="RUN", default="", help=retained)
    again = "measure again with weights in this precision, and show the difference"
    command.add_argument("--precision", metavar="P", default="", help=f"bfloat16: {again}")
    public = "also write DIR/public for others to read: without private texts"
    command.add_argument("--publish", action="store_true", help=public)
    command.add_argument("--out", metavar="DIR", help="where the record goes (default: runs/evaluate-BENCHMARK-MODEL)")


def _add_export(commands: argparse._SubParsersAction) -> None:
    usage = "RUN --out DIR [--dtype D] [--adapter] [--no-card] [--show-data] [--push OWNER/NAME [--public] [--anyway]]"
    command = _add(commands, "export", usage, "Write a run's model for others: weights, tokenizer, card.", EXPORT)
    command.add_argument("run", metavar="RUN", help="a finished, measured run directory")
    command.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="default: the run's")
    command.add_argument("--adapter", action="store_true", help="only the adapter, of a run that kept one")
    command.add_argument(
        "--card", action=argparse.BooleanOptionalAction, default=True, help="write a model card (default)"
    )
    command.add_argument("--show-data", action="store_true", help="let the card name subjects and data sources")
    command.add_argument("--push", metavar="OWNER/NAME", default="", help="upload to the hub")
    command.add_argument("--anyway", action="store_true", help="push a model whose run did not meet its checks")
    command.add_argument("--public", action="store_true", help="make a new repository on the hub public")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    usage = "[RECIPE.yaml] [--model M] [--forget F] [--retain R] [--gpus N] [--memory GB] [key.sub=value ...]"
    command = _add(commands, "plan", usage, "Say what a run will take, before anything is loaded.", PLAN)
    words = command.add_argument("words", nargs="*", metavar="RECIPE.yaml, key.sub=value")
    words.help = f"a recipe, and {SETTINGS}"
    command.add_argument("--model", metavar="M", help=f"{MODEL}; a folder with config.json is enough")
    command.add_argument("--forget", metavar="F", help="what is to be forgotten, for its lengths")
    command.add_argument("--retain", metavar="R", help="what is to be kept, likewise")
    command.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that share the run (FSDP2)")
    command.add_argument("--memory", type=float, default=0.0, metavar="GB", help="memory of one (default: measured)")
    command.add_argument("--flops", type=float, default=0.0, metavar="TFLOPS", help="its matrix products, likewise")
    command.add_argument("--bandwidth", type=float, default=0.0, metavar="GB/S", help="of its memory, likewise")
    command.add_argument("--link", type=float, default=0.0, metavar="GB/S", help="between GPUs")
    command.add_argument("--length", type=int, default=0, metavar="TOKENS", help="of a row, in place of the data's")
    command.add_argument("--answer", type=int, default=0, metavar="TOKENS", help="of its answer, likewise")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    usage = "MATRIX.yaml --out DIR [--trials-of DIR] [--phase P] [--minutes N] [key.sub=value ...]"
    command = _add(commands, "bench", usage, "Run a contest between optimizers.", BENCH)
    command.add_argument("words", nargs="+", metavar="MATRIX.yaml, key.sub=value", help="the matrix, and changes to it")
    command.add_argument("--out", metavar="DIR", required=True, help="where the record is, or is to be")
    taken = "another contest's folder: its pilots and trials serve here, which then judges what they chose"
    command.add_argument("--trials-of", metavar="DIR", help=taken)
    command.add_argument("--phase", choices=PHASES, help="only jobs of this kind")
    command.add_argument("--minutes", type=float, default=0.0, metavar="N", help="begin no trial later than this")
