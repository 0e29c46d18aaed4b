"""Representation misdirection for unlearning."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from soul.forward import Answers, decoder_blocks, unwrap, wide
from soul.objectives.base import Batch, Objective, Retain, state_distance
from soul.objectives.public import public_states, rows_of, states_of
from soul.reference import Reference
from soul.registry import OBJECTIVES
from soul.types import Term


@OBJECTIVES.register("rmu")
@dataclasses.dataclass(frozen=True)
class RMU(Objective):
    """Steer what a decoder block makes of forget answers to a random vector (RMU, arXiv 2403.03218).

    ``L = mean_i mean_t ||h(t) - c u||^2 + retain_weight * mean_j mean_t ||h(t) - h_ref(t)||^2`` with ``h`` the output
    of block ``layer``, ``u`` a unit vector whose entries were drawn from U[0, 1), means over the tokens of an answer,
    then over sequences. Taken at the positions that predict answer tokens: the prompt's share of a chat template is in
    forget and retain rows alike (a plain text is all answer). As in the paper, blocks ``layer - 2`` to ``layer`` are
    trained. ``compat="wmdp"`` and ``"open-unlearning"`` divide by the width of ``h``; the first averages over all
    positions, padding too, the second looks at answer tokens themselves.

    Attributes:
        steering: ``c``, the length of the vector: several times that of the states of the block.
        adaptive: Where above 0, ``c`` is at each token this many times the length of the reference's own state
            (Adaptive RMU, arXiv 2408.06223, 5 there), in place of ``steering``: one setting for every model and block.
        trained: ``layers`` (``layer - 2`` to ``layer``), or ``all`` for what the loss reaches.
        seed: Seed of the vector.
    """

    retain: Retain = "hidden"
    retain_weight: float = 100.0
    steering: float = 20.0
    adaptive: float = 0.0
    trained: Literal["layers", "all"] = "layers"
    seed: int = 0
    counted_in: ClassVar[Literal["tokens", "rows"]] = "rows"
    codes: ClassVar[tuple[str, ...]] = ("open-unlearning", "wmdp")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steering > 0:
            raise ValueError(f"steering must be above 0, not {self.steering}")
        if not self.adaptive >= 0:
            raise ValueError(f"adaptive must be 0 or more, not {self.adaptive}")
        if self.adaptive and self.compat in self.codes:
            raise ValueError(f"compat {self.compat} knows no adaptive: set it to 0 and choose steering")
        if self.trained not in ("layers", "all"):
            raise ValueError(f"trained must be layers or all, not {self.trained!r}")
        if self.compat == "wmdp" and self.retain == "kl":
            raise ValueError("compat wmdp knows no KL: use retain hidden, nll or none")

    @property
    def looks_inside(self) -> bool:
        """Whether the output of a decoder block is looked at."""
        return True

    @property
    def needs_states(self) -> tuple[str, ...]:
        """Views whose reference states at ``layer`` are needed."""
        if self.compat in self.codes:
            return ()
        return super().needs_states + (("forget",) if self.adaptive else ())

    @property
    def needs_model(self) -> bool:
        """Whether the reference must answer as a model."""
        return (self.compat in self.codes and self.retain == "hidden") or super().needs_model

    def vector(self, width: int) -> torch.Tensor:
        """Return ``c u`` (D,), the same for the same seed."""
        u = torch.rand(width, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return self.steering * u / u.norm()

    def prepare(self, model: nn.Module) -> None:
        """Leave to training the chosen blocks, or all that lies below the output that is steered."""
        block = self.block(model)
        assert block is not None
        blocks = decoder_blocks(model)
        if self.trained == "all" and self.retain in ("nll", "kl"):
            return  # the retain term reaches everything
        first = max(0, block - 2) if self.trained == "layers" else 0
        parts = list(blocks[first : block + 1])
        if self.trained == "all":
            parts += [module for module in model.modules() if isinstance(module, nn.Embedding)]
        kept = {id(p) for part in parts for p in part.parameters()}
        for p in model.parameters():
            if id(p) not in kept:
                p.requires_grad_(False)

    def forget_term(self, answers: Answers, logps_N: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return the squared distance to the vector, mean over an answer's tokens, summed over rows."""
        del reference, logps_N
        assert answers.states_ND is not None
        vector = self.vector(answers.states_ND.shape[-1])
        if self.adaptive:
            lengths = wide(answers.reference_ND["forget"]).norm(dim=-1, keepdim=True).cpu()
            vector = self.adaptive / self.steering * lengths * vector
        return state_distance(answers, vector, "forget")

    def public_terms(self, model: nn.Module, batch: Batch, reference: Reference) -> dict[str, Term]:
        """Return the terms that ``compat`` computes in place of the formula's."""
        terms = super().public_terms(model, batch, reference)
        if self.compat not in self.codes:
            return terms
        layer = self.block(model)
        assert layer is not None
        inner: Any = unwrap(model)
        vector = self.vector(inner.get_input_embeddings().weight.shape[-1])
        terms["forget"] = public_states(self.compat, model, batch, "forget", layer, vector)
        if self.retain == "hidden":
            with reference.asking(model) as before:
                target = states_of(before, rows_of(batch, "retain"), layer)
            terms["retain"] = public_states(self.compat, model, batch, "retain", layer, target)
        return terms

    @property
    def public_counts(self) -> dict[str, int]:
        """Items of :meth:`public_terms`."""
        if self.compat not in self.codes:
            return super().public_counts
        return super().public_counts | {"forget": 1} | ({"retain": 1} if self.retain == "hidden" else {})
