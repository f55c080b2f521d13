"""Files beside the report: predictions, confusion matrix, few-label splits, shared images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from twoview.data import ImageData
from twoview.evaluation.evaluate import Evidence
from twoview.evaluation.probe import confusion
from twoview.files import write_atomically, write_csv


def write_evidence(evidence: Evidence, images: ImageData, run_dir: Path) -> None:
    """Write the data from which the metrics of a report were computed.

    * ``predictions.safetensors``: int64 ``[T]`` ``labels``, and int64 ``[T]`` predictions of each probe of the trained
      network;
    * ``confusion.csv``: confusion matrix of the linear probe, one row per class, one column per predicted class;
    * ``few_labels.json``: for each size and draw, the positions of the training images whose labels were used;
    * ``shared_images.csv``: test images that are also training images.

    A file is not written if the evaluation did not take its measure.

    Args:
        evidence: features and predictions of the evaluation.
        images: the evaluated images.
        run_dir: target folder.
    """
    labels = images.labelled[1].labels
    write_predictions(labels, {name: p.classes for name, p in evidence.predictions.items()}, run_dir)
    if "linear" in evidence.predictions:
        table = confusion(evidence.predictions["linear"], labels, len(images.classes))
        rows = ([name, *row] for name, row in zip(images.classes, table.tolist(), strict=True))
        write_csv(run_dir / "confusion.csv", [["class", *images.classes], *rows])
    if evidence.splits:
        splits = {name: [draw.tolist() for draw in draws] for name, draws in evidence.splits.items()}
        write_atomically(run_dir / "few_labels.json", json.dumps(splits) + "\n")
    if evidence.shared:
        header = ["test", "test position", "in", "train", "train position", "exact", "difference"]
        write_csv(run_dir / "shared_images.csv", [header, *shared_rows(evidence, images)])


def shared_rows(evidence: Evidence, images: ImageData) -> list[list[Any]]:
    """Return a row for each shared image: test name and position, split, name and position there, exact, difference."""
    train, test = images.labelled
    sources = {"train": train, "pretrain": images.pretrain}
    return [
        [test.name(pair.test), pair.test, split, sources[split].name(pair.train), *pair[1:3], f"{pair.difference:.1f}"]
        for split, pairs in evidence.shared.items()
        for pair in pairs
    ]


def write_predictions(labels: Tensor, predicted: Mapping[str, Tensor], run_dir: Path) -> None:
    """Write int64 ``[T]`` labels and predictions to ``predictions.safetensors``."""
    tensors = {"labels": labels.contiguous(), **{name: classes.contiguous() for name, classes in predicted.items()}}
    write_atomically(run_dir / "predictions.safetensors", save(tensors))
