"""Relearning: a few steps on a few of the forgotten examples, and what of the others comes back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from soul.attacks.base import Attack
from soul.data.batches import UnlearnDataset, collate_rows
from soul.forward import forward_answers
from soul.registry import ATTACKS


@ATTACKS.register("relearn")
@dataclasses.dataclass(frozen=True)
class Relearn(Attack):
    """Fine-tune on a share of the forget set (arXiv 2406.13356).

    AdamW without weight decay at a constant rate, whole share in each step; weights of 16 bits have fp32 copies that
    are stepped, since they could not follow small steps themselves. Judge by the examples that the attacker did not
    have (:meth:`known`): the others are learned anew. Whether the attack was one, they say: where the attacker's own
    are not learned, nothing is known of the rest. Ten steps at 1e-5 are mild; ``until`` makes it go on.

    Attributes:
        share: Share of the forget set that the attacker has; at least one example.
        steps: Steps, at most.
        lr: Learning rate.
        until: Mean NLL a token of the attacker's own examples at which it rests; 0 takes all steps.
        seed: Seed of the choice, and of dropout where the model has any.

    Raises:
        ValueError: A setting is out of range.
    """

    share: float = 0.1
    steps: int = 10
    lr: float = 1e-5
    until: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"relearn.share must be above 0 and at most 1, not {self.share}")
        if self.steps < 1 or not self.lr > 0:
            raise ValueError("relearn.steps must be 1 or more and relearn.lr above 0")
        if not self.until >= 0:
            raise ValueError(f"relearn.until must be a mean NLL from 0, not {self.until}")

    def known(self, count: int) -> list[int]:
        """Return which of ``count`` forget examples the attacker has."""
        order = np.random.default_rng([self.seed, 5]).permutation(count)
        return sorted(order[: max(1, round(self.share * count))].tolist())

    def __call__(self, model: Any, data: UnlearnDataset) -> Any:
        """Return the model, trained in place."""
        rows = data.encoded["forget"]
        device = next(model.parameters()).device
        batch = collate_rows([rows[i] for i in self.known(len(rows))], pad_id=data.template.pad)
        batch = {k: v.to(device) for k, v in batch.items()}
        was_training, free = model.training, [p for p in model.parameters() if p.requires_grad]
        for p in model.parameters():
            p.requires_grad_(True)
        halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        exact = [p.detach().float() for p in halves]
        stepped = [*(p for p in model.parameters() if p.dtype not in (torch.bfloat16, torch.float16)), *exact]
        optimizer = torch.optim.AdamW(stepped, lr=self.lr, weight_decay=0.0)
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for _ in range(self.steps):
                loss = -forward_answers(model, batch).token_logps().mean()
                if float(loss.detach()) <= self.until:
                    break
                loss.backward()
                for p, copy in zip(halves, exact, strict=True):
                    copy.grad = None if p.grad is None else p.grad.float()
                optimizer.step()
                with torch.no_grad():
                    for p, copy in zip(halves, exact, strict=True):
                        p.copy_(copy)
                model.zero_grad()
        model.train(was_training)
        kept = {id(p) for p in free}
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
        return model
