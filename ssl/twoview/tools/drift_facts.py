"""What describes a drift beside its tests: images and clusters that have changed, and the quality of the embeddings."""

from typing import Any

import numpy as np
import torch

from twoview.evaluation.retrieval import retrieval_figures
from twoview.evaluation.two_sample import Pool, witness
from twoview.metrics import effective_rank, uniformity
from twoview.tools.drift_sets import Sample

BLOCK = 4096  # vectors that are converted at once
EXAMPLES = 3  # images that are named for a cluster


def changed_images(first: Sample, second: Sample, bandwidth: float, listed: int) -> dict[str, list[dict[str, Any]]]:
    """List the images of each set around which this set has more images than the other one.

    All images are considered, and compared with the samples.

    Args:
        first: the reference.
        second: the current images.
        bandwidth: of the kernel.
        listed: number of images of each set.

    Returns:
        For "current" and "reference": ``image``, ``label`` and ``witness`` in [-1, 1] of each image, largest first. In
        "current", these are the images least like the reference; in "reference", images that have become rare.
    """
    pairs = {"current": (second, first), "reference": (first, second)}
    return {name: _most_changed(own, other, bandwidth, listed) for name, (own, other) in pairs.items()}


def _most_changed(own: Sample, other: Sample, bandwidth: float, listed: int) -> list[dict[str, Any]]:
    member, values = np.zeros(len(own), dtype=bool), []
    member[own.rows] = True
    for start in range(0, len(own) if listed else 0, BLOCK):
        rows = own.content.vectors[start : start + BLOCK].double().numpy()
        values.append(witness(rows, own.vectors, other.vectors, member[start : start + BLOCK], bandwidth))
    found = np.concatenate([np.empty(0), *values])
    rows = np.argsort(-found, kind="stable")[:listed].tolist()
    return [{"image": own.name(row), "label": own.label(row), "witness": float(found[row])} for row in rows]


def changed_clusters(first: Sample, second: Sample, pool: Pool, order: np.ndarray) -> list[dict[str, Any]]:
    """Describe the share of each set in each cluster, largest change first.

    Args:
        first: the reference.
        second: the current images.
        pool: their pooled samples.
        order: int ``[N]``, position of each pooled row among the rows of ``first`` followed by those of ``second``.

    Returns:
        For each cluster ``reference`` and ``current`` (shares in [0, 1]), and ``examples``: images nearest to the mean
        of the cluster, of the set whose share is larger.
    """
    unit = pool.vectors / np.maximum(np.linalg.norm(pool.vectors, axis=1, keepdims=True), 1e-12)
    current, found = order >= len(first.rows), []
    for number in np.unique(pool.clusters):
        inside = pool.clusters == number
        shares = [float(inside[side].mean()) for side in (~current, current)]
        grown = shares[1] > shares[0]
        own = np.flatnonzero(inside & (current == grown))
        nearest = order[own[np.argsort(-unit[own] @ unit[inside].mean(0), kind="stable")[:EXAMPLES]]]
        names = [second.name(second.rows[i - len(first.rows)]) if grown else first.name(first.rows[i]) for i in nearest]
        found.append({"reference": shares[0], "current": shares[1], "examples": names})
    return sorted(found, key=lambda row: -abs(row["current"] - row["reference"]))


def set_figures(first: Sample, second: Sample) -> dict[str, dict[str, Any]]:
    """Measure both sets, on equal numbers of images, since all of these figures depend on this number.

    Returns:
        For "reference" and "current": ``images``, ``compared``, ``effective_rank`` and ``uniformity`` of
        :mod:`twoview.metrics`, and ``retrieval`` of :func:`twoview.evaluation.retrieval.retrieval_figures`, in which
        each image is a query for the others of its class; None if a set has fewer than two images with a label.
    """
    sets = {"reference": first, "current": second}
    labelled = {name: _labelled(found) for name, found in sets.items()}
    same, queries = min(len(first.rows), len(second.rows)), min(map(len, labelled.values()))
    figures = {}
    for name, found in sets.items():
        vectors = torch.from_numpy(found.vectors)
        rows, retrieval = labelled[name][:queries], None
        if queries > 1:
            names = [found.label(int(found.rows[row])) for row in rows]
            numbers = {label: number for number, label in enumerate(dict.fromkeys(names))}
            retrieval = retrieval_figures(vectors[rows].float(), torch.tensor([numbers[label] for label in names]))
        figures[name] = {
            "images": len(found),
            "compared": len(found.rows),
            "effective_rank": effective_rank(vectors[:same]),
            "uniformity": uniformity(vectors[:same]),
            "retrieval": retrieval,
        }
    return figures


def _labelled(found: Sample) -> list[int]:
    return [place for place, row in enumerate(found.rows.tolist()) if found.label(row) is not None]
