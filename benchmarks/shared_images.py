"""Near duplicates that are found, and other images that are reported as duplicates: one Markdown row for each data set.

python benchmarks/shared_images.py                             # digits and noise
python benchmarks/shared_images.py CIFAR10/train CIFAR10/test  # and the images of two folders, whole and in part
"""

import io
import sys

import numpy as np
import torch
from PIL import Image

from twoview.data import TensorImages, digits, fake, folder
from twoview.evaluation.integrity import shared_images, thumbnails


def reencoded(pixels, quality=60):
    """Images saved as JPEG and read again, uint8 ``[N, C, H, W]``."""
    images = []
    for image in pixels:
        file, array = io.BytesIO(), image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if len(image) == 1 else array).save(file, "JPEG", quality=quality)
        again = torch.from_numpy(np.array(Image.open(file)))
        images.append(again[None] if len(image) == 1 else again.permute(2, 0, 1))
    return torch.stack(images)


def small(pixels):
    """Thumbnails of uint8 ``[N, C, S, S]``."""
    return thumbnails(TensorImages(pixels, torch.zeros(len(pixels), dtype=torch.int64)))


def measure(name, train, clean, planted=500):
    copies = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:planted]
    bank = small(train)
    pairs = {pair.test: pair.train for pair in shared_images(bank, small(reencoded(train[copies])))}
    found = sum(pairs.get(i) == int(copy) for i, copy in enumerate(copies))
    alarms = len(shared_images(bank, small(clean)))
    print(f"| {name}, {len(train):,} training images | {len(copies)} | {found} | {len(clean):,} | {alarms} |")


def main():
    for size in (16, 32):
        data = digits(image_size=size)
        measure(f"digits at {size} pixels", data.train.pixels, data.test.pixels)
    data = fake()
    measure("noise of ten brightnesses", data.train.pixels, data.test.pixels)
    if len(sys.argv) == 3:
        data = folder(sys.argv[1], sys.argv[2], image_size=32, store_size=32)
        some = [torch.randperm(len(x), generator=torch.Generator().manual_seed(1)) for x in (data.train, data.test)]
        measure("CIFAR-10", data.train.pixels[some[0][:20_000]], data.test.pixels[some[1][:2000]])
        measure("CIFAR-10", data.train.pixels, data.test.pixels)


if __name__ == "__main__":
    main()
