"""Interleaved timings of several functions, and their table with versions and hardware; used by the benchmarks."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twoview.files import write_atomically
from twoview.reporting import record


def median_seconds(cases: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Call all functions in turn, ``repeats`` times after ``warm_up`` calls, and return the median seconds of each.

    Interleaving spreads a slow phase of the machine over all functions. A call ends when the GPU has finished. A
    function that returns a float has measured its seconds itself, to leave out its preparations.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repeats):
        for name, call in cases.items():
            start = time.perf_counter()
            result = call()
            wait_for_gpu()
            if turn >= warm_up:
                seconds[name].append(result if isinstance(result, float) else time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def wait_for_gpu() -> None:
    """Wait until the GPU has finished all work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates(
    setting: str,
    cases: Mapping[str, Callable[[], Any]],
    items: int,
    repeats: int,
    references: Sequence[str] | None = None,
    warm_up: int = 1,
) -> list[dict[str, Any]]:
    """Time the functions, which process ``items`` each, and return one row for each; prints each row.

    A row has the setting, the name, the items per second, and the ratio to the fastest function among ``references``,
    by default the last function. The ratio is None without a reference.
    """
    medians = median_seconds(cases, repeats, warm_up)
    names = list(medians)[-1:] if references is None else references
    reference = min((medians[name] for name in names), default=None)
    rows = [
        {
            "setting": setting,
            "name": name,
            "per_second": items / value,
            "ratio": None if reference is None else reference / value,
        }
        for name, value in medians.items()
    ]
    for row in rows:
        print(table_row(row), flush=True)
    return rows


def table_row(row: Mapping[str, Any]) -> str:
    """Return a row as a line of a Markdown table."""
    speed, ratio = row["per_second"], row["ratio"]
    shown = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
    return f"| {row['setting']} | {row['name']} | {shown} | {'-' if ratio is None else f'{ratio:.2f}'} |"


def begin(
    title: str,
    unit: str = "",
    extra_packages: Sequence[str] = (),
    reference: str = "the last",
    columns: Sequence[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """Print the head of the table, and return the provenance: command, commit, versions, hardware and ``facts``.

    ``columns`` are by default those of the rows of :func:`rates`.
    """
    from importlib.metadata import PackageNotFoundError, version

    known = record.begin("benchmark", "", {}, "", 0, Path())
    found = {key: known[key] for key in ("command", "commit", "versions", "hardware")}
    for package in extra_packages:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    found |= facts
    print(f"{title}\n", file=sys.stderr)
    print("\n".join(f"* {key}: {value}" for key, value in found.items()))
    columns = columns or ("setting", "implementation", unit, f"ratio to {reference}")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    return found


def save(file: str | None, provenance: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write provenance and rows as JSON, if a file is given."""
    if file is not None:
        write_atomically(Path(file), json.dumps({**provenance, "rows": list(rows)}, indent=2) + "\n")
