"""Pictures of a report, each as PNG or SVG in a data URI, so that one file holds all."""

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import fit_size

# Text stays text; the same figure gives the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "twoview", "font.family": "sans-serif", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}


def picture_of_views(pixels: Tensor, views: TwoViews, pairs: int, seed: int) -> Image.Image:
    """A row an image, the original first, then pairs of its two views.

    Args:
        pixels: uint8 ``[N, C, S, S]`` of the size of the views.
        views: makes them.
        pairs: in a row.
        seed: of the views.
    """
    columns = [pixels]
    for i in range(pairs):
        for view in views(pixels, key=(seed, i)):
            restored = view * views.std + views.mean
            columns.append((restored * 255).round().clamp(0, 255).to(torch.uint8))
    return as_image(torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2))


def as_image(pixels: Tensor) -> Image.Image:
    """A picture of uint8 ``[C, H, W]``; of other than three channels the first is shown."""
    shown = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())


def png(image: Image.Image) -> str:
    """A data URI."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail(pixels: Tensor) -> str:
    """A data URI of uint8 ``[C, S, S]``, at most 96 pixels a side."""
    return png(as_image(fit_size(pixels[None], min(pixels.shape[1], 96))[0]))


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(metrics: Path) -> str | None:
    """Loss with its chance level, checks by kNN and effective rank, from a run's ``metrics.csv``; None without one."""
    try:
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
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
                points = [(int(row["step"]), float(row[name])) for row in rows if row.get("step") and row.get(name)]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name.partition("/")[2], marker="." * (len(points) < 30))
            axes.set_title(title)
            axes.set_xlabel("step")
            if len(names) > 1:
                axes.legend(frameon=False)
    return _svg(figure)


def spectra(results: Mapping[str, Any], method: str) -> str | None:
    """Shares of variance by rank, of every source that was measured; None without any."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, row in results.items():
            shares = [share for share in row.get("geometry", {}).get("spectrum", []) if share > 1e-9]
            if shares:
                axes.loglog(range(1, len(shares) + 1), shares, label=method if name == "trained" else name)
        if not axes.lines:
            return None
        axes.set_xlabel("rank of the direction")
        axes.set_ylabel("share of the variance")
        axes.legend(frameon=False)
    return _svg(figure)


def confusion_matrix(table: np.ndarray, classes: Sequence[str]) -> str:
    """Shares of each class's test images, by the class that the linear probe took them for."""
    shares = table / table.sum(1, keepdims=True).clip(min=1)
    side = min(9.0, 2.5 + 0.3 * len(classes))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        if len(classes) <= 40:
            names = [_plain(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90)
            axes.set_yticks(range(len(classes)), names)
        if len(classes) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=_ink(share), fontsize=8)
        else:
            figure.colorbar(image, shrink=0.7)
    return _svg(figure)


def _ink(share: float) -> str:
    return "white" if share > 0.5 else "black"


def feature_map(features: Tensor, labels: Tensor, classes: Sequence[str], kind: str, seed: int) -> str:
    """Test images in two dimensions, coloured by class.

    Args:
        features: ``[N, F]``.
        labels: int64 ``[N]``.
        classes: their names.
        kind: "pca" or "umap".
        seed: of UMAP.
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
    colours = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "turbo"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        for c, name in enumerate(classes):
            here = (labels == c).numpy()
            colour = colours(c if len(classes) <= 20 else c / len(classes))
            axes.scatter(
                points[here, 0], points[here, 1], s=5, color=colour, label=_plain(name), alpha=0.7, linewidths=0
            )
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        if len(classes) <= 40:
            rows = math.ceil(len(classes) / 20)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=3, ncols=rows)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=140)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _plain(name: str) -> str:
    """A class name that matplotlib takes for text, not for mathematics, and that leaves room for the picture."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    text = f" {text}" if text.startswith("_") else text  # or legends leave it out
    return (text if len(text) <= 24 else f"{text[:23]}…").replace("$", r"\$")
