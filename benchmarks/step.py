"""Images per second of whole training steps beside other libraries; prints a Markdown table.

    python benchmarks/step.py                       # all settings, 5 repeats of 4 steps; an hour on two cores
    python benchmarks/step.py --only "MoCo, 32 px" --json table.json
    python benchmarks/step.py --only JPEG --photos DIR

A step takes a batch of images, makes two views of each, and updates the weights, the momentum encoder and the queue.
twoview runs as ``python train.py`` does, without loggers: augmentation engine and precision "auto", the callbacks of a
run, and the default optimizer. "as shipped" marks the precision that "auto" is on this machine. lightly runs as in its
examples, with images in memory as PIL images. The other libraries run at fp32 ("32-true"). Each has ResNet-18 and
the same probabilities, crop areas and strengths of augmentation; the crops of Pillow are antialiased, those of twoview
are not by default (augment.antialias). See other_libraries.py for what is taken from where.

"JPEG files" is the way from file to step: the files of ``--photos``, or 512 files of 500x375 pixels that are written to
a temporary folder. twoview decodes them in every epoch with one loader process per core, or holds the decoded images in
memory; these are decoded before the time is taken. A number of workers is the number of loader processes. The ratio is
to the fastest row of lightly. Libraries that are not installed are left out, which the head of the table says.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import other_libraries
import torch
from other_libraries import WORKERS, Setting, missing
from photos import Photos, Pictures, random_pixels
from side_by_side import begin, rates, save
from stopwatch import WARM_UP, Stopwatch
from torchvision.transforms import functional as TF

from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.data import ImageData, TensorImages, folder
from twoview.devices import pick_device
from twoview.heads import projection_head
from twoview.methods import MoCo, SimCLR
from twoview.negatives import NegativeQueue
from twoview.training.loader import PretrainingData
from twoview.training.pretraining import prepare
from twoview.training.settings import Recipe, RunSettings, TrainerSettings
from twoview.training.trainer import choose_precision, fit

SETTINGS = [
    Setting("SimCLR, 32 px, ImageNet stem", "simclr", 32, 256, small_stem=False, blur_p=0.0),
    Setting("SimCLR, 32 px, 3x3 stem", "simclr", 32, 256, small_stem=True, blur_p=0.0),
    Setting("MoCo, 32 px, ImageNet stem", "moco", 32, 256, small_stem=False, blur_p=0.5),
    Setting("MoCo, 32 px, 3x3 stem", "moco", 32, 256, small_stem=True, blur_p=0.5),
    Setting("SimCLR, 224 px, JPEG files", "simclr", 224, 32, small_stem=False, blur_p=0.5, files=True),
]
# As conf/method/simclr.yaml and conf/method/moco.yaml, with the queue and the momentum of lightly's example.
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"method": partial(SimCLR, temperature=0.2), "head": projection_head},
    "moco": {
        "method": partial(MoCo, temperature=0.2, queue_size=4096, momentum=0.996),
        "head": partial(projection_head, hidden_bn=False, last_bn=False),
    },
}
VIEWS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "moco": {"crop_scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4, 0.1)},
}
# Ways in which twoview reads files: options of twoview.data.folder. One entry is one row for each precision.
FILES: dict[str, dict[str, Any]] = {
    "decoded in every epoch": {"memory": 0, "cache": False},
    "held in memory": {"memory": "1TB"},
}
PREFETCHED = 2 * max(*WORKERS, os.cpu_count() or 1)  # batches, so that no loader process is idle before the last step


@dataclass(frozen=True)
class Sizes:
    """Sizes that the arguments set.

    Attributes:
        steps: number of steps in a repeat.
        photos: folder of JPEG files; None to write some.
        scratch: temporary folder.
        backbone: network of twoview.
    """

    steps: int
    photos: str | None
    scratch: str
    backbone: str

    def needed(self, setting: Setting) -> int:
        """Number of images that a repeat needs."""
        return setting.batch * (WARM_UP + self.steps + PREFETCHED)


class Images:
    """The images of a setting in the form that each library takes; made when they are first needed."""

    def __init__(self, setting: Setting, sizes: Sizes) -> None:
        self.setting, self.count = setting, sizes.needed(setting)
        written = 512 if setting.batch > 4 else 16
        self.photos = Photos(sizes.photos, sizes.scratch, self.count, written) if setting.files else None

    @cached_property
    def pixels(self) -> torch.Tensor:
        """Random images, uint8 ``[count, 3, size, size]``."""
        return random_pixels(self.count, self.setting.size)

    def for_twoview(self) -> Iterator[tuple[str, ImageData]]:
        """Yield each form of the images with its name."""
        if self.photos is None:
            images = TensorImages(self.pixels, torch.full((self.count,), -1))
            yield "", ImageData(images, None, None, [], self.setting.batch)
            return
        for name, options in FILES.items():
            size, batch = self.setting.size, self.setting.batch
            yield f", {name}", folder(self.photos.as_list(), image_size=size, batch_size=batch, **options)

    def pictures(self, transform: Any = None) -> Any:
        """Return a Dataset of PIL images in memory or of files."""
        if self.photos is None:
            return Pictures([TF.to_pil_image(image) for image in self.pixels], transform)
        return self.photos.repeated(Pictures(self.photos.files, transform))

    def for_lightly(self) -> Any:
        """Return a Dataset of the views of lightly's transform."""
        transform = other_libraries.lightly_transform(self.setting)
        if self.photos is None:
            return self.pictures(transform)
        from lightly.data import LightlyDataset

        return self.photos.repeated(LightlyDataset(str(self.photos.root), transform=transform))


