"""Provenance of a run, and ``report.json``."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twoview.devices import cpu_name
from twoview.encoder import versions
from twoview.files import write_atomically

SCHEMA = 3  # version of report.json, whose keys are described in docs/evaluation.md


def begin(task: str, method: str, backbone: Mapping[str, Any], data: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """Return the entries common to all reports: task, method, data, seed, command, commit, versions and hardware."""
    return {
        "schema": SCHEMA,
        "task": task,
        "method": method,
        "data": data,
        "backbone": dict(backbone),
        "seed": seed,
        "run_dir": str(run_dir),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "commit": _commit(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write(report: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Write ``report.json``, with null for values that are not finite, and return its content."""
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    write_atomically(run_dir / "report.json", text + "\n")
    written: dict[str, Any] = json.loads(text)
    return written


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """Return the commit of the clone that contains this code, with a plus for local changes; None without a clone."""
    here = Path(__file__).resolve().parents[1]
    if here.parent.name != "ssl":
        return None
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
