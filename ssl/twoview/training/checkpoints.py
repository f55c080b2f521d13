"""Atomic writing of checkpoints, and search for the newest readable checkpoint of a run."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from twoview.errors import UserError, continue_with, require
from twoview.files import write_atomically
from twoview.loading import LAST, read_checkpoint

log = logging.getLogger(__name__)

PREVIOUS = "previous.ckpt"  # the checkpoint before the last one
BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and renames an existing ``last.ckpt`` to ``previous.ckpt``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: if the folder cannot be written or the disk is full.
        """
        path = Path(path)
        previous = path.with_name(PREVIOUS) if path.name == LAST else None
        try:
            write_atomically(path, lambda file: torch.save(checkpoint, file), previous)
        except OSError as error:
            message = f"{path} could not be written ({error.strerror}); earlier checkpoints are unchanged"
            advice = f"free disk space or make the folder writable, and {continue_with(path.parent.parent)}"
            raise UserError(f"{message}: {advice}") from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint as :func:`twoview.loading.read_checkpoint` does, whatever Lightning asks for."""
        return read_checkpoint(path)


def newest(run_dir: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run that can be read, as :func:`twoview.loading.read_checkpoint` returns it.

    Returns:
        The checkpoint; None if the run has not written any.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    errors = []
    for path in (run_dir / "checkpoints" / LAST, run_dir / "checkpoints" / PREVIOUS):
        if path.exists():
            try:
                return read_checkpoint(path)
            except UserError as error:
                log.warning("%s; trying the checkpoint before it", error)
                errors.append(str(error))
    require(not errors, f"resume={run_dir}: {'; '.join(errors)}: start again with rerun=true")
    return None