def twoview(setting: Setting, sizes: Sizes, data: ImageData, precision: str) -> Callable[[], float]:
    """Return a function that trains with twoview, and returns the seconds of ``sizes.steps`` steps."""
    recipe = Recipe(
        **METHODS[setting.method],
        backbone=network_of(setting, sizes),
        augment=partial(TwoViews, **VIEWS[setting.method], blur_p=setting.blur_p),
    )
    trainer = TrainerSettings(max_epochs=None, max_steps=WARM_UP + sizes.steps, precision=precision, check_every=0)

    def run() -> float:
        with tempfile.TemporaryDirectory() as run_dir:
            prepared = prepare(data, recipe, trainer, RunSettings(run_dir=run_dir), holdout=0.2)
            for queue in (module for module in prepared.module.modules() if isinstance(module, NegativeQueue)):
                queue.push(torch.randn_like(queue.keys), torch.full((len(queue.keys),), -1))  # full from the start
            watch = Stopwatch(sizes.steps)
            prepared.trainer.callbacks.append(watch)
            fit(prepared.trainer, prepared.module, PretrainingData(data, 0), None)
            return watch.seconds

    return run


def network_of(setting: Setting, sizes: Sizes) -> Callable[[], Any]:
    stem = "small" if setting.small_stem else "timm"
    return partial(create_backbone, sizes.backbone, image_size=setting.size, stem=stem)


def cases(setting: Setting, sizes: Sizes, left_out: dict[str, str]) -> dict[str, Callable[[], float]]:
    images = Images(setting, sizes)
    shipped = choose_precision("auto", network_of(setting, sizes)()[0], pick_device())
    precisions = {shipped: f"{shipped}, as shipped", "32-true": "32-true"} | {shipped: f"{shipped}, as shipped"}
    found = {
        f"twoview{form}, {name}": twoview(setting, sizes, data, precision)
        for form, data in images.for_twoview()
        for precision, name in precisions.items()
    }
    if "lightly" not in left_out:
        dataset = images.for_lightly()
        for workers in WORKERS:
            found[f"lightly, {workers} workers"] = other_libraries.lightly(setting, dataset, workers, sizes.steps)
    if "stable_pretraining" not in left_out and setting.method == "simclr":
        for workers in WORKERS:
            arguments = (setting, images.pictures(), workers, sizes.steps)
            case = other_libraries.OwnProcess(other_libraries.stable_pretraining, *arguments)
            found[f"stable-pretraining, {workers} workers"] = case
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps in a repeat, after two whose time is not taken")
    parser.add_argument("--photos", help="folder of JPEG files")
    parser.add_argument("--smoke", action="store_true", help="one repeat of 4 images, twoview with a tiny network")
    parser.add_argument("--json", help="file for the table as JSON")
    given = parser.parse_args()
    chosen = [setting for setting in SETTINGS if given.only in setting.name]
    if not chosen or given.repeats < 1 or given.steps < 1:
        parser.error(f"--only={given.only} --repeats={given.repeats} --steps={given.steps}: nothing to measure")
    if given.smoke:
        chosen, given.repeats = [replace(setting, batch=4) for setting in chosen], 1
    other_libraries.without_added_callbacks()
    left_out = missing("lightly", "stable_pretraining")
    packages = ["lightly", "stable-pretraining", "torchvision", "Pillow"]
    title = f"Images per second of training, {given.repeats} repeats of {given.steps} steps"
    provenance, rows = begin(title, "images/s", packages, "the fastest of lightly", left_out=left_out), []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SPT_CACHE_DIR"] = scratch  # stable-pretraining writes to the home folder otherwise
        sizes = Sizes(given.steps, given.photos, scratch, "test_resnet" if given.smoke else "resnet18")
        for setting in chosen:
            made = cases(setting, sizes, left_out)
            # In the small form only twoview has the tiny network, so a ratio would compare different networks.
            reference = [name for name in made if name.startswith("lightly") and not given.smoke]
            items = setting.batch * given.steps
            rows += rates(setting.name, made, items, given.repeats, reference, warm_up=0 if given.smoke else 1)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
