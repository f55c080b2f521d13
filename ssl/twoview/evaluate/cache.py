"""What an evaluation keeps for the next one: features, and all that was measured of baselines."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

log = logging.getLogger(__name__)

Kept = TypeVar("Kept")


def key(*parts: Any) -> str:
    """A hash of everything that a result depends on: modules by their weights, images by their statistics and labels.

    The code of twoview and torch's version are always among it.
    """
    digest = hashlib.blake2b(_code() + torch.__version__.encode(), digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            # Weights alone do not tell two architectures apart.
            digest.update(repr((part, getattr(part, "build_arguments", None))).encode())
            plain = {name: value for name, value in vars(part).items() if isinstance(value, int | float | str)}
            digest.update(repr(sorted(plain.items())).encode())
            for name, value in part.state_dict().items():
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        elif hasattr(part, "moments"):
            digest.update(repr((len(part), part.size)).encode())
            digest.update(part.moments().numpy().tobytes() + part.labels.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


@cache
def _code() -> bytes:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).digest()


def kept(folder: str | None, name: Callable[[], str], make: Callable[[], Kept]) -> Kept:
    """What an earlier evaluation left under a name, or made now and left for the next.

    Args:
        folder: where; None keeps nothing.
        name: gives it, such as by :func:`key`.
        make: gives tensors or plain containers.
    """
    if folder is None:
        return make()
    file = Path(folder).expanduser() / f"{name()}.pt"
    if file.exists():
        try:
            found: Kept = torch.load(file, weights_only=True)
            log.info("%s: computed before", file)
            return found
        except Exception as error:
            log.warning("%s cannot be read (%s); it is computed anew", file, type(error).__name__)
    made, temporary = make(), file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made, temporary)
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        log.warning("eval.cache=%s: nothing can be kept there (%s)", folder, str(error).splitlines()[0])
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return made
