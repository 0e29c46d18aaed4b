"""Who takes part in a contest: update rules and methods, with what is tuned of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from soul import config
from soul.methods.base import Method
from soul.optim.base import OptimizerSpec
from soul.registry import METHODS, OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class Knob:
    """The one further setting of an update rule that is tuned, beside learning rate and retain weight.

    Attributes:
        setting: Its name, e.g. ``damping``; ``betas.1`` is the second of two.
        low: Smallest value.
        high: Largest value.
        scale: ``log`` spaces trials evenly in the logarithm; ``complement`` in that of one minus the value, for decays.
    """

    setting: str
    low: float
    high: float
    scale: Literal["log", "linear", "complement"] = "log"

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.scale == "log" and self.low <= 0):
            raise ValueError(f"knob {self.setting}: low must be below high (and above 0 where scale is log)")
        if self.scale == "complement" and not self.high < 1:
            raise ValueError(f"knob {self.setting}: high must be below 1 where scale is complement")

    def at(self, share: float) -> float:
        """Return the value at ``share`` of the way, in [0, 1].

        Example:
            >>> Knob("damping", 0.01, 1.0).at(0.5)
            0.1
        """
        if self.scale == "linear":
            return self.low + share * (self.high - self.low)
        if self.scale == "complement":
            return 1 - float((1 - self.low) ** (1 - share) * (1 - self.high) ** share)
        return float(self.low ** (1 - share) * self.high**share)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Who takes part: an update rule, or a method in place of objective and optimizer.

    Attributes:
        optimizer: Name and fixed settings as in a recipe, which stand in the entry itself; empty for a method.
        method: Likewise; its knob is all that is tuned, and its objective is only the square it stands in.
        label: What tables call it; the optimizer's or method's name by default.
        order: ``first`` or ``second``: whose side it is on.
        objectives: Those it takes part under, by what tables call them; all where empty.
        points: Its trials, where they are fewer than ``budget.points``: the first of the same sequence; 0 for all.
        settings: Of its trials, how many go on, where they are fewer than ``budget.settings``; 0 for as many.
        steps: Its steps, where they are fewer than the others' (the same seconds for a rule whose steps take longer); 0
            for as many.
        match: What its pilot matches to the others': the root mean square change of a weight in a ``step`` or, where it
            has steps of its own, in a whole ``run``: its range of rates is as much higher as its steps are fewer.
        knob: What is tuned beside learning rate and retain weight; None tunes these alone.
        projected: Take the retain direction out of the forget gradient (``training.combine: projected``; a control).
        extra_retain: Give it the curvature's examples as retain examples too (a control: they share the places of
            the others in its batches).
        extra_batches: Give it, beside its retain examples, as many in each batch of what Kronecker curvature is made
            of: the curvature's examples and the built-in passages (a control: the same data, no curvature).
        reseed: Added to the contest's seed: the same data in another order (a control: how large noise is).
    """

    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    order: Literal["first", "second"] = "first"
    objectives: list[str] = dataclasses.field(default_factory=list)
    points: int = 0
    settings: int = 0
    steps: int = 0
    match: Literal["step", "run"] = "step"
    knob: Knob | None = None
    projected: bool = False
    extra_retain: bool = False
    extra_batches: bool = False
    reseed: int = 0

    def __post_init__(self) -> None:
        if bool(self.optimizer) == bool(self.method):
            raise ValueError(f"{self.label or 'an entry'}: name an optimizer, or a method: one of the two")
        if self.method and (self.steps or self.match != "step"):
            raise ValueError(f"{self.name}: steps and match are an optimizer's; a method has settings of its own")
        if self.method and self.knob is None:
            raise ValueError(f"{self.name}: a method needs a knob, which is all that is tuned of it")
        if self.extra_batches and (self.method or self.extra_retain):
            raise ValueError(f"{self.name}: extra_batches is for optimizers, and without extra_retain")

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.label or str((self.optimizer or self.method)["name"])

    def do(self, settings: Mapping[str, float]) -> Method:
        """Return the method with the knob filled in."""
        assert self.knob is not None
        return config.component(METHODS, {**self.method, self.knob.setting: settings["knob"]}, "")

    def spec(self, settings: Mapping[str, float]) -> OptimizerSpec:
        """Return the update rule with the tuned settings filled in (see :meth:`Matrix.settings`)."""
        tree = dict(self.optimizer)
        if "lr" in settings:
            tree["lr"] = settings["lr"]
        if self.knob is not None and "knob" in settings:
            name, _, part = self.knob.setting.partition(".")
            if part:
                found = tree.get(name) or getattr(OPTIMIZERS.get(str(tree["name"])), name, None)
                whole = list(found) if isinstance(found, (list, tuple)) else []
                if not part.isdecimal() or int(part) >= len(whole):
                    raise ValueError(f"knob {self.knob.setting!r:.60}: {tree['name']} has no such setting; try betas.1")
                whole[int(part)] = settings["knob"]
                tree[name] = whole
            else:
                tree[name] = settings["knob"]
        return config.component(OPTIMIZERS, tree, "")


def named(item: Any, where: str) -> dict[str, Any]:
    """Return what a name alone, or a mapping with a name, stands for.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(item, str):
        return {"name": item}
    if not isinstance(item, Mapping) or "name" not in item:
        raise ValueError(f"{where}: each is a name, or a mapping with a name, not {item!r}")
    return dict(item)


def entry_from(item: Any, index: int) -> Entry:
    """Return the entry that an item of a matrix's ``optimizers`` stands for.

    Raises:
        ValueError: It has an unknown or a wrong setting.
    """
    is_method = isinstance(item, Mapping) and bool(item.get("method"))
    tree = dict(item) if is_method else named(item, "optimizers")
    names = [f.name for f in dataclasses.fields(Entry) if f.name != "optimizer"]
    own: dict[str, Any] = {k: tree.pop(k) for k in names if k in tree}
    if is_method:
        own["method"] = named(own["method"], "optimizers")
    if own.get("knob") is not None:
        own["knob"] = config.parse(Knob, own["knob"], f"optimizers[{index}].knob")
    return config.parse(Entry, {"optimizer": tree, **own}, f"optimizers[{index}]")
