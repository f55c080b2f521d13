"""Choice of the device, and names of devices and processors."""

import platform
import re
from pathlib import Path

import torch


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device; the CPU allocator raises a plain RuntimeError."""
    texts = "out of memory|allocate memory|alloc_failed|not enough memory"
    matched = isinstance(error, RuntimeError | OSError) and re.search(texts, str(error), re.IGNORECASE)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(matched)
