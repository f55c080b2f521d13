"""Linear probe on many images: seconds, peak memory, and the accuracy beside that of a converged fit.

python benchmarks/probe.py                    # 100,000 images of 200 classes, and 1,000,000 images of 1,000 classes
python benchmarks/probe.py --only 100k        # the first only
python benchmarks/probe.py --only 100k --all  # and with all images for the choice of the penalty

The features are class means plus noise with some strong directions, 512 wide. Five penalties are compared. Each row
runs in a process of its own. The features of 1,000,000 images are in a file that is mapped into memory, as features of
an evaluation are if they are larger than eval.memory. Pages of the file that are in memory count as memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import begin, save, table_row
from torch import Tensor
from torch.nn import functional as F

from twoview.evaluation.feature_store import collect_features
from twoview.evaluation.linear import Linear
from twoview.evaluation.logistic import feature_scale
from twoview.evaluation.logistic_blocks import Regression
from twoview.evaluation.measure import Inputs, Labelled
from twoview.evaluation.probe import Prediction, accuracy, linear_classes

BLOCK = 10_000  # images that are drawn at once
CONVERGED = 1e-8  # tolerance of the reference


class Setting(NamedTuple):
    """Sizes of a problem: training images, test images, width of the features, classes; and whether they are in a file.

    Attributes:
        distance: standard deviation of the class means along each dimension.
        images: bound on the images for the choice of the penalty.
        reference: whether the fit is continued until it has converged, for comparison.
    """

    train: int
    test: int
    width: int
    classes: int
    distance: float
    in_file: bool = False
    images: int = 20_000
    reference: bool = True


SETTINGS = {
    "100k": Setting(100_000, 10_000, 512, 200, 0.16),
    "1M": Setting(1_000_000, 50_000, 512, 1000, 0.18, in_file=True, reference=False),
}
SMOKE = {
    "100k": Setting(2500, 500, 32, 10, 0.4, images=1000),
    "1M": Setting(5000, 500, 32, 20, 0.4, in_file=True, images=1000, reference=False),
}


def draw(setting: Setting, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels: class means, noise in all directions, and strong noise along ten directions."""
    fixed = torch.Generator().manual_seed(0)
    means = setting.distance * torch.randn(setting.classes, setting.width, generator=fixed)
    strong = 5 * F.normalize(torch.randn(10, setting.width, generator=fixed))
    offset = torch.randn(setting.width, generator=fixed)
    labels = torch.randint(setting.classes, (count,), generator=torch.Generator().manual_seed(seed))

    def parts() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed + 1)
        for part in labels.split(BLOCK):
            noise = torch.randn(len(part), setting.width, generator=generator)
            yield means[part] + noise + torch.randn(len(part), 10, generator=generator) @ strong + offset

    return collect_features(parts, (count, setting.width), memory=0 if setting.in_file else "1TB"), labels


def inputs(setting: Setting, train: Labelled, test: Tensor) -> Inputs:
    """Inputs of the linear probe, which uses nothing of the images but their features."""
    nothing: Any = None
    return Inputs(
        name="trained",
        encoder=None,
        train=train,
        test=test,
        train_images=nothing,
        test_images=nothing,
        pretrain_images=None,
        views=nothing,
        thumbnails={},
        classes=setting.classes,
        holdout=0.2,
        bootstrap=2000,
        seed=0,
        split_seed=0,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=512,
    )


def measure(setting: Setting) -> dict[str, Any]:
    """Draw the features, then choose the penalty and fit; with the accuracy of a converged fit if asked for."""
    train = Labelled(*draw(setting, setting.train, 1))
    test, labels = draw(setting, setting.test, 3)
    start, used = time.perf_counter(), time.process_time()
    found: Prediction = Linear(l2_images=setting.images).choose(inputs(setting, train, test), {})
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    result = {"seconds": seconds, "processor_seconds": processor, "peak_gigabytes": peak() / 1e9, **found.chosen}
    result |= {"top1": accuracy(found.classes, labels), "converged_top1": None}
    if setting.reference:
        regression = Regression(*train, feature_scale(train.features), setting.classes, device=None)
        reference, _ = regression.fit(found.chosen["l2"], max_iterations=2000, tolerance=CONVERGED)
        classes = linear_classes(reference, test, torch.arange(len(test)))
        result["converged_top1"] = accuracy(classes, labels)
    return result


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    parser.add_argument("--all", action="store_true", help="also without a bound on the images for the choice")
    parser.add_argument("--smoke", action="store_true", help="few images, for a test")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one row, in a process of its own
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(Setting(*json.loads(given.measure)))))
        return
    rows = []
    provenance = begin("Choice of the penalty and fit of the linear probe", "images/s", threads=torch.get_num_threads())
    chosen = SMOKE if given.smoke else SETTINGS
    for name in [given.only] if given.only else chosen:
        setting = chosen[name]
        variants = {f"penalty chosen on {setting.images:,} images": setting}
        if given.all:
            variants["penalty chosen on all fitted images"] = setting._replace(images=10**12, reference=False)
        for title, variant in variants.items():
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(variant)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            figures = json.loads(done.stdout.splitlines()[-1])
            size = f"{setting.train:,} x {setting.width}, {setting.classes:,} classes"
            speed = setting.train / figures["seconds"]
            rows.append({"setting": size, "name": title, "per_second": speed, "ratio": None, **figures})
            print(table_row(rows[-1]), flush=True)
    print("\n| setting | implementation | seconds | processor seconds | peak GB | L2 | top-1 | top-1, converged fit |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        converged = "-" if row["converged_top1"] is None else f"{100 * row['converged_top1']:.2f} %"
        cells = [row["setting"], row["name"], f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}"]
        cells += [f"{row['peak_gigabytes']:.2f}", f"{row['l2']:g}", f"{100 * row['top1']:.2f} %", converged]
        print(f"| {' | '.join(cells)} |", flush=True)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
