"""What every method keeps to, driven by the registry."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from soul import config
from soul.curvature.products import loss_gradient, micro_batches
from soul.data.batches import VIEWS, UnlearnDataset
from soul.data.templates import ChatTemplate
from soul.methods.base import Method
from soul.registry import METHODS

NAMES = METHODS.names()


@pytest.fixture
def data(make_tokenizer, forget_set, retain_set, refusals):
    def of(method: Method, seed: int = 0) -> UnlearnDataset:
        return UnlearnDataset(ChatTemplate(make_tokenizer()), forget_set, retain_set, method.views, refusals, seed)

    return of


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model, tokenizer):
    """A model that has learned nothing, for a method that begins from one."""
    folder = tmp_path_factory.mktemp("base")
    make_model(2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def built(base):
    def of(name: str) -> Method:
        cls = METHODS.get(name)
        return cls(**{f.name: base for f in dataclasses.fields(cls) if f.name == "base"})

    return of


@pytest.fixture(scope="module")
def taught(make_model, tokenizer, forget_set, retain_set):
    """The weights of a model that has learned both sets, so that there is something to forget."""
    template, model = ChatTemplate(tokenizer), make_model(1)
    rows = micro_batches([template.encode(e) for e in [*forget_set, *retain_set]], template.pad)
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        gradient = loss_gradient(model, rows)[1]
        for key, p in model.named_parameters():
            p.grad = gradient[key]
        adam.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def make(make_model, taught):
    def again() -> Any:
        model = make_model(1)
        model.load_state_dict(taught)
        return model

    return again


@pytest.mark.parametrize("name", NAMES)
def test_is_a_frozen_dataclass_that_a_recipe_can_name(name):
    cls = METHODS.get(name)
    assert issubclass(cls, Method)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert set(cls.views) <= set(VIEWS)
    method = config.component(METHODS, name, "")
    assert config.component(METHODS, config.plain(method), "") == method
    documented = inspect.getdoc(cls) or ""
    assert all(f"    {f.name}:" in documented for f in dataclasses.fields(cls))


@pytest.mark.parametrize("name", NAMES)
def test_gives_a_usable_model_and_says_what_it_did(name, make, data, built):
    method = built(name)
    model, records, seen = make(), [], []
    dataset = data(method)
    before = dataset.template.tokenizer.chat_template
    result = method(model, dataset, progress=lambda *args: seen.append(args), log=records.append)
    assert records
    assert all({"step", "seconds"} <= set(record) for record in records)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert all(isinstance(value, (int, float)) for record in records for value in record.values())
    assert seen
    assert all(0 <= done <= of for _, done, of in seen)
    parameters: list[Any] = list(result.parameters())
    assert all(torch.isfinite(p).all() and p.requires_grad and p.grad is None for p in parameters)
    start = make().state_dict()
    moved = any(not torch.equal(value, start[key]) for key, value in result.state_dict().items())
    assert moved == method.changes_weights
    assert (dataset.template.tokenizer.chat_template != before) == (not method.changes_weights)
    assert all(isinstance(line, str) for line in method.warnings())
    assert not result.training  # as it was given


@pytest.mark.parametrize("name", NAMES)
def test_is_a_function_of_its_seed(name, make, data, built):
    method = built(name)
    results = []
    for i in range(2):
        torch.manual_seed(i)  # what went on before must not matter
        results.append(method(make(), data(method, 5)).state_dict())
    assert all(torch.equal(results[1][key], value) for key, value in results[0].items())
