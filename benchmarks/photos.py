"""JPEG files of benchmarks: a given folder, or random smooth photographs in class folders."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

SUFFIXES = (".jpg", ".jpeg")


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return an image of large and of small smooth spots; as a JPEG file of 500x375 pixels it has about 30 kB."""
    size = (width, height)
    pixels = np.zeros((height, width, 3))
    for spots, share in ((6, 0.7), (40, 0.3)):
        small = Image.fromarray(rng.integers(0, 256, (spots, spots, 3), dtype=np.uint8))
        pixels += share * np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.round().astype(np.uint8))


def write_photos(root: Path, count: int, width: int = 500, height: int = 375, classes: int = 4) -> None:
    """Write random JPEG files to class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"class {i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth_image(rng, width, height).save(folder / f"image {i:05d}.jpg", quality=90)


class Photos:
    """JPEG files in a folder, repeated so often that there are at least ``needed`` images.

    Args:
        root: folder of JPEG files of any nesting; None writes ``count`` files to a folder in ``scratch``.
        scratch: existing temporary folder.
        needed: number of images that one repeat of the benchmark reads.
        count: number of files to write.

    Raises:
        SystemExit: if there are no JPEG files in ``root``.
    """

    def __init__(self, root: str | None, scratch: str, needed: int, count: int = 512) -> None:
        self.list = Path(scratch) / "files.txt"
        self.root = Path(root or Path(scratch) / "photos").resolve()
        if root is None and not self.root.exists():
            write_photos(self.root, count)
        self.files = sorted(str(f) for f in self.root.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not self.files:
            raise SystemExit(f"--photos={root}: there are no JPEG files in this folder; give another one")
        self.times = -(-needed // len(self.files))

    @property
    def description(self) -> str:
        """Number of files and their mean size."""
        mean = sum(Path(f).stat().st_size for f in self.files) / len(self.files) / 1000
        return f"{len(self.files)} files of {mean:.0f} kB, {self.times} times"

    def as_list(self) -> str:
        """Return the path of a list of all files, for :func:`twoview.data.folder`; without labels."""
        self.list.write_text("".join(f"{path}\n" for path in itertools.chain(*[self.files] * self.times)))
        return str(self.list)

    def repeated(self, dataset: Dataset) -> Dataset:
        """Return a Dataset of these files, repeated as often as in :meth:`as_list`."""
        return ConcatDataset([dataset] * self.times)


class Pictures(Dataset):
    """Images in memory or files, opened as torchvision's ImageFolder does, each with the label 0.

    Args:
        images: PIL images or paths.
        transform: function of a PIL image; None returns the image.
    """

    def __init__(self, images, transform=None) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position):
        from torchvision.datasets.folder import default_loader

        image = self.images[position]
        image = default_loader(image) if isinstance(image, str) else image
        return (image if self.transform is None else self.transform(image)), 0


def random_pixels(count: int, size: int) -> torch.Tensor:
    """Random images, uint8 ``[count, 3, size, size]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
