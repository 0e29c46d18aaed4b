"""Sophia in a plain PyTorch loop: which letter comes next, in the English prose that comes with soul.

python examples/sophia_in_a_plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from soul.curvature.estimators import backward_curvature
from soul.data.general import general_text
from soul.optim import Sophia


def main(steps: int = 300, batch: int = 256) -> dict[str, float]:
    """Train on nine tenths of the text; return the loss on the last tenth (nats a letter) and the last win rate."""
    text = " ".join(passage.answer for passage in general_text())
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    windows = torch.tensor([letters[letter] for letter in text]).unfold(0, 9, 1)  # eight letters and the next one
    train, test = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]
    torch.manual_seed(0)
    layers = [
        nn.Embedding(len(letters), 16),
        nn.Flatten(),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, len(letters)),
    ]
    model, noise = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    weights = torch.full((batch,), 1 / batch)  # of each letter in the mean loss

    optimizer = Sophia(model.parameters(), lr=1e-3, win_rate=0.3)
    for step in range(steps):
        rows = train[torch.randint(len(train), (batch,), generator=noise)]
        if step % 10 == 0:  # the curvature changes slowly: one step in ten pays for a second backward pass
            backward_curvature(model(rows[:, :-1]), weights, "ggn", noise)
            optimizer.update_curvature()
            optimizer.zero_grad()
        cross_entropy(model(rows[:, :-1]), rows[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        loss = cross_entropy(model(test[:, :-1]), test[:, -1]).item()
    shares = torch.bincount(train[:, -1], minlength=len(letters)) / len(train)
    guess = cross_entropy((shares + 1e-4).log().expand(len(test), -1), test[:, -1]).item()
    return {"loss": loss, "loss of letter frequencies": guess, "win rate": optimizer.metrics()["win_rate"]}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3f}")
