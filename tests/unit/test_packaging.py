"""What the package declares is what it needs: every import has its dependency, and every dependency its import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
WITHOUT_AN_IMPORT: dict[str, str] = {}
OPTIONAL_WITHOUT_AN_IMPORT = {
    "bitsandbytes": "transformers quantizes with it",
    "deepspeed": "accelerate imports it where its launcher asks for it",
    "lm-eval": "imported by name, which takes seconds, where it is asked for",
}
OPTIONAL = {
    "bitsandbytes": "quantized",
    "deepspeed": "zero",
    "datasets": "hub",
    "lm-eval": "lm-eval",
    "numba": "fused",
    "pyarrow": "parquet",
    "sacrebleu": "bleu",
    "scikit-learn": "detox",
}
NOT_IN_DEV = {
    "bitsandbytes": "peft imports it wherever it is, and it complains; its tests run where it is installed",
    "deepspeed": "accelerate imports it wherever it is, and it writes to standard output; the same",
}
COMES_WITH = {"markupsafe": "jinja2", "huggingface-hub": "transformers"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> dict[str, str]:
    """Return the version bound of each requirement by its name."""
    found = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", requirement) for requirement in requirements]
    return {normal(match[1]): match[2] for match in found if match}


DECLARED = names(PROJECT["dependencies"])
EXTRAS = {extra: names(needed) for extra, needed in PROJECT["optional-dependencies"].items()}


def imported() -> set[str]:
    """Return the distributions that the library imports, anywhere in it."""
    modules: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    homes = metadata.packages_distributions()
    outside = modules - set(sys.stdlib_module_names) - {"soul", "__future__"}
    return {normal(homes[module][0]) for module in outside}


def test_every_import_is_declared():
    found = imported() - OPTIONAL.keys()
    direct = {COMES_WITH.get(name, name) for name in found}
    assert direct <= DECLARED.keys()


def test_every_declared_dependency_is_used():
    assert DECLARED.keys() - imported() == WITHOUT_AN_IMPORT.keys()


def test_what_is_optional_is_an_extra():
    for name, extra in OPTIONAL.items():
        assert (name in imported()) != (name in OPTIONAL_WITHOUT_AN_IMPORT)
        assert name in EXTRAS[extra]
        assert (name in EXTRAS["dev"]) != (name in NOT_IN_DEV)
        assert name not in DECLARED


def test_bounds_are_lower_bounds_and_the_pins_are_within_them():
    for name, bound in (DECLARED | EXTRAS["dev"] | EXTRAS["hub"]).items():
        assert re.fullmatch(r">=[\d.]+", bound), f"{name}{bound}"
        pin = {normal(key): value for key, value in PINNED.items()}[name]
        assert [int(x) for x in re.findall(r"\d+", pin)] >= [int(x) for x in re.findall(r"\d+", bound)], name


@pytest.mark.skipif(
    "SOUL_UNPINNED" in os.environ, reason="other versions were asked for (make test-lowest, test-newest)"
)
def test_what_is_installed_is_what_is_pinned():
    """Only then do the tests say anything about the versions that others will get."""
    for name in DECLARED | EXTRAS["dev"]:
        pin = {normal(key): value for key, value in PINNED.items()}[name]
        assert metadata.version(name).split("+")[0] == pin


def test_the_library_works_without_its_extras():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(OPTIONAL)})); import soul, soul.cli, soul.run, soul.api; "
        "assert soul.load_examples('general:facts'); sys.exit(soul.cli.main(['list']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
