"""Devices and processors: which one to compute on, and what they are called."""

import platform
from pathlib import Path

import torch


def pick_device(accelerator: str = "auto") -> torch.device:
    """The device for an accelerator name, "auto", "cpu", "gpu", "cuda" or "mps"; the CPU where there is no other."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Name of a device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_capability(device: torch.device) -> str:
    """Name of a device with the CPU's vector instructions: equal results are only expected where this is equal."""
    if device.type == "cuda":
        return device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
