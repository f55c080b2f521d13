"""``drift.html``: what has changed between two sets of embeddings, in one self-contained file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twoview.data import whole
from twoview.evaluation.tables import Table, figures_table, percent, with_interval
from twoview.files import write_atomically
from twoview.reporting import figures
from twoview.reporting.duplicates import THUMBNAIL, Shown, shown
from twoview.reporting.pages import MAPPED, environment

Report = Mapping[str, Any]
TITLES = {"mmd": "squared MMD", "classifier": "AUC of the classifier", "clusters": "chi-square of the clusters"}
LISTS = {
    "current": "Current images least like the reference",
    "reference": "Images of the reference that have become rare",
}


def write_page(report: Report, vectors: tuple[np.ndarray, np.ndarray], folder: Path) -> Path:
    """Write ``drift.html``.

    Args:
        report: content of ``drift.json``.
        vectors: the compared vectors of the reference and of the current images, float64 ``[n, D]`` each.
        folder: target folder.

    Returns:
        Path of the page.
    """
    content = {
        "title": "Drift" if report["drift"] else "No drift found",
        "summary": _summary(report),
        "tables": [_decision(report), _clusters(report), _sets(report)],
        "map": _map(vectors, report["seed"]),
        "lists": [(LISTS[name], [_shown(image) for image in images]) for name, images in report["changed"].items()],
    }
    path = folder / "drift.html"
    write_atomically(path, environment().get_template("drift.html.j2").render(content))
    return path


def _summary(report: Report) -> list[str]:
    sets, lines = report["sets"], []
    for name, file in zip(("reference", "current"), report["files"], strict=True):
        found = sets[name]
        lines.append(f"{name}: {file or 'array'}, {found['images']:,} images, {found['compared']:,} of them compared.")
    if alarms := report["false_alarms"]:
        rate = with_interval(alarms["alarms"] / alarms["splits"], alarms["interval"])
        lines.append(
            f"False alarms on random splits of the reference into halves of {alarms['images']:,} images:"
            f" {alarms['alarms']} of {alarms['splits']}, {rate}. This checks the tests for independent images; it says"
            " nothing of images that depend on each other, such as frames of one video."
        )
    if not report["drift"]:
        lines.append("The differences that are listed below may be due to chance.")
    return lines


def _decision(report: Report) -> Table:
    names = ["test", "statistic", "p", "p, adjusted for three tests"]
    rows = [
        [TITLES[name], f"{test['statistic']:.4g}", f"{test['p']:.3g}", f"{test['adjusted_p']:.3g}"]
        for name, test in report["tests"].items()
    ]
    level, permutations = report["settings"]["level"], report["settings"]["permutations"]
    note = f"Drift is reported if an adjusted p value is at most {level:g}. {permutations:,} permutations."
    return Table("Tests", names, rows, note)


def _clusters(report: Report) -> Table:
    rows = []
    for row in report["clusters"]:
        change = f"{100 * (row['current'] - row['reference']):+.1f}"
        rows.append([percent(row["reference"]), percent(row["current"]), change, ", ".join(row["examples"])])
    note = "Share of the images of each set in each cluster (k-means on the pooled images), largest change first."
    return Table("Clusters", ["reference", "current", "change in points", "examples"], rows, note)


def _sets(report: Report) -> Table:
    columns = {name: {**found, **(found["retrieval"] or {})} for name, found in report["sets"].items()}
    note = "Measured on equal numbers of images. Retrieval: each image is a query for the others of its class."
    return figures_table("Embeddings", columns, note, ("retrieval",))


def _map(vectors: Sequence[np.ndarray], seed: int) -> str | None:
    """Scatter plot of equal numbers of images of both sets, as a data URI; None if there is nothing to plot."""
    count = min(MAPPED // 2, *map(len, vectors))
    points = torch.from_numpy(np.concatenate([part[:count] for part in vectors])).float()
    if points.shape[1] < 2 or not (points != points[0]).any():
        return None
    labels = torch.arange(2).repeat_interleave(count)
    return figures.feature_map(points, labels, ["reference", "current"], "pca", seed)


def _shown(image: Report) -> Shown:
    """An image of a list, without its pixels where they cannot be read; names of files are absolute paths."""
    name, note = image["image"], " ".join(filter(None, (image["label"], f"{image['witness']:+.3f}")))
    if os.path.isabs(name):
        try:
            return shown(whole(name, THUMBNAIL, 3), name, note)
        except MemoryError:
            raise
        except Exception:  # Pillow raises several classes
            note += ", cannot be read"
    return Shown("", name, note)
