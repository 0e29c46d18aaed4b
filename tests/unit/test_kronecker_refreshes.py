"""What Kronecker rules make of refreshes over time, and what they leave to the next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import ChatTemplate
from soul.optim.ekfac import EKFACSpec


@pytest.fixture
def passes(tokenizer: Any, retain_set: Any) -> Callable[..., CurvaturePasses]:
    template = ChatTemplate(tokenizer)
    rows = [template.encode(e, index=i) for i, e in enumerate(retain_set)]
    return lambda spec: CurvaturePasses(spec, rows)


@pytest.mark.parametrize(("batch", "micro_batches"), [(10, 1), (5, 2), (2, 5)])
def test_moments_are_those_of_a_whole_refresh(passes: Any, make_model: Any, batch: int, micro_batches: int) -> None:
    """A rotation keeps the sum of squares, so the moments of a layer sum to the diagonal estimate of its weight."""
    spec = CurvatureSpec(batch=batch, micro_batches=micro_batches, interval=1, cache=False)
    model = make_model()
    rule = EKFACSpec(curvature=spec, decay=0.0).build(model.parameters(), model)
    source = passes(spec)
    source.refresh(model, rule, 0)
    source.refresh(model, rule, 1)
    diagonal = source.estimate(model, rule, source.plan(1))  # the same picks and noise once more
    assert diagonal is not None
    for name, layer in rule.factors.layers.items():
        total = float(rule.preconditioner.moments[name].sum())  # type: ignore[union-attr]
        assert total == pytest.approx(float(diagonal[layer.weight].sum()), rel=1e-4)
