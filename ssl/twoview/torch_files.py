"""Reading files of tensors that may come from anyone: nothing in them is executed, and damage is detected."""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from twoview.files import open_regular


def load_torch(path: str | Path) -> Any:
    """Read a PyTorch file as tensors on the CPU and plain containers.

    Files written since PyTorch 1.6 are ZIP archives, whose checksums are compared with their content.

    Args:
        path: path of the file.

    Raises:
        OSError: the file cannot be read or is not a regular file.
        Exception: the content is damaged, or holds other objects; ``torch.load`` raises many classes.
    """
    with open_regular(path) as file:
        if zipfile.is_zipfile(file):
            _check_archive(file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a ``.safetensors`` file as tensors on the CPU by name.

    Raises:
        OSError: the file cannot be read or is not a regular file.
        safetensors.SafetensorError: the content is damaged.
    """
    with open_regular(path):  # safetensors opens by name, and would wait for a FIFO
        return load_file(path)


def _check_archive(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        # torch.save does not compress; compressed or overlapping records could expand to more than the memory.
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("compressed records")
        if sum(record.file_size for record in archive.infolist()) > file.seek(0, 2):
            raise ValueError("overlapping records")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")
