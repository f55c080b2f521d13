"""Plots and images of a report, as PNG or SVG in data URIs, so that the page is one file."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import Batch, fit_size
from twoview.files import read_csv

# Text in SVG files stays text, and equal plots give equal files.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "twoview", "font.family": "sans-serif", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}

THUMBNAIL = 96  # largest height and width of a thumbnail in pixels


def views_grid(batch: Batch, views: TwoViews, pairs: int, seed: int) -> Image.Image:
    """Draw a grid with one row for each image: its center square, then pairs of its two views.

    Args:
        batch: the images.
        views: the augmentation.
        pairs: number of pairs of views in a row.
        seed: seed of the views.
    """
    columns = [batch.squares(views.image_size)]
    for i in range(pairs):
        for view in views(batch.pixels, key=(seed, i), sizes=batch.sizes):
            restored = view * views.std + views.mean
            columns.append((restored * 255).round().clamp(0, 255).to(torch.uint8))
    return as_image(torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2))


def as_image(pixels: Tensor) -> Image.Image:
    """Convert uint8 ``[C, H, W]`` to an RGB image; unless C is 3, the first channel is shown in gray."""
    shown = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())


def png(image: Image.Image) -> str:
    """Return an image as a PNG data URI."""
    return _data_uri("png", lambda file: image.save(file, "PNG", optimize=True))


def jpeg(image: Image.Image) -> str:
    """Return an image as a JPEG data URI, which is smaller than PNG for photographs."""
    return _data_uri("jpeg", lambda file: image.save(file, "JPEG", quality=85))


def thumbnail(pixels: Tensor) -> str:
    """Return pixels uint8 ``[C, S, S]`` as a PNG data URI with at most 96 pixels per side."""
    return png(as_image(fit_size(pixels[None], min(pixels.shape[1], THUMBNAIL))[0]))


def _data_uri(kind: str, write: Callable[[BinaryIO], object]) -> str:
    file = io.BytesIO()
    write(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _svg(figure: Figure) -> str:
    with mpl.rc_context(STYLE):
        # The layout is constrained already; a tight bounding box would draw the figure twice.
        options: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}}
        return _data_uri("svg+xml", lambda file: figure.savefig(file, **options))


def curves(metrics: Path) -> str | None:
    """Plot loss, chance level, kNN accuracy and effective rank from ``metrics.csv``; None if unreadable."""
    try:
        rows = read_csv(metrics)
    except (OSError, ValueError):
        return None
    panels = {
        "loss": ("train/loss", "train/chance"),
        "kNN on held-out training images": ("val/knn_top1",),
        "effective rank": ("val/effective_rank",),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.4), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name in names:
                points = [(int(row["step"]), float(row[name])) for row in rows if _plotted(row, name)]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name.partition("/")[2], marker="." * (len(points) < 30))
            axes.set(title=title, xlabel="step")
            if len(names) > 1 and axes.lines:
                axes.legend(frameon=False)
    return _svg(figure)


def _plotted(row: Mapping[str, str], name: str) -> bool:
    """Whether a row of ``metrics.csv`` has a step and a finite value of a column."""
    try:
        return int(row["step"]) < 1e15 and abs(float(row[name])) < 1e30
    except (KeyError, ValueError):
        return False


def spectra(results: Mapping[str, Any], method: str) -> str | None:
    """Plot the spectrum of each network in ``results`` that has one; None if no network has a spectrum."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, row in results.items():
            shares = [share for share in row.get("geometry", {}).get("spectrum", []) if share > 1e-9]
            if shares:
                axes.loglog(range(1, len(shares) + 1), shares, label=method if name == "trained" else name)
        if not axes.lines:
            return None
        axes.set(xlabel="rank of the direction", ylabel="share of the variance")
        axes.legend(frameon=False)
    return _svg(figure)


def confusion_matrix(table: np.ndarray, classes: Sequence[str]) -> str:
    """Plot a confusion matrix ``[C, C]`` of counts, with each row divided by its sum."""
    shares = table / table.sum(1, keepdims=True).clip(min=1)
    side = min(9.0, 2.5 + 0.3 * len(classes))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="class")
        if len(classes) <= 40:
            names = [_plain(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90)
            axes.set_yticks(range(len(classes)), names)
        if len(classes) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
        else:
            figure.colorbar(image, shrink=0.7)
    return _svg(figure)


def feature_map(features: Tensor, labels: Tensor, classes: Sequence[str], kind: str, seed: int) -> str:
    """Plot a projection of features to two dimensions, colored by class.

    Args:
        features: fp32 ``[N, F]``.
        labels: int64 ``[N]``.
        classes: names of the classes.
        kind: "pca" or "umap".
        seed: seed of the projection.
    """
    if kind == "umap":
        from umap import UMAP

        points = UMAP(random_state=seed, n_jobs=1).fit_transform(features.numpy())
        axes_names = ["UMAP 1", "UMAP 2"]
    else:
        found = PCA(2, svd_solver="randomized", random_state=seed)
        points = found.fit_transform(features.double().numpy())
        shares = np.nan_to_num(found.explained_variance_ratio_)
        axes_names = [f"direction {i + 1} ({100 * s:.1f} % of the variance)" for i, s in enumerate(shares)]
    colors = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "turbo"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        for c, name in enumerate(classes):
            here = (labels == c).numpy()
            color: Any = colors(c if len(classes) <= 20 else c / len(classes))
            x, y = points[here].T
            axes.scatter(x, y, s=5, alpha=0.7, linewidths=0, color=color, label=_plain(name))
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        if len(classes) <= 40:
            rows = math.ceil(len(classes) / 20)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=3, ncols=rows)
        return _data_uri("png", lambda file: figure.savefig(file, format="png", dpi=140))


def _plain(name: str) -> str:
    """Return a class name of at most 24 characters, without characters that matplotlib interprets."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    text = f" {text}" if text.startswith("_") else text  # matplotlib's legends omit names with an underscore
    return (text if len(text) <= 24 else f"{text[:23]}…").replace("$", r"\$")
