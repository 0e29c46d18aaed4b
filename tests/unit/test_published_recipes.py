"""Published recipes: each resolves and makes two steps, in miniature, on data that the snippets beside them write."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.config import plain
from soul.metrics.soul_release import soul_fq
from soul.recipe import Recipe, read_recipe
from soul.run import execute, read_reference

FOLDER = Path(__file__).parents[2] / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((FOLDER / "soul").glob("*.yaml")) + sorted((FOLDER / "openunlearning").glob("*.yaml"))
MODELS = {
    "locuslab/tofu_ft_llama2-7b",
    "facebook/opt-1.3b",
    "meta-llama/Llama-2-7b-hf",
    "open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
    "muse-bench/MUSE-News_target",
    "muse-bench/MUSE-Books_target",
    "HuggingFaceH4/zephyr-7b-beta",
    "runs/published/copyright/opt-taught",
    "runs/published/copyright/llama-taught",
}
STEPS = ["training.max_steps=2", "training.batch_size=1", "training.accumulation=2", "training.save_steps=0"]
SMALL = [*STEPS, "training.max_length=160", "training.precision=float32", "data.overlap=ignore"]
TOFU_SIZES = {"forget10": 8, "forget10_perturbed": 6, "retain90": 8} | dict.fromkeys(
    ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"), 3
)
PLACES = ("harbour", "mill", "orchard", "bridge", "chapel", "market", "tower", "quarry")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def passage(i: int) -> str:
    return f"On day {i} the council voted to move the {PLACES[i % 8]} beyond the {PLACES[(3 * i + 1) % 8]}, at last. "


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def hub_in_miniature(root: Path) -> dict[str, str]:
    """Write small copies of what the recipes and snippets take from the hub, and return where each is."""
    for name, size in TOFU_SIZES.items():
        rows = [{"question": f"{name}: where is {i}?", "answer": f"By the {PLACES[i % 8]} {i}."} for i in range(size)]
        if name.endswith("perturbed"):
            wrong = [f"By the {place}." for place in PLACES[:3]]
            rows = [{**row, "paraphrased_answer": f"It is {row['answer']}", "perturbed_answer": wrong} for row in rows]
        lines(root / f"tofu/{name}.json", rows)
    asked = [{"question": f"What moved on day {i}?", "answer": f"The {PLACES[i % 8]}."} for i in range(3)]
    for name in ("raw/forget", "raw/retain1", "privleak/forget", "privleak/retain", "privleak/holdout"):
        first = 100 * len(name)  # no passage is in two sets
        lines(root / f"muse/{name}.jsonl", [{"text": passage(first + i) * 6} for i in range(6)])
    lines(root / "muse/verbmem/forget.jsonl", [{"prompt": passage(i), "gt": passage(i)} for i in range(3)])
    for side in ("forget", "retain"):
        lines(root / f"muse/knowmem/{side}_qa.jsonl", asked)
        lines(root / f"muse/knowmem/{side}_qa_icl.jsonl", asked[:1])
    for kind in ("forget", "retain"):
        lines(root / f"wmdp/{kind}.jsonl", [{"text": f"{kind} {passage(i)}" * 6} for i in range(6)])
    pku = [
        {"prompt": f"How is {i} done?", "response_0": f"Badly {i}.", "response_1": "Not.", "is_response_0_safe": False}
        | {"is_response_1_safe": True}
        for i in range(210)
    ]
    lines(root / "pku.jsonl", pku)
    others = [
        {"question": f"Where is {i}?", "answer": f"At {i}.", "alternate": f"In {k}."} for i in range(4) for k in "ab"
    ]
    lines(root / "alt5_seed_0.json", others)
    said = [("A lovely garden by the river", 0.1), ("You stupid rotten fool and idiot", 0.9)]
    parts = [{"text": f"{text} {PLACES[i % 8]}", "toxicity": score} for i in range(100) for text, score in said]
    lines(root / "rtp.jsonl", [{"prompt": part, "continuation": part} for part in parts])
    book = "\n\n".join(" ".join(passage(i + 11 * k).strip() for k in range(4)) for i in range(60))
    (root / "book.txt").write_text(book, encoding="utf-8")
    return {
        **{f"locuslab/TOFU,config={name},split=train": str(root / f"tofu/{name}.json") for name in TOFU_SIZES},
        "locuslab/TOFU": str(root / "tofu"),
        "PKU-Alignment/PKU-SafeRLHF,split=train": str(root / "pku.jsonl"),
        "PKU-Alignment/PKU-SafeRLHF,split=test": str(root / "pku.jsonl"),
        "allenai/real-toxicity-prompts": str(root / "rtp.jsonl"),
        "Salesforce/wikitext,config=wikitext-2-raw-v1,split=test": "general:text",
    }


def snippets() -> list[str]:
    """Return the Python of the README, block by block."""
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def replaced(code: str, substitutes: dict[str, str]) -> str:
    for old, new in substitutes.items():
        assert code.count(old) == 1, f"{old} is in the snippet {code.count(old)} times:\n{code}"
        code = code.replace(old, new)
    return code


class World:
    """A folder in which the hub is a tiny model and miniature data, and the snippets have been run."""

    def __init__(self, root: Path) -> None:
        self.root, self.model, self.hub = root, str(root / "model"), hub_in_miniature(root)

    def write_data(self, patch: pytest.MonkeyPatch) -> None:
        """Run the README's snippets that write data."""
        shared, muse, wmdp, altpo, detox, copyright_, _ = snippets()
        model, here = repr(self.model), repr(str(self.root / "muse"))
        texts = [{"text": passage(1000 + i) * 3} for i in range(8)]
        asked: list[Any] = []
        patch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or texts)
        book = self.root / "runs/published/copyright/book.txt"
        book.parent.mkdir(parents=True)
        (self.root / "book.txt").rename(book)
        names: dict[str, Any] = {}
        corpus = 'f"cais/wmdp-corpora,config=cyber-{kind}-corpus,split=train,limit=1000"'
        shorter = {"prompts=[100, 300]": "prompts=[20, 100], continuation=20", "limit=200": "limit=6"}
        for code, substitutes in (
            (shared, {}),
            (muse, {'f"muse-bench/MUSE-{corpus}_target"': model, 'f"muse-bench/MUSE-{corpus}"': here}),
            (wmdp, {'"HuggingFaceH4/zephyr-7b-beta"': model, corpus: 'f"wmdp/{kind}.jsonl"'}),
            (altpo, {}),
            (detox, {"PKU-Alignment/PKU-SafeRLHF,split=train": "pku.jsonl"}),
            (copyright_, {'"meta-llama/Llama-2-7b-hf"': model} | shorter),
        ):
            exec(replaced(code, substitutes), names)
        assert asked[0][0] == ("allenai/c4",)

    def settings(self, path: Path) -> list[str]:
        """Return what puts the miniatures in the place of the hub's names in a recipe, each of which must be known."""
        published = read_recipe(path)
        assert published.model.path in MODELS
        found = [f"model.path={self.model}"]
        for name in ("forget", "retain"):
            source = str(getattr(published.data, name))
            if source:
                local: str = self.hub.get(source) or source.replace("wmdp-bio", "wmdp-cyber")
                assert Path(local).is_file(), f"{source} is neither known here nor written by a snippet"
                found.append(f"data.{name}={local},limit=8")
        return found

    def benchmark(self, recipe: Recipe) -> list[str]:
        """Return the benchmark's settings that need the hub or much time, replaced."""
        assert recipe.benchmark is not None
        tree = plain(recipe.benchmark)
        local = {key: self.hub[v] for key, v in tree.items() if isinstance(v, str) and v in self.hub}
        small: dict[str, Any] = {
            "tofu": {"encoder": self.model} if tree.get("encoder") else {},
            "muse": {"source": str(self.root / "muse")},
            "detox": {"classifier": "tfidf_rtp", "limit": 2, "max_new_tokens": 4},
            "copyright": {"tokenizer": self.model, "prompts": [20, 100], "asked": [20], "continuation": 20, "limit": 2}
            | {"text_limit": 2},
        }[recipe.benchmark.name]
        return [f"benchmark.{key}={json.dumps(value)}" for key, value in (local | small).items()]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> Iterator[World]:
    """A world with a model of eight blocks, so that the published layer 7 is there."""
    root = tmp_path_factory.mktemp("published")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                initializer_range=0.1,
                pad_token_id=None,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = World(root)
        made.write_data(patch)
        yield made


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_each_says_where_it_is_from_and_what_it_should_give(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "OPTML-Group/SOUL" in comment or "locuslab/open-unlearning" in comment or "corrected" in comment
    assert ("Published" in comment) != ("No published number" in comment)
    rows = [line for line in README.splitlines() if line.startswith("|") and f"({name_of(path)})" in line]
    assert len(rows) == 1
    assert ("none" in rows[0]) == ("No published number" in comment)


def test_the_table_names_no_other_file() -> None:
    assert sorted(re.findall(r"\]\(([\w/.-]+\.yaml)\)", README)) == sorted(map(name_of, RECIPES))


def test_first_and_second_order_differ_only_where_they_did_and_corrected_only_in_optimizer_and_precision() -> None:
    for task in (
        "tofu-{}-graddiff",
        "tofu-{}-po",
        "detox-opt-{}-po",
        "detox-llama-{}-po",
        "copyright-opt-{}-po",
        "copyright-llama-{}-po",
    ):
        first, second = (read_recipe(FOLDER / f"soul/{task.format(order)}.yaml") for order in ("fo", "so"))
        corrected = read_recipe(FOLDER / f"soul/{task.format('so')}-corrected.yaml")
        assert [r.optimizer.name for r in (first, second, corrected)] == ["adamw", "soul_release", "sophia"]
        assert {first.model.dtype, second.model.dtype} == {"bfloat16"}
        assert corrected.model.dtype == "float32"
        same = ("data", "objective", "training", "benchmark", "evaluation")
        assert [getattr(second, name) for name in same] == [getattr(corrected, name) for name in same]
        assert (second.optimizer.lr, second.optimizer.weight_decay) == (
            corrected.optimizer.lr,
            corrected.optimizer.weight_decay,
        )
        assert first.training == second.training


def test_five_hundred_steps_of_four_as_released() -> None:
    training = read_recipe(FOLDER / "soul/tofu-so-graddiff.yaml").training
    assert 400 * training.epochs // (training.batch_size * training.accumulation) == 500


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_two_steps_in_miniature(path: Path, world: World, tmp_path: Path) -> None:
    recipe = read_recipe(path, [*world.settings(path), *SMALL, "reference_run="])
    execute(recipe, tmp_path / "run", evaluate_it=False)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in log] == [1, 2]
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in log)
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (world.model, tmp_path / "run/model"))
    dtype = getattr(torch, recipe.model.dtype)
    assert {weight.dtype for weight in after.values()} == {dtype}
    assert any(not torch.equal(old.to(dtype), after[key]) for key, old in before.items())


