"""Choice of the device, and names of devices and processors."""

import contextlib
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from twoview.errors import UserError


def pick_device(accelerator: str = "auto") -> torch.device:
    """Return the device of an accelerator, or the CPU if the accelerator is not available.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return the name of a device for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_capability(device: torch.device) -> str:
    """Return the name of a device; for a CPU, include its vector instructions.

    Identical results are expected only on devices for which this function returns the same name.
    """
    if device.type == "cuda":
        return device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def cpu_name() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_error(error: BaseException, message: str) -> UserError | None:
    """Describe running out of memory, on any device; the CPU allocator of torch raises a plain RuntimeError.

    Args:
        error: an exception.
        message: what ran out of memory, and which knobs need less; the size that was asked for is added.

    Returns:
        The sentence; None for any other exception.
    """
    texts = "out of memory|allocate memory|alloc_failed|not enough memory"
    matched = isinstance(error, RuntimeError | OSError) and re.search(texts, str(error), re.IGNORECASE)
    if not matched and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    if found is None:
        return UserError(message)
    size, unit = (float(found[1]) / 1e9, "GB") if found[2] == "bytes" else (float(found[1]), found[2])
    return UserError(f"{message} (a tensor of {size:.3g} {unit} was asked for)")


@contextlib.contextmanager
def explained_memory(message: str) -> Iterator[None]:
    """Context manager and decorator that raises :func:`memory_error` in place of what it describes."""
    try:
        yield
    except Exception as error:
        explained = memory_error(error, message)
        if explained is None:
            raise
        raise explained from error


def memory_size(device: torch.device) -> float:
    """Return the total memory of a device in bytes, infinity if it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    sizes = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not Linux, or no limit of a container
        sizes.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
        sizes.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=math.inf)
