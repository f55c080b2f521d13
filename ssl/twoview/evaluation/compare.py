"""Comparison of finished runs on the same test images, with paired confidence intervals of the differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from twoview.errors import UserError, require
from twoview.evaluation.probe import bootstrap
from twoview.evaluation.settings import MEASURES
from twoview.evaluation.tables import Table, number, percent, side_by_side, with_interval
from twoview.files import read_json
from twoview.torch_files import load_safetensors

FIGURES = {
    "mAP": ("retrieval", "mean_average_precision"),
    "recall@1": ("retrieval", "recall@1"),
    "NMI": ("clustering", "nmi"),
    "effective rank": ("geometry", "effective_rank"),
    "uniformity": ("geometry", "uniformity"),
    "alignment": ("geometry", "alignment"),
    "diagnosis": ("geometry", "diagnosis"),
}


def probe_titles() -> dict[str, str]:
    """Return the row title of each result that is an accuracy, by the name of the result in a report."""
    titles = {name: measure.probe_title for name, measure in MEASURES.items() if measure.probe_title}
    return {**titles, "finetune": "top-1"}


def compare(runs: Sequence[str | Path], seed: int, resamples: int = 2000) -> dict[str, Any]:
    """Compare finished runs.

    Args:
        runs: two or more folders with ``report.json`` and ``predictions.safetensors``, evaluated on the same test
            images.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples of the test images.

    Returns:
        * ``data``, ``backbone`` and ``test_fingerprint`` of the first run;
        * ``runs``: for each run its ``folder``, ``method``, ``backbone``, ``data``, ``seed``, ``commit``, ``results``
          and ``differences``.

        ``differences`` has an entry for each probe that both the run and the first run have: ``difference``, the
        accuracy of the run minus the accuracy of the first run; and ``interval``, the 95 % paired bootstrap interval of
        this difference over the test images.

    Raises:
        UserError: if there are fewer than two runs, a run is not finished, or the test images of two runs differ.
    """
    several = not isinstance(runs, str | Path) and len(runs) > 1
    require(several, f"runs={runs}: give two or more folders of finished runs, such as runs=[A,B]")
    reports = [_read(Path(str(run)).expanduser()) for run in runs]
    first_report, first = reports[0]
    compared = []
    for run, (report, predictions) in zip(runs, reports, strict=True):
        message = f"{run} was evaluated on other test images than {runs[0]}, or at another data.image_size"
        equal = report["test_fingerprint"] == first_report["test_fingerprint"]
        equal = equal and len(predictions["labels"]) == len(first["labels"])
        require(equal, f"runs: {message}; evaluate both on the same ({report['data']}, {first_report['data']})")
        differences = {}
        for probe in predictions.keys() & first.keys() - {"labels"}:
            right, before = (p[probe] == p["labels"] for p in (predictions, first))
            paired = right.double() - before.double()
            interval = bootstrap(paired.numpy(), resamples, seed)
            differences[probe] = {"difference": float(paired.mean()), "interval": interval}
        compared.append(_row(run, report) | {"differences": differences})
    return {**{key: first_report[key] for key in ("data", "backbone", "test_fingerprint")}, "runs": compared}


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return a table of the results of all runs, and a table of their differences from the first run.

    Args:
        comparison: result of :func:`compare`.
    """
    titles = probe_titles()
    columns: dict[str, dict[str, str]] = {}
    differences: dict[str, dict[str, str]] = {}
    for place, run in enumerate(comparison["runs"], 1):
        results = next(iter(run["results"].values()))
        name = f"{place}. {run['method']}"
        columns[name] = cells = {"backbone": run["backbone"]["name"], "seed": str(run["seed"])}
        found = {title: results[probe] for probe, title in titles.items() if probe in results}
        cells |= {title: with_interval(x["test_top1"], x["interval"]) for title, x in found.items()}
        few = results.get("few_labels", {})
        cells |= {f"{size} labels" if size.endswith("%") else size: percent(x["mean"]) for size, x in few.items()}
        cells |= {figure: number(results.get(part, {}).get(key)) for figure, (part, key) in FIGURES.items()}
        if place > 1:
            paired = run["differences"]
            differences[name] = {titles[probe]: _points(paired[probe]) for probe in titles if probe in paired}
    folders = "\n".join(f"{place}. {run['folder']}" for place, run in enumerate(comparison["runs"], 1))
    note = "In brackets 95 % intervals by bootstrap. Effective rank is comparable within one method only, and alignment"
    note += " between evaluations with the same augment only."
    paired_note = "In points of accuracy, with 95 % intervals by paired bootstrap over test images; not over seeds."
    return [
        side_by_side(f"{comparison['data']}: {len(columns)} runs", columns, f"{note}\n{folders}"),
        side_by_side("Differences from the first run", differences, paired_note),
    ]


def _points(found: Mapping[str, Any]) -> str:
    low, high = (f"{100 * x:+.1f}" for x in found["interval"])
    return f"{100 * found['difference']:+.1f} ({low} to {high})"


def _row(run: Path | str, report: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: report[key] for key in ("method", "backbone", "data", "seed", "commit", "results")}
    return {"folder": str(run), **kept, "differences": {}}


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        report = read_json(run / "report.json")
        predictions = load_safetensors(run / "predictions.safetensors")
        labels = predictions["labels"]
        whole = all(p.shape == labels.shape and p.dtype == torch.int64 for p in predictions.values())
        if not whole or labels.ndim != 1 or not len(labels) or "test_fingerprint" not in report:
            raise ValueError("was written by another version")
        comparison_tables({"data": report["data"], "runs": [_row(run, report)]})
    except FileNotFoundError as error:
        message = "no report.json with predictions.safetensors is there; give the folder of a finished run"
        raise UserError(f"runs: {run}: {message}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, SafetensorError) as error:
        message = f"the report in {run} cannot be read ({type(error).__name__}: {error})"
        raise UserError(f"runs: {message}; evaluate it again") from error
    return report, predictions
