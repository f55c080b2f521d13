"""Reading files of tensors that may come from anyone: nothing in them is executed, and damage is detected.

Also writing of ``.safetensors`` files, and a hash of tensors.
"""

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from twoview.files import open_regular, write_atomically

ALIGNMENT = 64  # of the first tensor in a file that is mapped into memory, in bytes; that of tensors of torch
# Names of dtypes in the header of a .safetensors file.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}


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


def map_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map the tensors of a ``.safetensors`` file into memory, and read the metadata of its header.

    Tensors are read from the disk as they are used. They stay valid when the file is replaced by a rename.

    Returns:
        Tensors on the CPU by name, and texts by name.

    Raises:
        OSError: the file cannot be read or is not a regular file.
        ValueError: the content is damaged.
    """
    try:
        with open_regular(path), safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a ``.safetensors`` file by :func:`twoview.files.write_atomically`, without a copy of it in memory.

    Args:
        path: path of the file.
        tensors: fp32, fp16, int64, int32 or uint8 tensors by name, each at a multiple of the size of its items.
        metadata: texts by name.

    Raises:
        OSError: if the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(_content(value))

    write_atomically(path, write)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the names, dtypes, shapes and values of tensors, such as a state dict, in the order of their names.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> hash_tensors({"weight": torch.zeros(2)}) == hash_tensors({"weight": torch.zeros(2, 1)})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), list(value.shape))).encode())
        digest.update(_content(value))
    return digest.hexdigest()


def _content(value: torch.Tensor) -> memoryview:
    """Bytes of a tensor, not copied if it is contiguous and on the CPU."""
    array: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


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
