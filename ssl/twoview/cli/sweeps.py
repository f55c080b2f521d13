"""Outcomes of the runs of a sweep, which are stored as files because runs may be on different machines."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from twoview.cli.overrides import quoted, value_of
from twoview.errors import require
from twoview.files import write_atomically, write_csv

# Environment variable with the folder of the outcomes, set in every run of a sweep.
VARIABLE = "TWOVIEW_SWEEP"


def begin(overrides: Sequence[str]) -> Path:
    """Choose the folder of the outcomes, whose name is the current time, and store its path in the environment.

    Args:
        overrides: overrides of the command line; ``hydra.sweep.dir=`` sets the parent folder.

    Returns:
        The absolute path of the folder; :func:`record` creates the folder.
    """
    parent = value_of("hydra.sweep.dir", overrides) or "sweeps"
    folder = Path(parent).resolve() / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    os.environ[VARIABLE] = str(folder)
    return folder


def run_ranks() -> Mapping[str, Any]:
    """Run the current job of a sweep in a subprocess, if the job has several ranks.

    Lightning starts further ranks with the command line of the current process. Inside a sweep, each of these ranks
    would run the whole sweep.

    Returns:
        The content of the job's ``report.json``.

    Raises:
        UserError: if the subprocess failed; the message is that of the subprocess.
        SystemExit: if a signal stopped the subprocess.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    verbosity = [o for o in job.overrides.hydra if "job_logging" in o]
    own_folder = [f"--config-dir={s.path}" for s in job.runtime.config_sources if s.provider == "command-line"][:1]
    arguments = [
        *own_folder,
        *job.overrides.task,
        *verbosity,
        quoted(f"resume.run={folder}"),
        quoted(f"hydra.run.dir={folder}"),
    ]
    process = subprocess.Popen([sys.executable, "-m", "twoview", *arguments], stderr=subprocess.PIPE, text=True)
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        # SIGTERM for both signals: the terminal already sends SIGINT to the ranks, and a second SIGINT kills them.
        process.terminate()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stderr = process.communicate()[1]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(stderr, end="", file=sys.stderr)
    if received or process.returncode in (130, 143):
        raise SystemExit(process.returncode if process.returncode > 0 else 128 + received[0])
    messages = [line.removeprefix("twoview: ") for line in stderr.splitlines() if line.startswith("twoview: ")]
    unexplained = f"its processes ended with exit code {process.returncode}; see {folder}/run.log"
    require(process.returncode == 0, messages[-1] if messages else unexplained)
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def record(
    number: int, overrides: Sequence[str], folder: str, name: str | None, figure: float | None, mistake: str | None
) -> None:
    """Write the outcome of one run to a file; no-op outside of a sweep.

    Args:
        number: index of the run in its sweep.
        overrides: overrides of the run, such as ``seed=1``.
        folder: run folder.
        name: name of the metric that the sweep optimizes, such as ``val/linear_top1``; None if there is none.
        figure: value of the metric; None if there is no value.
        mistake: error message of a failed run; None if the run succeeded.
    """
    if VARIABLE in os.environ:
        content = {"overrides": list(overrides), "folder": folder, "name": name, "figure": figure, "mistake": mistake}
        write_atomically(Path(os.environ[VARIABLE]) / f"{number}.json", json.dumps(content) + "\n")


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read the outcomes of a sweep, and compute mean and standard deviation over seeds.

    Args:
        folder: folder that :func:`record` writes to.

    Returns:
        One mapping per run, in the order of the runs. ``seed`` is the seed as text. ``overrides`` are the other
        overrides that differ between runs. ``folder``, ``name``, ``figure`` and ``mistake`` are the arguments of
        :func:`record`. ``mean`` and the sample standard ``deviation`` are taken over the runs with equal ``overrides``;
        None if there are too few values.
    """
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"), key=lambda file: int(file.stem))]
    for run in runs:
        pairs = (text.lstrip("+").partition("=") for text in run["overrides"])
        run["overrides"] = {key: value for key, _, value in pairs}
        run["seed"] = run["overrides"].pop("seed", "")
    keys = dict.fromkeys(key for run in runs for key in run["overrides"])
    differing = [key for key in keys if len({run["overrides"].get(key) for run in runs}) > 1]
    for run in runs:
        run["overrides"] = {key: run["overrides"].get(key, "") for key in differing}
    for run in runs:
        same = [r["figure"] for r in runs if r["overrides"] == run["overrides"] and r["figure"] is not None]
        run["mean"] = statistics.mean(same) if same else None
        run["deviation"] = statistics.stdev(same) if len(same) > 1 else None
    return runs


def summarize(folder: Path) -> int:
    """Print a table of a sweep, and write ``table.csv``.

    The printed table has one row for all runs that differ only in the seed. The CSV file has one row per run. The error
    messages of failed runs are printed to stderr.

    Args:
        folder: folder of the outcomes.

    Returns:
        Number of failed runs.
    """
    import rich.table  # only needed at the end of a sweep

    runs = outcomes(folder)
    name = next((run["name"] for run in runs if run["name"]), "metric")
    names, figures = [*runs[0]["overrides"], "seed"], [name, "mean", "deviation"]
    keys = ("seed", "figure", "mean", "deviation", "mistake", "folder")
    rows = [[*run["overrides"].values(), *(run[key] for key in keys)] for run in runs]
    write_csv(folder / "table.csv", [[*names, *figures, "mistake", "folder"], *rows])
    columns = [*names, *(rich.table.Column(name, justify="right") for name in figures)]
    table = rich.table.Table(*columns, title=f"{name} of {len(runs)} runs")
    for values in dict.fromkeys(tuple(run["overrides"].values()) for run in runs):
        same = [run for run in runs if tuple(run["overrides"].values()) == values]
        shown = ("failed" if run["mistake"] else _percent(run["figure"]) for run in same)
        spread = (_percent(same[0][key]) for key in ("mean", "deviation"))
        table.add_row(*values, "\n".join(run["seed"] for run in same), "\n".join(shown), *spread)
    rich.print(table)
    print(f"table: {os.path.relpath(folder)}/table.csv")
    failed = [run for run in runs if run["mistake"]]
    for run in failed:
        print(f"twoview: {run['folder']} failed: {run['mistake']}", file=sys.stderr)
    return len(failed)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
