"""Choice of the device, and names of devices and processors."""

import contextlib
import math
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from twoview.errors import UserError, require


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


def require_memory(knobs: str, needed: float, advice: str, device: torch.device | None = None) -> None:
    """Refuse what does not fit, before it is allocated: Linux grants more than there is, and kills the process later.

    Args:
        knobs: knobs with their values that ask for the memory, for the message.
        needed: number of bytes that are about to be allocated.
        advice: what needs less memory.
        device: where the memory is needed; None for the CPU.

    Raises:
        UserError: if ``needed`` exceeds :func:`available_memory`.

    Example:
        >>> require_memory("method.queue_size=65536", 65536 * 528, "choose a smaller one")
    """
    available, needed = available_memory(device or torch.device("cpu")), min(needed, 1e30)  # any integer is a float
    message = f"needs {needed / 1e9:,.1f} GB of memory, but there are {available / 1e9:,.1f} GB"
    require(needed <= available, f"{knobs}: {message}; {advice}")


def size_in_bytes(knob: str, size: float | str) -> float:
    """Parse a size in bytes.

    Args:
        knob: name of the knob that sets the size, for the message.
        size: number of bytes, at least 0, or a text such as "500MB", "2GB" or "1.5GiB".

    Raises:
        UserError: if ``size`` is neither.

    Example:
        >>> size_in_bytes("data.memory", "2GB")
        2000000000.0
    """
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d+)?) ?([KMGT]?)(i?)B?", str(size), re.IGNORECASE)
    if match is None:
        raise UserError(f"{knob}={size}: give a number of bytes, at least 0, or a size such as 2GB")
    return float(match[1]) * float(1024 if match[3] else 1000) ** powers[match[2].upper()]


def available_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Return the number of bytes that this process can have on a device, infinity if it is not known.

    On a CPU, this is the free memory of the machine, or what the container or the cluster job of this process has left
    of its limit if that is less. Memory that only caches files is free.

    Args:
        device: device; for a GPU, its total memory is returned.
        root: folder in which the files of the Linux kernel are read.

    Example:
        >>> available_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    found = _limits_of_groups(root)
    with contextlib.suppress(OSError, ValueError):  # not Linux
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(0.0, min(found, default=math.inf))


def _limits_of_groups(root: Path) -> list[float]:
    """Bytes left in each control group with a limit that this process belongs to, of version 1 or 2."""
    found: list[float] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / path.lstrip("/")  # may be a path outside of this container, whose own group is the top
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # without a limit, the file contains "max"
                allowed, taken = (float((folder / f"memory.{name}").read_text()) for name in (limit, used))
                kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                prefix = "total_" if controllers else ""  # version 1 counts the groups below apart
                cached = sum(int(kinds.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                found.append(allowed - taken + cached)
    return found
