"""Checkpoints: plain containers and tensors, written whole or not at all, read without executing anything."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from twoview.backbones import create_backbone
from twoview.data import Preprocess
from twoview.errors import UserError

log = logging.getLogger(__name__)

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"  # the one before the last
BEST = "best.ckpt"
PREFIX = "method.backbone."


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, and renames: a killed run leaves the previous checkpoint as it was.

    What was ``last.ckpt`` is kept as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                path.replace(path.with_name(PREVIOUS))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            if isinstance(error, RuntimeError) and not re.search("write|file|iostream", str(error)):
                raise
            raise UserError(
                f"{path} could not be written ({str(error).splitlines()[0]}); what was saved before is as it was: make "
                f"room or mend the folder, and go on with resume={path.parent.parent}"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


class SaveCheckpoints(L.Callback):
    """``last.ckpt`` after every check and at the end of the run, ``best.ckpt`` whenever the score improves.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = float("-inf")

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.best = state_dict["best"]

    def checked(self, trainer: L.Trainer, score: float | None) -> None:
        """Save after a check of the features; a greater score is better, None is no score."""
        if score is not None and score > self.best:
            self.best = score
            self._save(trainer, BEST)
        self.last(trainer)

    def last(self, trainer: L.Trainer) -> None:
        """Save the state of this moment."""
        self._save(trainer, LAST)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the run."""
        self.last(trainer)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        path = self.folder / name
        if not all(weight.isfinite().all() for weight in trainer.lightning_module.parameters()):
            raise UserError(
                f"after step {trainer.global_step} the weights are not finite: training has diverged; lower "
                f"optimizer.lr or set trainer.clip=1; {path} is not written"
                + (f", {self.folder / LAST} is the last good checkpoint" if (self.folder / LAST).exists() else "")
            )
        trainer.save_checkpoint(path)


def newest(run_dir: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run that can be read, as :func:`read_checkpoint` gives it; None if there is none."""
    for name in (LAST, PREVIOUS):
        path = run_dir / "checkpoints" / name
        if path.exists():
            try:
                return read_checkpoint(path)
            except UserError as error:
                log.warning("%s; the one before it is tried", error)
    return None


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """A twoview checkpoint as plain containers and tensors on the CPU.

    Args:
        checkpoint: a run folder, whose last checkpoint is taken, or a file.

    Raises:
        UserError: nothing there, or no checkpoint of twoview.
    """
    path = Path(str(checkpoint)).expanduser()  # a folder of a sweep may be called 0
    if path.is_dir():
        path = next((p for p in (path / "checkpoints" / LAST, path / LAST) if p.exists()), path)
    if not path.is_file():
        raise UserError(f"checkpoint={checkpoint}: there is no checkpoint; give a run folder or one of its .ckpt files")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint={checkpoint}: cannot be read as a checkpoint ({type(error).__name__}); "
            "give a run folder or one of its .ckpt files"
        ) from error
    if not isinstance(content, dict) or "twoview" not in content:
        raise UserError(
            f"checkpoint={checkpoint}: was not written by twoview; load foreign weights with backbone.weights=FILE"
        )
    content["path"] = str(path)
    return content


def rebuild(content: dict[str, Any]) -> tuple[nn.Module, Preprocess]:
    """Backbone and preprocessing of a checkpoint that was read; see :func:`load`."""
    card = content["twoview"]
    backbone, _ = create_backbone(**card["backbone"])
    weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint={content['path']}: its weights do not fit {card['backbone']['name']} as this version of timm "
            f"builds it ({str(error).splitlines()[-1].strip()}); use the timm of the run, {card['versions']['timm']}"
        ) from error
    return backbone.eval(), Preprocess(card["image_size"], card["mean"], card["std"], card["store_size"])


def load(checkpoint: str | Path) -> tuple[nn.Module, Preprocess]:
    """Trained backbone and its preprocessing, for anyone's own code.

    >>> backbone, preprocess = twoview.load("runs/2026-01-31/12-00-00-000000")  # doctest: +SKIP
    >>> features = backbone(preprocess(images))                                 # doctest: +SKIP

    Args:
        checkpoint: a run folder, whose last checkpoint is taken, or a file.

    Returns:
        The backbone ``fp32 [N, C, H, W] -> [N, F]`` in evaluation mode on the CPU, and the preprocessing
        ``uint8 [N, C, H, W]`` or PIL image ``-> fp32 [N, C, image_size, image_size]``.

    Raises:
        UserError: nothing there, or no checkpoint of twoview.
    """
    return rebuild(read_checkpoint(checkpoint))
