"""What a run is given: its data loaded and searched, what stands in for what is missing, and what it is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from soul.anchors import StandIn, stand_in
from soul.data.general import refusals as builtin_refusals
from soul.data.sources import check_disjoint, is_hub_id, load_examples
from soul.origins import Origins, of_items, of_model, read_origins
from soul.overlaps import Overlaps, find_overlaps, without_overlaps
from soul.recipe import DataSpec, Recipe, read_recipe
from soul.rundir import holds_results
from soul.strict import read_text
from soul.types import Example

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
ANCHORS = "anchors.json"
"""The file of a run that holds the samples its model is anchored by."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The data of a run, loaded."""

    forget: list[Example]
    retain: list[Example]
    refusals: list[str]
    curvature: list[Example] = dataclasses.field(default_factory=list)
    overlaps: Overlaps = dataclasses.field(default_factory=Overlaps)
    dropped: frozenset[tuple[str, str]] = frozenset()
    stand_in: StandIn | None = None


def _silent(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


def load_request(data: DataSpec) -> Request:
    """Load what to forget and what to keep.

    Raises:
        ValueError: A source cannot be read, is empty, or the same item is to be forgotten and kept.
    """
    sets = {name: [e for source in found for e in load_examples(source)] for name, found in _sources(data).items()}
    forget, retain, curvature = (sets[name] for name in ("forget", "retain", "curvature"))
    if data.overlap != "drop":
        check_disjoint(forget, retain)
    check_disjoint(forget, curvature, ("forget", "curvature"))
    return Request(forget, retain, read_refusals(data.refusals), curvature)


def _sources(data: DataSpec) -> dict[str, list[str]]:
    return {"forget": data.forget_sources, "retain": data.retain_sources, "curvature": data.curvature_sources}


def _is_on_hub(source: str) -> bool:
    place = source.partition(",")[0]  # after it come split=, config=, limit= and revision=
    return is_hub_id(place) and not Path(place).expanduser().exists()


def origins_of(recipe: Recipe, out: Path, request: Request | None = None, commit: str = "") -> Origins:
    """Return what a run is made of: of what is local where nothing is loaded, so that a finished run needs no hub.

    Args:
        recipe: What is done.
        out: The run's folder, whose digests of files that did not change are taken over.
        request: The data as loaded, before anything is dropped of it.
        commit: The hub's commit of the model as loaded.
    """
    data: dict[str, dict[str, Any]] = {}
    for name, found in _sources(recipe.data).items():
        if request is not None:
            data[name] = of_items(getattr(request, name))
        elif not any(_is_on_hub(source) for source in found):
            with contextlib.suppress(ValueError):  # a finished run does not need its data any more
                data[name] = of_items([e for source in found for e in load_examples(source)])
    if recipe.data.refusals:
        with contextlib.suppress(ValueError):
            data["refusals"] = of_items(read_refusals(recipe.data.refusals))
    return Origins(data, of_model(recipe.model.path, read_origins(out)), commit)


def check_origins(recipe: Recipe, out: Path, origins: Origins) -> None:
    """Make sure that a run which goes on is made of what it was.

    One that has no results yet begins anew, and samples of another model than now are of no use to it.

    Raises:
        ValueError: Data or model have changed since it began.
    """
    sources = {name: " and ".join(found) for name, found in _sources(recipe.data).items()}
    sources |= {"refusals": recipe.data.refusals, "model": recipe.model.path}
    if holds_results(out):
        origins.check(out, sources)
    elif (out / ANCHORS).is_file():
        try:
            Origins(model=origins.model, commit=origins.commit).check(out, sources)
        except ValueError:
            (out / ANCHORS).unlink()


def ancestors(path: str) -> Iterator[tuple[Path, Recipe]]:
    """Yield the run that a model came out of, the run that its model came out of, and so on."""
    for _ in range(64):  # a loop of links has no end
        local = Path(path).expanduser()
        run = local.parent if local.name == "model" else local
        if not (run / "recipe.yaml").is_file():
            return
        recipe = read_recipe(run / "recipe.yaml")
        yield run, recipe
        path = recipe.model.path


def keep_forgotten(request: Request, recipe: Recipe) -> Request:
    """Make sure that the retain set holds nothing which earlier runs on this model forgot: it would be taught back.

    Looked for are the same items, as far as the earlier runs' data are still there; a warning says where they are not.
    ``data.overlap`` says what is done: ``drop`` leaves them out, and ``ignore`` does not look.

    Raises:
        ValueError: Some were found.
    """
    if not request.forget or recipe.data.overlap == "ignore":
        return request
    for run, gone in _forgotten_before(recipe.model.path):
        kept = [e for e in request.retain if (e.history, e.prompt, e.answer) not in gone]
        lost = len(request.retain) - len(kept)
        if lost and (recipe.data.overlap != "drop" or not kept):
            raise ValueError(
                f"{lost} of {len(request.retain)} retain items are what {run} forgot, and would be taught back: remove "
                "them from the retain set, or set data.overlap=drop (leave them out) or data.overlap=ignore"
            )
        dropped = {(e.prompt, e.answer) for e in request.retain} - {(e.prompt, e.answer) for e in kept}
        request = dataclasses.replace(request, retain=kept, dropped=request.dropped | dropped)
    return request


def _forgotten_before(path: str) -> list[tuple[Path, set[tuple[Any, ...]]]]:
    """Return what each run that a model came out of forgot; a warning says where that cannot be known any more."""
    found = []
    try:
        for run, recipe in ancestors(path):
            examples = [e for source in recipe.data.forget_sources for e in load_examples(source)]
            found.append((run, {(e.history, e.prompt, e.answer) for e in examples}))
    except ValueError as error:
        log.warning("whether the retain set teaches back what earlier runs forgot was not looked at: %s", error)
    return found


def search(request: Request, data: DataSpec, tick: Progress = _silent) -> Request:
    """Look for what is to be forgotten in what is to be kept, show it, and do what ``data.overlap`` says.

    Raises:
        ValueError: Something was found and is to be refused, or dropping it leaves nothing.
    """
    found = find_overlaps(
        request.forget,
        request.retain,
        data.overlap,
        copied=data.copied,
        alike=data.alike,
        encoder=data.encoder,
        progress=tick,
    )
    kept = without_overlaps(request.retain, found)
    dropped = {(e.prompt, e.answer) for e in request.retain} - {(e.prompt, e.answer) for e in kept}
    return dataclasses.replace(request, retain=kept, overlaps=found, dropped=request.dropped | dropped)


def anchor(
    request: Request, recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, out: Path, tick: Progress
) -> Request:
    """Let the model's own samples and everyday requests stand in for a retain set that is needed and not given."""
    if not recipe.needs_anchors:
        return request
    found = stand_in(
        model,
        tokenizer,
        request.forget,
        recipe.data.anchors,
        recipe.data.samples,
        seed=recipe.training.seed,
        max_length=recipe.training.max_length,
        file=out / ANCHORS,
        of=recipe.model.path,
        progress=tick,
    )
    return dataclasses.replace(request, retain=found.examples, stand_in=found)


def read_refusals(path: str) -> list[str]:
    """Return the phrasings in a text file, one a line, or the built-in ones."""
    if not path:
        return builtin_refusals()
    if not Path(path).is_file():
        raise ValueError(f"no such file of refusals: {path}")
    lines = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no refusals: write one a line")
    return lines
