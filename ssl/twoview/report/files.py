"""What figures were made of, in files beside the report."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from twoview.data import ImageData
from twoview.evaluate import Evidence
from twoview.evaluate.probes import confusion


def keep_evidence(evidence: Evidence, images: ImageData, run_dir: Path) -> None:
    """Write the predictions, and as far as they were made, confusion, few-label splits and shared images.

    * ``predictions.safetensors``: int64 ``[T]`` of ``labels`` and of each probe of the trained network;
    * ``confusion.csv``: of the linear probe, a row a class, a column a predicted class;
    * ``few_labels.json``: for each size and draw the positions of training images whose labels were used;
    * ``shared_images.csv``: test images that are training images too.

    Args:
        evidence: of the evaluation.
        images: that were evaluated.
        run_dir: where to; made if missing.
    """
    assert images.test is not None
    run_dir.mkdir(parents=True, exist_ok=True)
    keep_predictions(images.test.labels, {name: p.classes for name, p in evidence.predictions.items()}, run_dir)
    if "linear" in evidence.predictions:
        table = confusion(evidence.predictions["linear"], images.test.labels, len(images.classes))
        rows = ([name, *row] for name, row in zip(images.classes, table.tolist(), strict=True))
        _write_csv(run_dir / "confusion.csv", ["class", *images.classes], rows)
    if evidence.splits:
        splits = {name: [draw.tolist() for draw in draws] for name, draws in evidence.splits.items()}
        (run_dir / "few_labels.json").write_text(json.dumps(splits) + "\n")
    if evidence.shared:
        header = ["test", "test position", "in", "train", "train position", "exact", "difference"]
        _write_csv(run_dir / "shared_images.csv", header, shared_rows(evidence, images))


def shared_rows(evidence: Evidence, images: ImageData) -> list[list[Any]]:
    """Test image, position, the split that holds it too, training image, position, whether equal, difference."""
    assert images.test is not None
    rows = []
    for name, pairs in evidence.shared.items():
        split = images.train if name == "train" else images.pretrain
        assert split is not None
        for test, train, exact, difference in pairs:
            rows.append([images.test.name(test), test, name, split.name(train), train, exact, f"{difference:.1f}"])
    return rows


def keep_predictions(labels: Tensor, predicted: dict[str, Tensor], run_dir: Path) -> None:
    """Write ``predictions.safetensors``, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"predictions.{os.getpid()}.tmp"
    save_file({"labels": labels.contiguous(), **{k: v.contiguous() for k, v in predicted.items()}}, temporary)
    temporary.replace(run_dir / "predictions.safetensors")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
