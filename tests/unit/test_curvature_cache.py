"""Warm starts on disk: found again by the same model and data and by no others, and the same to the last byte."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from soul import config
from soul.adapters import AdapterSpec, add_adapter
from soul.curvature import cache, inverses
from soul.curvature.inverses import inverse
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import Encoded
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec
from soul.types import LostModelError

WATCHING = [name for name in OPTIMIZERS.names() if OPTIMIZERS.get(name).needs_curvature]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "curvature"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all micro-batches that passes have had."""
    made: list[int] = []
    inner = CurvaturePasses._collate

    def counted(self: Any, model: Any, picks: Any) -> Any:
        made.append(len(picks))
        return inner(self, model, picks)

    monkeypatch.setattr(CurvaturePasses, "_collate", counted)
    return made


@pytest.fixture
def run(
    tokenizer: Any, make_model: Any, forget_set: Any, retain_set: Any, refusals: Any, tmp_path: Path
) -> Callable[..., tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    """Train a model with dropout for four steps; return its weights and its log."""

    def do(
        *, optimizer: str = "sophia", lr: float = 1e-3, model: int = 0, seed: int = 0, retain: Any = retain_set,
        settings: Any = None, **curvature: Any,
    ) -> Any:  # fmt: skip
        curvature = {"interval": 2, "batch": 3, "warm_start": 4, **curvature}
        rule = config.component(
            OPTIMIZERS, {"name": optimizer, "lr": lr, **(settings or {}), "curvature": curvature}, optimizer
        )
        training = TrainingSpec(batch_size=2, epochs=1, precision="float32", save_steps=0, seed=seed)
        network, loss, log = make_model(model), OBJECTIVES.get("grad_diff")(), LogCallback(None)
        for layer in network.model.layers:
            layer.self_attn.attention_dropout = 0.3
        trainer = UnlearnTrainer(
            network,
            training.arguments(tmp_path / "run"),
            dataset=make_dataset(tokenizer, forget_set, retain, loss, training, refusals),
            objective=loss,
            optimizer=rule,
            training=training,
            callbacks=[log],
        )
        log.trainer = trainer
        trainer.train()
        assert trainer.state.global_step == 4
        timeless = [{k: v for k, v in record.items() if "seconds" not in k} for record in log.records]
        return {k: v.clone() for k, v in network.state_dict().items()}, timeless

    return do


def kept(folder: Path, *, derived: bool = False) -> list[Path]:
    """Return the files of what passes found, or of what rules derived from it."""
    return [file for file in sorted(folder.iterdir()) if ("-" in file.stem) == derived]


def same(first: Any, second: Any) -> bool:
    return first[1] == second[1] and all(torch.equal(second[0][k], v) for k, v in first[0].items())


@pytest.mark.parametrize("warm_start", [1, 4])
@pytest.mark.parametrize("optimizer", WATCHING)
def test_cold_and_warm_runs_are_the_same_run(
    run: Any, passes: list[int], folder: Path, optimizer: str, warm_start: int
) -> None:
    cold = run(optimizer=optimizer, warm_start=warm_start)
    assert len(passes) == warm_start + 1  # and one before the third step
    assert len(kept(folder)) == 1
    passes.clear()
    warm = run(optimizer=optimizer, warm_start=warm_start)
    assert len(passes) == 1
    assert same(cold, warm)
    passes.clear()
    without = run(optimizer=optimizer, warm_start=warm_start, cache=False)
    assert len(passes) == warm_start + 1
    assert same(cold, without)
    assert len(kept(folder)) == 1


def test_a_refresh_that_is_no_warm_start_is_not_kept(run: Any, passes: list[int], folder: Path) -> None:
    run(warm_start=0)
    assert len(passes) == 2
    assert not folder.exists()


def test_all_that_an_estimate_depends_on_names_it(run: Any, passes: list[int], folder: Path, retain_set: Any) -> None:
    run()
    others: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"model": 1},
        {"estimator": "gnb"},
        {"warm_start": 3},
        {"batch": 2},
        {"general_text": 1},
        {"retain": retain_set[:4]},
    )
    for i, other in enumerate(others):
        passes.clear()
        run(**other)
        assert len(passes) == other.get("warm_start", 4) + 1
        assert len(kept(folder)) == i + 2
    for source in ("forget", "retain+forget"):  # of what is to be forgotten nothing is kept
        passes.clear()
        run(source=source)
        assert len(passes) == 5
        assert len(kept(folder)) == len(others) + 1