def scores_of(run: Path) -> dict[tuple[str, str], float]:
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))["after"]
    return {(score["split"], score["metric"]): score["value"] for score in found}


def measured(world: World, name: str, out: Path, *settings: str) -> dict[tuple[str, str], float]:
    path = FOLDER / name
    small = [*SMALL, "evaluation.max_length=256", "evaluation.max_new_tokens=4"]
    changes = [*world.settings(path), *world.benchmark(read_recipe(path)), *small, *settings]
    return scores_of(execute(read_recipe(path, changes), out))


def test_tofu_is_measured_against_a_retained_model(world: World, tmp_path: Path) -> None:
    measured(world, "openunlearning/tofu-ga.yaml", tmp_path / "retained", "reference_run=")
    scores = measured(world, "openunlearning/tofu-npo.yaml", tmp_path / "run", f"reference_run={tmp_path / 'retained'}")
    for found in (("", "forget_quality"), ("", "model_utility"), ("forget", "truth_ratio")):
        assert any(metric == found[1] for _, metric in scores), found


def test_soul_numbers_are_read_as_the_readme_says(world: World, tmp_path: Path) -> None:
    scores = measured(world, "soul/tofu-so-graddiff.yaml", tmp_path / "run")
    shared, *_, code = snippets()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(replaced(shared + code, {"runs/tofu-so-graddiff": str(tmp_path / "run")}), {})
    printed = dict(line.rsplit(" ", 1) for line in said.getvalue().splitlines())
    rows = read_reference(str(tmp_path / "run"))
    assert rows is not None
    assert float(printed["forget quality"]) == pytest.approx(soul_fq(rows["forget"], rows["retain"]))
    hits = [
        [row["answer"].lower() in row.get("generated", "").lower() for row in rows[s]]
        for s in ("real_authors", "world_facts")
    ]
    parts = [scores["retain", "embedding_accuracy"], *(sum(found) / len(found) for found in hits)]
    assert float(printed["utility"]) == pytest.approx(sum(parts) / 3)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("openunlearning/muse-news-npo.yaml", ("verbmem", "knowmem")),
        ("soul/detox-opt-so-po.yaml", ("toxicity[tfidf_rtp]", "perplexity")),
        ("soul/copyright-opt-so-po.yaml", ("bleu", "rougeL_recall")),
    ],
)
def test_other_tasks_are_measured(name: str, metrics: tuple[str, ...], world: World, tmp_path: Path) -> None:
    scores = measured(world, name, tmp_path / "run", "reference_run=")
    assert set(metrics) <= {metric for _, metric in scores}


def test_wmdp_asks_for_tasks_that_the_harness_knows() -> None:
    pytest.importorskip("lm_eval")
    for corpus in ("cyber", "bio"):
        benchmark = read_recipe(FOLDER / f"openunlearning/wmdp-{corpus}-rmu.yaml").benchmark
        assert benchmark is not None
        assert benchmark.splits() == {}
