"""Images per second from JPEG files to two views, without a network, beside other libraries; prints a Markdown table.

    python benchmarks/data.py                                  # 7 repeats of 8 batches; some minutes on two cores
    python benchmarks/data.py --photos DIR --json table.json

The files are those of ``--photos``, or 512 files of 500x375 pixels that are written to a temporary folder. A batch has
two views of 224x224 pixels of each of 32 images, with the augmentation of SimCLR. twoview decodes the files in every
epoch, or holds the decoded images in memory or in a file; these are decoded before the time is taken. torchvision's
transforms of version 1 and lightly's transform are applied image by image in the loader, to images that the loader of
torchvision's ImageFolder or LightlyDataset decode. A number of workers is the number of loader processes. The ratio is
to the fastest row of another library. lightly is not a dependency of twoview, and is left out if it is not installed.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from augment import torchvision_transform
from other_libraries import WORKERS, Setting, lightly_transform, loader, missing
from photos import Photos, Pictures
from side_by_side import begin, rates, save
from stopwatch import WARM_UP, seconds_of_steps
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from twoview.augment import TwoViews, ViewRecipe
from twoview.data import Batch, folder
from twoview.devices import pick_device
from twoview.training.loader import BatchOrder

SETTING = Setting("224 px, batch 32", "simclr", 224, 32, small_stem=False, blur_p=0.5, files=True)
# Ways in which twoview reads files: options of twoview.data.folder. One entry is one row.
FILES: dict[str, dict[str, Any]] = {
    "held in memory": {"memory": "1TB"},
    "decoded to a file, 0 workers": {"memory": 0, "num_workers": 0},
    **{f"decoded in every epoch, {n} workers": {"memory": 0, "cache": False, "num_workers": n} for n in WORKERS},
}
Case = Callable[[], float]


class TwoOf:
    """Applies a transform twice to an image."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[torch.Tensor]:
        """Return two views of an image."""
        return [self.transform(image), self.transform(image)]


def ours(photos: Photos, options: dict[str, Any], setting: Setting, steps: int) -> Case:
    """Return a function that makes views with twoview, and returns the seconds of ``steps`` batches."""
    data = folder(photos.as_list(), image_size=setting.size, batch_size=setting.batch, **options)
    images, device = data.pretrain, pick_device()
    augment = TwoViews(**data.view_limits(), blur_p=setting.blur_p).to(device)
    counter = iter(range(10**9))

    def step(batch: Batch) -> None:
        augment(batch.pixels.to(device), key=(0, next(counter)), sizes=batch.sizes)

    def run() -> float:
        order = BatchOrder(len(images), setting.batch, 0, lambda: 0, blocks=images.blocks)
        batches = DataLoader(images, batch_size=None, sampler=order, num_workers=images.num_workers)
        return seconds_of_steps(step, batches, steps)

    return run


def of_loader(dataset: Any, workers: int, setting: Setting, steps: int) -> Case:
    """Return a function that loads views of another library, and returns the seconds of ``steps`` batches."""
    device = pick_device()

    def step(batch: Any) -> None:
        for view in batch[0]:
            view.to(device)

    return lambda: seconds_of_steps(step, loader(dataset, setting, workers), steps)


def cases(photos: Photos, setting: Setting, steps: int, left_out: dict[str, str]) -> tuple[dict[str, Case], list[str]]:
    """Return the functions to time by name, and the names of those of other libraries."""
    found = {f"twoview, {name}": ours(photos, options, setting, steps) for name, options in FILES.items()}
    transform = torchvision_transform(ViewRecipe(blur_p=setting.blur_p), setting.size, 3, v1)
    others = {"torchvision v1": photos.repeated(Pictures(photos.files, TwoOf(transform)))}
    if "lightly" not in left_out:
        from lightly.data import LightlyDataset

        dataset = LightlyDataset(str(photos.root), transform=lightly_transform(setting))
        others["lightly"] = photos.repeated(dataset)
    read = partial(of_loader, setting=setting, steps=steps)
    theirs = {f"{name}, {n} workers": read(dataset, n) for name, dataset in others.items() for n in WORKERS}
    return {**found, **theirs}, list(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this; without rows there is no ratio")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="batches in a repeat, after two whose time is not taken")
    parser.add_argument("--photos", help="folder of JPEG files")
    parser.add_argument("--smoke", action="store_true", help="one repeat of batches of 4 images")
    parser.add_argument("--json", help="file for the table as JSON")
    given = parser.parse_args()
    if given.repeats < 1 or given.steps < 1:
        parser.error(f"--repeats={given.repeats} --steps={given.steps}: give at least 1")
    setting = Setting("224 px, batch 4", "simclr", 224, 4, False, 0.5, True) if given.smoke else SETTING
    repeats = 1 if given.smoke else given.repeats
    left_out = missing("lightly")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # where twoview puts files of decoded images
        needed = setting.batch * (WARM_UP + given.steps + 2 * max(WORKERS))
        photos = Photos(given.photos, scratch, needed, 16 if given.smoke else 512)
        packages = ["lightly", "torchvision", "Pillow"]
        title = f"Images per second from JPEG files to two views, {repeats} repeats of {given.steps} batches"
        facts = {"files": photos.description, "left_out": left_out}
        provenance = begin(title, "images/s", packages, "the fastest other library", **facts)
        made, others = cases(photos, setting, given.steps, left_out)
        chosen = {name: case for name, case in made.items() if given.only in name}
        references = [name for name in others if name in chosen]
        warm_up = 0 if given.smoke else 1
        rows = rates(setting.name, chosen, setting.batch * given.steps, repeats, references, warm_up)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