def test_what_an_estimate_does_not_depend_on_does_not(
    run: Any, passes: list[int], folder: Path, retain_set: Any
) -> None:
    """Another rate, another later schedule, another optimizer with a diagonal, another order of the retain set."""
    run()
    for other in ({"lr": 1e-5}, {"interval": 0}, {"settings": {"rho": 0.5}}, {"retain": retain_set[::-1]}):
        passes.clear()
        run(**other)
        assert len(passes) == (0 if "interval" in other else 1)
    assert len(kept(folder)) == 1


def test_the_next_request_starts_warm_where_it_takes_away_what_was_not_picked(
    make_model: Any, passes: list[int]
) -> None:
    rows = [Encoded((2, i, i + 1, 1), 2) for i in range(10, 20)]
    model, spec = make_model(0), CurvatureSpec(batch=2, warm_start=2)
    rule = OPTIMIZERS.get("sophia")().build(model.parameters())
    CurvaturePasses(spec, rows).refresh(model, rule, 0)
    warm = []
    for gone in rows:
        passes.clear()
        CurvaturePasses(spec, [row for row in rows if row != gone]).refresh(model, rule, 0)
        warm.append(not passes)
    assert sum(warm) == len(rows) - 4


def test_rules_that_watch_passes_are_told_apart_by_what_they_keep(run: Any, passes: list[int], folder: Path) -> None:
    run(optimizer="kfac")
    for i, (settings, made) in enumerate((({"damping": 0.3}, 1), ({"others": "diagonal"}, 5))):
        passes.clear()
        run(optimizer="kfac", settings=settings, lr=0.02)
        assert len(passes) == made
        assert len(kept(folder)) == i + 1


def test_a_broken_file_costs_passes_and_not_the_run(
    run: Any, passes: list[int], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cold = run()
    (file,) = kept(folder)
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"nothing of the kind"):
        file.write_bytes(broken)
        passes.clear()
        with caplog.at_level(logging.WARNING, logger="soul"):
            assert same(cold, run())
        assert "cannot read the cached curvature" in caplog.text
        assert len(passes) == 5
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(
    run: Any, passes: list[int], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="soul"):
        run()
    assert "cannot keep the curvature" in caplog.text
    assert len(passes) == 5


def test_files_say_what_they_hold(run: Any, folder: Path, make_model: Any) -> None:
    run(estimator="hutchinson")
    (file,) = kept(folder)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["soul"])["estimator"] == "hutchinson"
        assert set(opened.keys()) == {name for name, _ in make_model(0).named_parameters()}
        assert min(float(opened.get_tensor(name).min()) for name in opened.keys()) < 0  # noqa: SIM118 - not a dict


def test_the_least_recently_used_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP_BYTES", 3000)
    files = [folder / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files[:2]):
        cache.write(file, {"x": torch.zeros(300)}, {})
        os.utime(file, (1000 + i, 1000 + i))
    assert cache.read(files[0], torch.device("cpu")) is not None  # used: now the newer one
    cache.write(files[2], {"x": torch.zeros(300)}, {})
    assert [file.exists() for file in files] == [True, False, True]
    cache.write(files[1], {"x": torch.zeros(3000)}, {})  # larger than all there may be: it is what is wanted now
    assert [file.exists() for file in files] == [False, True, False]


def test_what_is_derived_does_not_put_out_what_it_comes_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP_BYTES", 3000)
    factors, other = folder / "factors.safetensors", folder / "other.safetensors"
    inverses = [cache.beside(factors, f"damping {i}") for i in range(2)]
    for file in (other, factors, *inverses):
        cache.write(file, {"x": torch.zeros(600)}, {})
        os.utime(file, (1000, 1000))
    assert [file.exists() for file in (other, factors, *inverses)] == [False, True, False, True]


def test_fingerprints_know_weights_buffers_names_and_config(make_model: Any) -> None:
    model = make_model(0)
    first = cache.fingerprint(model)
    assert cache.fingerprint(make_model(0)) == first
    assert cache.fingerprint(make_model(0, torch.bfloat16)) != first
    model.config.name_or_path = "elsewhere"
    assert cache.fingerprint(model) == first
    changes = []
    with torch.no_grad():
        for change in (
            lambda m: m.lm_head.weight[3, 4].add_(1e-6),
            lambda m: m.model.rotary_emb.inv_freq[0].mul_(1.5),
            lambda m: m.model.norm.weight.requires_grad_(False),
            lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
            lambda m: m.register_buffer("more", torch.zeros(())),
        ):
            other = make_model(0)
            change(other)
            changes.append(cache.fingerprint(other))
    assert len({first, *changes}) == 6


