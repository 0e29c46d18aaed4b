"""Checkpoints that are whole or absent: transformers writes them in place, where a kill leaves half of one."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from soul.stored import PART, check_format, publish, write_json, writing
from soul.types import LostModelError

MANIFEST = "soul_checkpoint.json"
"""Names every file of a checkpoint with its size; written last."""


class WholeCheckpoints(Trainer):
    """A ``transformers.Trainer`` whose checkpoints are written aside and renamed when they are whole and on the disk.

    What is older goes afterwards, so that there is a whole one at any time. Weights that are no numbers any more are
    never saved over good ones.
    """

    _aside: Path | None = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Take no step beyond the last: from a checkpoint of that, within an epoch, transformers takes one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, Path(super()._get_output_dir(trial))
        check_weights(model, step)
        name = f"checkpoint-{step}"
        aside = folder / f"saving-{step}{PART}"  # no name that transformers takes for a checkpoint when it removes some
        with writing(folder / name):
            try:
                if self.args.should_save:
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                self._aside = aside
                super()._save_checkpoint(model, trial)
                self._aside = None
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(aside / name, step)
                    publish(aside / name, folder / name)
            finally:
                self._aside = None
                if self.args.should_save:
                    shutil.rmtree(aside, ignore_errors=True)  # on a full disk this is room, too
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


@torch.no_grad()
def check_weights(model: nn.Module, step: int | None = None) -> None:
    """Make sure that all that training can move is a number.

    Raises:
        LostModelError: It is not.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and not bool(torch.isfinite(p).all()):
            raise LostModelError(
                f"{name} holds values that are no numbers after {f'step {step}' if step else 'training'}: the model is "
                "lost; lower the learning rate or training.max_grad_norm"
            )


def write_manifest(folder: Path, step: int) -> None:
    """Write what a checkpoint consists of."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MANIFEST, {"format": 1, "step": step, "files": files})


def last_checkpoint(folder: Path) -> str | None:
    """Return the whole checkpoint of the latest step, and remove those that are not whole.

    Raises:
        ValueError: A checkpoint was written by a newer version.
    """
    steps: dict[int, Path] = {}
    for place in sorted(folder.glob("checkpoint-*")):
        step = _step(place)
        if step is None:
            shutil.rmtree(place, ignore_errors=True)
        else:
            steps[step] = place
    return str(steps[max(steps)]) if steps else None


def _step(folder: Path) -> int | None:
    """Return the step of a checkpoint; None where it is not whole."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        step = int(state["global_step"])
        if not (folder / MANIFEST).is_file():  # transformers' own, or an earlier version's
            return step if all(_opens(file) for file in folder.iterdir()) else None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    check_format("checkpoint", manifest, folder / MANIFEST)
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())
    return step if whole and manifest.get("step") == step else None


def _opens(file: Path) -> bool:
    """Say whether a file of tensors has its end, where both formats say how long it should be."""
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except (OSError, SafetensorError):
            return False
    return True
