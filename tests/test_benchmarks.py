import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment

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


def test_the_parts_of_a_step_are_measured(tmp_path):
    file = tmp_path / "table.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "sizing.py"),
        "--networks",
        "test_resnet",
        "--image-size",
        "32",
    ]
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["operations"] > row["parameters"] > 0  # each weight of a convolution is used at many places
    assert row["activations"] > 4 * 3 * 32 * 32 / 2


@pytest.mark.parametrize("name", SMALL)
def test_the_small_form_of_a_benchmark_runs_to_its_end(name, tmp_path):
    arguments, expected = SMALL[name]
    file = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, env=environment())
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
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
