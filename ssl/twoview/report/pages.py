"""``report.md`` and ``report.html``: the tables and pictures of an evaluation, each in one file that needs no other."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch

from twoview.augment import TwoViews
from twoview.data import ImageData, fit_size
from twoview.evaluate import Evidence
from twoview.evaluate.probes import confusion
from twoview.evaluate.structure import sample
from twoview.metrics import knn_neighbours
from twoview.report import pictures
from twoview.report.files import shared_rows
from twoview.report.tables import Table, tables

MOST_CONFUSED = 10
LISTED = 50
MAPPED = 3000
GALLERY = 6  # rows that are right, and as many that are wrong
NEIGHBOURS = 6
NO_PICTURE = 60  # classes above which a confusion matrix is too large to see anything


class Picture(NamedTuple):
    """``source`` is a data URI."""

    title: str
    source: str
    note: str = ""


class Neighbour(NamedTuple):
    """An image of the gallery: its picture, class and name, and whether the class is that of the first."""

    source: str
    label: str
    name: str
    right: bool


def write_pages(
    report: Mapping[str, Any], evidence: Evidence, images: ImageData, views: TwoViews, run_dir: Path
) -> None:
    """Write ``report.md`` and ``report.html``.

    Args:
        report: as ``report.json`` will hold it.
        evidence: what it was made of.
        images: that were evaluated.
        views: shown in a picture.
        run_dir: where to; made if missing.
    """
    verdict = report["results"]["trained"].get("geometry")
    content = {
        "tables": tables(report) + _further_tables(evidence, images),
        "facts": _facts(report),
        "pictures": _pictures(report, evidence, images, views),
        "gallery": _gallery(evidence, images),
        "neighbours": NEIGHBOURS,
        "verdict": verdict,
    }
    _render(f"{report['method']} on {report['data']}", content, run_dir)


def write_tables(title: str, shown: Sequence[Table], run_dir: Path) -> None:
    """Write ``report.md`` and ``report.html`` of tables alone."""
    content = {"tables": shown, "facts": [], "pictures": [], "gallery": [], "neighbours": NEIGHBOURS, "verdict": None}
    _render(title, content, run_dir)


def _render(title: str, content: Mapping[str, Any], run_dir: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("twoview", "report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _markdown_cell
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.html"):
        _write(run_dir / name, environment.get_template(f"{name}.j2").render(content, title=title))


def _write(path: Path, text: str) -> None:
    # File names may hold bytes that are no text.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _markdown_cell(text: str) -> str:
    """Text that stays in its cell and is not taken for markup."""
    return re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    assert images.test is not None
    found = []
    if "linear" in evidence.predictions:
        table = torch.from_numpy(confusion(evidence.predictions["linear"], images.test.labels, len(images.classes)))
        wrong = table.clone().fill_diagonal_(0)
        most = wrong.flatten().argsort(descending=True, stable=True)[:MOST_CONFUSED]
        pairs = [divmod(int(position), len(images.classes)) for position in most if wrong.flatten()[position]]
        names = images.classes
        rows = [
            [names[a], names[b], str(int(wrong[a, b])), f"{100 * wrong[a, b] / table[a].sum():.1f} %"] for a, b in pairs
        ]
        if rows:
            found.append(Table("Most confused", ["class", "taken for", "images", "of its images"], rows))
    if rows := shared_rows(evidence, images):
        note = f"{len(rows)} in all, listed in shared_images.csv."
        header = ["test image", "is in", "as", "equal", "difference in grey levels"]
        shown = [
            [test, split, train, "yes" if exact else "nearly", away] for test, _, split, train, _, exact, away in rows
        ]
        found.append(Table("Shared images", header, shown[:LISTED], note))
    return found


def _pictures(report: Mapping[str, Any], evidence: Evidence, images: ImageData, views: TwoViews) -> list[Picture]:
    assert images.test is not None
    checkpoint = Path(report["checkpoint"])
    found = []
    curves = pictures.curves(checkpoint.parent.parent / "metrics.csv")
    if checkpoint.parent.name == "checkpoints" and curves:
        found.append(Picture("Training", curves))
    if spectra := pictures.spectra(report["results"], report["method"]):
        found.append(Picture("Spectrum", spectra, "Straight and flat is spread out; a cliff is collapse."))
    if "linear" in evidence.predictions and len(images.classes) <= NO_PICTURE:
        table = confusion(evidence.predictions["linear"], images.test.labels, len(images.classes))
        source = pictures.confusion_matrix(table, images.classes)
        found.append(Picture("Confusion", source, "Per cent of each class's test images, by the linear probe."))
    some = sample(len(images.test), MAPPED)
    kind = report["protocol"]["map"]
    if len(some) > 1:
        labels = images.test.labels[some]
        source = pictures.feature_map(evidence.test[some], labels, images.classes, kind, report["seed"])
        found.append(Picture("Map of the features", source, f"{len(some):,} test images."))
    originals = images.test[some[:6].tolist()].pixels.cpu()
    grid = pictures.picture_of_views(
        fit_size(originals, report["backbone"]["image_size"]), views.cpu(), 4, report["seed"]
    )
    scale = max(1, 64 // report["backbone"]["image_size"])
    grid = grid.resize((grid.width * scale, grid.height * scale), 0)
    note = "Test images on the left, then four pairs of the views that alignment is measured between."
    found.append(Picture("Views", pictures.png(grid), note))
    return found


def _gallery(evidence: Evidence, images: ImageData) -> list[tuple[Neighbour, list[Neighbour]]]:
    """Test images with their nearest training images: some whose nearest is of their class, then some others."""
    assert images.test is not None
    assert images.train is not None
    queries = sample(len(images.test), MAPPED)
    positions = knn_neighbours(evidence.train, evidence.test[queries], NEIGHBOURS)[1]
    right = images.train.labels[positions[:, 0]] == images.test.labels[queries]
    order = torch.cat([torch.nonzero(right).flatten()[:GALLERY], torch.nonzero(~right).flatten()[:GALLERY]])
    rows = []
    for row in order.tolist():
        query = int(queries[row])
        label = int(images.test.labels[query])
        first = Neighbour(
            pictures.thumbnail(images.test[[query]].pixels[0].cpu()),
            images.classes[label],
            images.test.name(query),
            bool(right[row]),
        )
        rows.append((first, [_neighbour(images, int(position), label) for position in positions[row]]))
    return rows


def _neighbour(images: ImageData, position: int, label: int) -> Neighbour:
    assert images.train is not None
    theirs = int(images.train.labels[position])
    source = pictures.thumbnail(images.train[[position]].pixels[0].cpu())
    return Neighbour(source, images.classes[theirs], images.train.name(position), theirs == label)
