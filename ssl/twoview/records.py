"""What a run leaves to tell how it was made: ``report.json`` with command, commit, versions and machine."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from twoview import __version__

SCHEMA = 2  # of report.json; docs/evaluation.md says what is in it


def begin(task: str, card: Mapping[str, Any], seed: int, run_dir: Path) -> dict[str, Any]:
    """What every report begins with: what was done to what, by which command, commit, versions and machine."""
    return {
        "schema": SCHEMA,
        "task": task,
        "method": card["method"],
        "data": card["data"],
        "backbone": dict(card["backbone"]),
        "seed": seed,
        "run_dir": str(run_dir),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write(report: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Write ``report.json`` whole or not at all, figures that are not finite as null, and return what it holds."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    temporary = run_dir / f"report.json.{os.getpid()}.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(run_dir / "report.json")
    written: dict[str, Any] = json.loads(text)
    return written


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    packages = ("torch", "torchvision", "lightning", "timm", "kornia", "scikit-learn")
    return {"twoview": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def _commit() -> str | None:
    """Commit of the clone this code is in, with a plus where it was changed; None if it is installed."""
    here = Path(__file__).resolve().parent
    if here.parent.name != "ssl":
        return None
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What a device is called in a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_device(accelerator: str = "auto") -> torch.device:
    """The device that an accelerator stands for, "auto", "cpu", "gpu", "cuda" or "mps", where there is one."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