def test_fingerprints_know_the_scale_of_an_adapter(make_model: Any) -> None:
    """Before training ``B`` is 0 and the model says the same whatever the scale is; the gradient of ``B`` does not."""

    def of(alpha: int) -> str:
        return cache.fingerprint(add_adapter(make_model(0), AdapterSpec(r=2, alpha=alpha)))

    assert of(4) == of(4) != of(8)


def test_a_diagonal_beside_factors_comes_back_with_them(run: Any, passes: list[int]) -> None:
    settings = {"others": "diagonal"}
    cold = run(optimizer="kfac", interval=0, settings=settings)
    passes.clear()
    assert same(cold, run(optimizer="kfac", interval=0, settings=settings))
    assert not passes
    frozen = run(optimizer="kfac", interval=0)
    assert not torch.equal(cold[0]["model.norm.weight"], frozen[0]["model.norm.weight"])


@pytest.mark.parametrize("setting", [{"damping": 0.5}, {"momentum": 0.5}])
def test_factors_serve_whatever_is_done_with_them(run: Any, passes: list[int], setting: Any) -> None:
    run(optimizer="kfac", interval=0)
    passes.clear()
    run(optimizer="kfac", interval=0, settings=setting)
    assert not passes
    run(optimizer="whiten", interval=0, settings={"damping": 0.1})
    assert passes


def test_inverses_are_found_once_for_a_damping(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[float] = []

    def counted(matrix: torch.Tensor, damping: float) -> torch.Tensor:
        found.append(damping)
        return inverse(matrix, damping)

    monkeypatch.setattr(inverses, "inverse", counted)
    cold = run(optimizer="kfac", interval=0)
    each = len(found)
    (file,) = kept(folder, derived=True)
    assert each == len(set(safe_open(file, "pt").keys()))
    warm = run(optimizer="kfac", interval=0)
    assert len(found) == each
    assert same(cold, warm)
    assert same(cold, run(optimizer="kfac", interval=0, cache=False))
    assert len(found) == 2 * each
    run(optimizer="kfac", interval=0, settings={"damping": 0.3})
    assert found[2 * each :] == [0.3] * each
    assert len(kept(folder, derived=True)) == 2
    file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING, logger="soul"):
        assert same(cold, run(optimizer="kfac", interval=0))
    assert "cannot read the cached curvature" in caplog.text
    assert len(found) == 4 * each
    assert same(cold, run(optimizer="kfac", interval=0))
    assert len(found) == 4 * each


def test_a_refresh_makes_kept_inverses_stale(run: Any, folder: Path) -> None:
    cold = run(optimizer="kfac", lr=0.02)
    assert kept(folder, derived=True)
    assert same(cold, run(optimizer="kfac", lr=0.02))
    assert not same(cold, run(optimizer="kfac", lr=0.02, interval=0))  # the refresh before the third step does matter


@pytest.mark.parametrize("optimizer", ["sophia", "kfac"])
def test_shuffled_curvature_is_a_control_and_the_cache_keeps_the_true_one(
    run: Any, passes: list[int], folder: Path, optimizer: str
) -> None:
    true = run(optimizer=optimizer, interval=0)
    (file,) = kept(folder)
    whole = file.read_bytes()
    passes.clear()
    warm = run(optimizer=optimizer, interval=0, shuffled=True)
    assert not passes
    assert file.read_bytes() == whole
    assert len(kept(folder, derived=True)) == (optimizer == "kfac")  # of the true one
    assert not same(true, warm)
    cold = run(optimizer=optimizer, interval=0, shuffled=True, cache=False)
    assert same(cold, warm)


def test_a_diagonal_that_is_no_number_is_refused_and_not_kept(run, folder, monkeypatch) -> None:
    inner = CurvaturePasses.estimate

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = inner(self, *args, **kwargs)
        assert found is not None
        next(iter(found.values())).view(-1)[3] = torch.inf
        return found

    monkeypatch.setattr(CurvaturePasses, "estimate", spoilt)
    with pytest.raises(LostModelError, match="the curvature's diagonal is not finite"):
        run()
    assert not list(folder.glob("*.safetensors"))
