"""What became of the runs of a sweep, in files, as runs may be other processes on other machines; and their table."""

import csv
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Names the folder of the outcomes in the environment of every run of a sweep.
VARIABLE = "TWOVIEW_SWEEP"


def record(
    number: int, overrides: Sequence[str], folder: str, name: str, figure: float | None, mistake: str | None
) -> None:
    """Write what became of one run; nothing outside of a sweep.

    Args:
        number: of the run in its sweep.
        overrides: as on a command line, such as ``seed=1``.
        folder: of the run.
        name: of the figure that the sweep selects by, such as ``val/linear_top1``.
        figure: its value, None if there is none.
        mistake: why the run failed, None if it did not.
    """
    if VARIABLE in os.environ:
        outcomes = Path(os.environ[VARIABLE])
        outcomes.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"overrides": list(overrides), "folder": folder, "name": name}
        content |= {"figure": figure, "mistake": mistake}
        (outcomes / f"{number}.json").write_text(json.dumps(content) + "\n")


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Every run of a sweep in its order, with the overrides that differ, and mean and deviation over seeds.

    Args:
        folder: of the outcomes.

    Returns:
        A mapping a run: ``overrides`` (without the seed) and ``seed`` as text, ``folder``, ``name`` and ``figure``,
        ``mistake``, and over the runs that differ in their seed alone ``mean`` and sample ``deviation``, None where
        there are too few.
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
    """Print one table, a row for the runs that differ in their seed alone; write ``table.csv``, a row a run.

    Args:
        folder: of the outcomes.

    Returns:
        How many runs failed; each is said on the standard error output.
    """
    import rich  # only at the end of a sweep
    from rich.table import Table

    runs = outcomes(folder)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*runs[0]["overrides"], "seed", runs[0]["name"], "mean", "deviation", "mistake", "folder"])
        for run in runs:
            rest = (run[key] for key in ("seed", "figure", "mean", "deviation", "mistake", "folder"))
            writer.writerow([*run["overrides"].values(), *rest])
    table = Table(title=f"{runs[0]['name']} of {len(runs)} runs")
    for name in (*runs[0]["overrides"], "seed"):
        table.add_column(name)
    for name in (runs[0]["name"], "mean", "deviation"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run["overrides"].values()), []).append(run)
    for values, same in groups.items():
        figures = ("failed" if run["mistake"] else _percent(run["figure"]) for run in same)
        spread = (_percent(same[0][key]) for key in ("mean", "deviation"))
        table.add_row(*values, "\n".join(run["seed"] for run in same), "\n".join(figures), *spread)
    rich.print(table)
    print(f"table: {os.path.relpath(folder)}/table.csv")
    failed = [run for run in runs if run["mistake"]]
    for run in failed:
        print(f"twoview: {run['folder']} failed: {run['mistake']}", file=sys.stderr)
    return len(failed)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
