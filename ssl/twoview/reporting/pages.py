"""``report.md`` and ``report.html``: tables and plots of an evaluation, each page in one self-contained file."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch

from twoview.augment import TwoViews
from twoview.data import ImageData, Images, fixed_sample
from twoview.evaluation.evaluate import Evidence
from twoview.evaluation.knn import NEIGHBORS
from twoview.evaluation.probe import confusion
from twoview.evaluation.tables import Table
from twoview.files import write_atomically
from twoview.metrics import knn_neighbors
from twoview.reporting import figures
from twoview.reporting.files import shared_rows
from twoview.reporting.tables import tables

Report = Mapping[str, Any]
MOST_CONFUSED = 10
LISTED = 50
MAPPED = 3000
GALLERY = 6  # number of rows with a correct nearest neighbor, and of rows with a wrong nearest neighbor
MAX_CLASSES = 60  # the confusion matrix is plotted for at most this many classes


class Figure(NamedTuple):
    """A plot or image of a report; ``source`` is a data URI."""

    title: str
    source: str
    note: str = ""


class Neighbor(NamedTuple):
    """An image of the gallery: data URI, class, name, and whether its class is the class of the query."""

    source: str
    label: str
    name: str
    right: bool


def write_pages(report: Report, evidence: Evidence, images: ImageData, views: TwoViews, run_dir: Path) -> None:
    """Write ``report.md`` and ``report.html``.

    Args:
        report: content of ``report.json``.
        evidence: features and predictions that the report was computed from.
        images: the evaluated images.
        views: augmentation; examples of its views are shown.
        run_dir: target folder.
    """
    verdict = report["results"]["trained"].get("geometry")
    content = {
        "tables": tables(report) + _further_tables(evidence, images),
        "facts": _facts(report),
        "figures": _figures(report, evidence, images, views),
        "gallery": _gallery(evidence, images),
        "verdict": verdict,
    }
    _render(f"{report['method']} on {report['data']}", content, run_dir)


def write_tables(title: str, shown: Sequence[Table], run_dir: Path) -> None:
    """Write ``report.md`` and ``report.html`` with tables only."""
    _render(title, {"tables": shown, "facts": [], "figures": [], "gallery": [], "verdict": None}, run_dir)


def environment() -> jinja2.Environment:
    """Return the environment of the templates of this package; HTML pages escape every text."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("twoview", "reporting"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters["cell"] = markdown_cell
    return found


def _render(title: str, content: Mapping[str, Any], run_dir: Path) -> None:
    templates = environment()
    for name in ("report.md", "report.html"):
        write_atomically(run_dir / name, templates.get_template(f"{name}.j2").render(content, title=title))


def markdown_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _facts(report: Report) -> list[tuple[str, str]]:
    hardware = report["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    return [
        ("command", report["command"]),
        ("checkpoint", report["checkpoint"]),
        ("backbone", json.dumps(report["backbone"])),
        ("data", f"{report['data']}, test images {report['test_fingerprint']}"),
        ("seed", str(report["seed"])),
        ("commit", report["commit"] or "installed"),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("machine", ", ".join([machine, *hardware["gpus"]])),
        ("protocol", json.dumps(report["protocol"])),
    ]


def _further_tables(evidence: Evidence, images: ImageData) -> list[Table]:
    found, names = [], images.classes
    if "linear" in evidence.predictions:
        table = torch.from_numpy(_confusion(evidence, images))
        wrong = table.clone().fill_diagonal_(0)
        most = wrong.flatten().argsort(descending=True, stable=True)[:MOST_CONFUSED]
        pairs = [divmod(int(position), len(names)) for position in most if wrong.flatten()[position]]
        counts = [(names[a], names[b], int(wrong[a, b]), 100 * wrong[a, b] / table[a].sum()) for a, b in pairs]
        rows = [[true, predicted, str(count), f"{share:.1f} %"] for true, predicted, count, share in counts]
        if rows:
            found.append(Table("Most confused", ["class", "predicted", "images", "of its images"], rows))
    if shared := shared_rows(evidence, images):
        note = f"{len(shared)} in all, listed in shared_images.csv."
        header = ["test image", "is in", "as", "equal", "difference in gray levels"]
        rows = [[test, in_, as_, "yes" if exact else "nearly", away] for test, _, in_, as_, _, exact, away in shared]
        found.append(Table("Shared images", header, rows[:LISTED], note))
    return found


def _confusion(evidence: Evidence, images: ImageData) -> np.ndarray:
    return confusion(evidence.predictions["linear"], images.labelled[1].labels, len(images.classes))


def _figures(report: Report, evidence: Evidence, images: ImageData, views: TwoViews) -> list[Figure]:
    test, classes, seed = images.labelled[1], images.classes, report["seed"]
    checkpoint = Path(report["checkpoint"])
    found = []
    curves = figures.curves(checkpoint.parent.parent / "metrics.csv")
    if checkpoint.parent.name == "checkpoints" and curves:
        found.append(Figure("Training", curves))
    if spectra := figures.spectra(report["results"], report["method"]):
        note = "A slow decay means that many directions are used; a sudden drop means collapse."
        found.append(Figure("Spectrum", spectra, note))
    if "linear" in evidence.predictions and len(classes) <= MAX_CLASSES:
        note = "Percent of the test images of each class, by prediction of the linear probe."
        found.append(Figure("Confusion", figures.confusion_matrix(_confusion(evidence, images), classes), note))
    some = fixed_sample(len(test), MAPPED)
    if len(some) > 1:
        kind = report["protocol"]["map"]
        source = figures.feature_map(evidence.test[some], test.labels[some], classes, kind, seed)
        found.append(Figure("Map of the features", source, f"{len(some):,} test images."))
    size = report["backbone"]["image_size"]
    batch = test[some[:6].tolist()]
    squares = batch._replace(pixels=batch.squares(size).cpu(), sizes=None)
    grid = figures.views_grid(squares, views.cpu(), 4, seed)
    scale = max(1, 64 // size)
    grid = grid.resize((grid.width * scale, grid.height * scale), 0)
    note = "Test images on the left, then four pairs of the views whose alignment is measured."
    found.append(Figure("Views", figures.png(grid), note))
    return found


def _gallery(evidence: Evidence, images: ImageData) -> list[tuple[Neighbor, list[Neighbor]]]:
    """Return test images with their nearest training images; images with a correct nearest neighbor come first."""
    train, test = images.labelled
    queries = fixed_sample(len(test), MAPPED)
    known = [p.neighbors[queries] for p in evidence.predictions.values() if p.neighbors is not None]
    positions = known[0] if known else knn_neighbors(evidence.train, evidence.test[queries], NEIGHBORS)[1]
    right = train.labels[positions[:, 0]] == test.labels[queries]

    def shown(split: Images, position: int, label: int) -> Neighbor:
        own = int(split.labels[position])
        source = figures.thumbnail(split[[position]].squares(min(split.size, figures.THUMBNAIL))[0].cpu())
        return Neighbor(source, images.classes[own], split.name(position), own == label)

    rows = []
    for row in [*right.nonzero().flatten()[:GALLERY].tolist(), *(~right).nonzero().flatten()[:GALLERY].tolist()]:
        query = int(queries[row])
        label = int(test.labels[query])
        rows.append((shown(test, query, label), [shown(train, int(p), label) for p in positions[row]]))
    return rows
