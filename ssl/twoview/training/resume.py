"""Checks before a run is resumed or a finished run is skipped."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from twoview import __version__
from twoview.errors import require
from twoview.files import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """Settings that are stored in every checkpoint and are compared when the run is resumed.

    Args:
        conditions: values by name that change the result of training.
        length: values of ``max_epochs``, ``max_time`` and ``max_steps``, by name.
        identity: hash of all settings, see :class:`twoview.training.RunSettings`.
        knobs: values that determine the weights, see :class:`twoview.training.RunSettings`.
    """

    conditions: Mapping[str, Any] = field(default_factory=dict)
    length: Mapping[str, Any] = field(default_factory=dict)
    identity: str | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs from the conditions that a checkpoint holds, such as "seed was 0, is 1".

        Values that only one of them has are not compared: conditions of another version, or no knobs.
        """
        pairs = [(stored["conditions"], self.conditions), (stored.get("knobs") or {}, self.knobs)]
        return [f"{k} was {was[k]}, is {now[k]}" for was, now in pairs for k in was if k in now and was[k] != now[k]]


def check_resume(
    stopped: Mapping[str, Any], module: nn.Module, conditions: Conditions, run_dir: Path, exact: bool
) -> list[str]:
    """Check that a run can be resumed from a checkpoint.

    Args:
        stopped: content of the checkpoint.
        module: module that will load the state dict of the checkpoint.
        conditions: conditions of the current run.
        run_dir: folder of the run, for messages.
        exact: whether differing conditions raise an error; if False, they are logged as a warning.

    Returns:
        What differs, such as "seed was 0, is 1".

    Raises:
        UserError: if the networks or the optimizer differ, the run is finished or longer than asked for, or conditions
            differ and ``exact`` is set.
    """
    stored = stopped["twoview"]
    mine = {name: list(value.shape) for name, value in module.state_dict().items()}
    equal = mine == {name: list(value.shape) for name, value in stopped["state_dict"].items()}
    message = "the checkpoint holds other networks; give the backbone, head and method of that run"
    require(equal, f"resume={run_dir}: {message}")
    steps = stopped["global_step"]
    ended = steps >= stored["total_steps"] and stored["length"] == conditions.length
    ended = ended and (run_dir / "report.json").exists() and not _report(run_dir).get("incomplete")
    ended = ended and conditions.identity is None
    message = f"this run is finished, after {steps} steps; raise trainer.max_epochs to continue it"
    require(not ended, f"resume={run_dir}: {message}")
    _check_length(stopped, conditions.length, run_dir)
    differ = conditions.differences(stored)
    other = [difference for difference in differ if difference.startswith("optimizer was")]
    require(not other, f"resume={run_dir}: {''.join(other)}: its state does not fit; give the optimizer of that run")
    message = f"the result would differ from that of an uninterrupted run ({'; '.join(differ)})"
    advice = "make them equal, continue anyway with resume.exact=false, or start again with rerun=true"
    require(not (differ and exact), f"resume={run_dir}: {message}; {advice}")
    if differ:
        log.warning("resume: not exact (%s)", "; ".join(differ))
    return differ


def _check_length(stopped: Mapping[str, Any], length: Mapping[str, Any], run_dir: Path) -> None:
    done = {"max_steps": stopped["global_step"], "max_epochs": stopped["epoch"]}
    for knob, number in done.items():
        limit = length.get(knob)
        message = f"this run has done more already ({number} {knob.removeprefix('max_')}); give a larger number"
        require(limit is None or limit >= number, f"trainer.{knob}={limit} resume={run_dir}: {message}")


def finished_report(run_dir: Path, conditions: Conditions) -> dict[str, Any] | None:
    """Read the report of a run folder; None unless identity, data and version of twoview are the same."""
    if conditions.identity is None:
        return None
    report = _report(run_dir)
    versions = report.get("versions")
    version = versions.get("twoview") if isinstance(versions, dict) else None
    found = (report.get("identity"), report.get("data_fingerprint"), version)
    return report if found == (conditions.identity, conditions.conditions["data"], __version__) else None


def check_folder(run_dir: Path, identity: str | None) -> None:
    """Refuse a folder that holds the report of another run, which would be overwritten.

    Args:
        run_dir: folder of a run that is started from the beginning.
        identity: see :class:`twoview.training.RunSettings`; None accepts every folder.

    Raises:
        UserError: naming the folder.
    """
    found = _report(run_dir)
    other = identity is not None and found and found.get("identity") != identity
    advice = "choose another folder, continue that run with resume=, or overwrite it with rerun=true"
    require(not other, f"hydra.run.dir={run_dir}: this folder holds another finished run; {advice}")


def _report(run_dir: Path) -> dict[str, Any]:
    """Content of ``report.json``; empty if there is none that can be read."""
    try:
        return read_json(run_dir / "report.json")
    except (OSError, ValueError):
        return {}
