import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from commands import ROOT
from hostile_runs import start

# Small form of each benchmark: arguments, and the rows of the table that do not depend on what else is installed.
SMALL = {
    "augment.py": (
        ["--only", "digits", "--repeats", "1"],
        [
            *[f"twoview {engine}" for engine in ("fast", "fused", "kornia")],
            *["torchvision v1, PIL images", "torchvision v2, tensors", "stock Kornia"],
        ],
    ),
    "step.py": (
        ["--smoke", "--steps", "1"],
        [
            *["twoview, 32-true"] * 4,
            *["twoview, decoded in every epoch, 32-true", "twoview, held in memory, 32-true"],
        ],
    ),
    "gpu.py": (["--small", "--repeats", "1"], ["twoview fast", "twoview fused", "twoview kornia", "stock Kornia"]),
    "losses.py": (["--images", "16", "--repeats", "1"], ["twoview", "plain"]),
    "evaluation.py": (["--smoke", "--parts", "knn", "retrieval"], ["knn", "retrieval"]),
    "micro_batch.py": (
        ["--smoke", "--only", "moco"],
        ["whole batch", "pieces of 4", "pieces of 4, activations kept"],
    ),
    "data.py": (
        ["--smoke", "--steps", "1"],
        [
            "twoview, held in memory",
            "twoview, decoded to a file, 0 workers",
            *[f"twoview, decoded in every epoch, {workers} workers" for workers in (0, 2)],
            *[f"torchvision v1, {workers} workers" for workers in (0, 2)],
        ],
    ),
    "probe.py": (["--smoke"], ["penalty chosen on 1,000 images"] * 2),
}


def measure(name, folder, *arguments):
    """Run a benchmark in a forked process; return the lines of its table and the rows of its JSON file."""

    def main():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")

    file = folder / "table.json"
    process = start(folder, *arguments, "--json", str(file), main=main)
    code, (out, err) = process.wait(250), process.texts()
    assert code == 0, err
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    return table, json.loads(file.read_text())["rows"]


def test_the_parts_of_a_step_are_measured(tmp_path):
    _, (row,) = measure("sizing.py", tmp_path, "--networks", "test_resnet", "--image-size", "32")
    assert row["operations"] > row["parameters"] > 0  # each weight of a convolution is used at many places
    assert row["activations"] > 4 * 3 * 32 * 32 / 2


@pytest.mark.parametrize("name", SMALL)
def test_the_small_form_of_a_benchmark_runs_to_its_end(name, tmp_path):
    arguments, expected = SMALL[name]
    table, rows = measure(name, tmp_path, *arguments)
    assert [cells[:2] for cells in table[: len(rows)]] == [[f"| {row['setting']}", row["name"]] for row in rows]
    assert all(row["per_second"] > 0 for row in rows)
    # Where auto is fp32, its row is the one of fp32.
    names = [row["name"].removesuffix(", as shipped") for row in rows]
    assert [found for found in names if found in expected] == expected


def test_photos_are_repeated_until_there_are_enough(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    photos = importlib.import_module("photos").Photos(None, str(tmp_path), needed=7, count=3)
    listed = Path(photos.as_list()).read_text().splitlines()
    assert len(listed) == len(photos.repeated(photos.files)) == 9
    assert set(listed) == {str(f.resolve()) for f in tmp_path.rglob("*.jpg")}
    assert len(set(listed)) == 3
