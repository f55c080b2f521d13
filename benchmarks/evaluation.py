"""Seconds and memory of each part of an evaluation of many features: one Markdown row for each part.

python benchmarks/evaluation.py                          # 80,000 + 20,000 images, 256 features, 200 classes
python benchmarks/evaluation.py --parts knn retrieval    # some parts only
python benchmarks/evaluation.py --smoke                  # a small form, for tests

Each part is taken in a process of its own, on one thread. Seconds are those of the processor. Memory is the largest
resident memory during the part, less the one before, which holds the features.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from side_by_side import begin, save, table_row

from twoview.data import TensorImages
from twoview.evaluation.evaluate import take
from twoview.evaluation.integrity import thumbnails
from twoview.evaluation.measure import Inputs, Labelled
from twoview.evaluation.settings import MEASURES

PARTS = ("knn", "few_labels", "retrieval", "clustering", "geometry", "integrity")


def features(n, width, classes, seed):
    """Class means and correlated noise with strong directions, not separable: fp32 ``[n, width]``, and labels."""
    fixed = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(classes, width, generator=fixed)
    mixing = torch.randn(width, width, generator=fixed) * torch.linspace(1, 0, width).square() / 4
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    noise = torch.randn(n, width, generator=generator)
    return means[labels] + noise @ mixing.T + 0.5 * torch.randn(n, width, generator=generator), labels


def make_inputs(train, test, width, classes):
    """Inputs of measures, and the test labels; images are random pixels."""
    (ours, labels), (theirs, test_labels) = (features(n, width, classes, seed) for seed, n in enumerate((train, test)))
    torch.manual_seed(0)
    pixels = [torch.randint(0, 256, (n, 1, 16, 16), dtype=torch.uint8) for n in (train, test)]
    images = TensorImages(pixels[0], labels), TensorImages(pixels[1], torch.full((test,), -1))
    small = {name: thumbnails(x) for name, x in zip(("train", "test"), images, strict=True)}
    inputs = Inputs(
        name="trained",
        encoder=None,
        train=Labelled(ours, labels),
        test=theirs,
        train_images=images[0],
        test_images=images[1],
        pretrain_images=None,
        views=None,
        thumbnails=small,
        classes=classes,
        holdout=0.2,
        bootstrap=2000,
        seed=0,
        split_seed=0,
        device=torch.device("cpu"),
        batch_size=512,
    )
    return inputs, test_labels


def resident(name):
    """Resident memory in bytes: "VmRSS" now, "VmHWM" at most since the last reset; 0 where there is no /proc."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def measure(part, sizes):
    """Take one part, and print its seconds, memory and metrics as JSON."""
    torch.set_num_threads(1)
    inputs, labels = make_inputs(*sizes)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = resident("VmRSS"), time.process_time()
    found = take((MEASURES[part],), inputs, labels)[0]
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before, "metrics": found.get(part)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(MEASURES), default=PARTS)
    parser.add_argument("--sizes", nargs=4, type=int, default=(80_000, 20_000, 256, 200), metavar="N")
    parser.add_argument("--smoke", action="store_true", help="600 training and 300 test images")
    parser.add_argument("--json", help="file for the table with provenance")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (600, 300, 16, 5) if arguments.smoke else arguments.sizes
    if arguments.measure:
        measure(arguments.measure, sizes)
        return
    train, test, width, classes = sizes
    setting = f"{train:,} + {test:,} images, {width} features, {classes} classes"
    provenance = begin("Parts of an evaluation", "images/s of one thread", reference="-")
    rows = []
    for part in arguments.parts:
        command = [sys.executable, __file__, "--measure", part, "--sizes", *map(str, sizes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"setting": setting, "name": part, "per_second": (train + test) / found["seconds"], "ratio": None})
        rows[-1] |= found
        print(table_row(rows[-1]), flush=True)
    print("\n| part | seconds of one thread | further memory in MB |\n|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['seconds']:.1f} | {row['bytes'] / 1e6:,.0f} |")
    save(arguments.json, provenance, rows)


if __name__ == "__main__":
    main()
