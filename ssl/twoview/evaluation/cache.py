"""Cache of results in files, for repeated evaluations."""

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from twoview.files import remove_left_over, write_atomically
from twoview.torch_files import load_torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def key(*parts: Any) -> str:
    """Hash everything that a result depends on, including the code of twoview and the version of torch.

    Args:
        parts: objects that the result depends on. Modules are hashed by their weights and architecture, images by their
            statistics and labels, and all other objects by their ``repr``.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(_code() + torch.__version__.encode(), digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            # Weights alone do not identify the architecture.
            digest.update(repr((part, getattr(part, "build_arguments", None))).encode())
            plain = {name: value for name, value in vars(part).items() if isinstance(value, int | float | str)}
            digest.update(repr(sorted(plain.items())).encode())
            for name, value in part.state_dict().items():
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        elif hasattr(part, "statistics"):
            digest.update(repr((len(part), part.size)).encode())
            digest.update(part.statistics().numpy().tobytes() + part.labels.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


@cache
def _code() -> bytes:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).digest()


def cached(
    folder: str | None, name: Callable[[], str], compute: Callable[[], Result], fits: Callable[[Any], bool]
) -> Result:
    """Load the result that is stored under a name; if there is none, compute and store it.

    Args:
        folder: folder of the stored results; None to compute without storing.
        name: function that returns the name, such as :func:`key`; not called if ``folder`` is None.
        compute: function that returns the result, which consists of tensors, plain containers and plain values.
        fits: whether a stored object has the form of a result; it is computed again otherwise.

    Returns:
        The result.
    """
    if folder is None:
        return compute()
    file = Path(folder).expanduser() / f"{name()}.pt"
    if file.exists():
        try:
            found: Result = load_torch(file)
            if not fits(found):
                raise ValueError("another form")
            log.info("%s: taken from the cache", file)
            return found
        except Exception as error:
            log.warning("%s cannot be read (%s); computing it again", file, type(error).__name__)
    result = compute()
    remove_left_over(file.parent, seconds=3600)  # of killed evaluations; others may be at work
    try:
        write_atomically(file, lambda handle: torch.save(result, handle))
    except OSError as error:
        log.warning("eval.cache=%s: cannot be written (%s)", folder, error.strerror)
    return result
