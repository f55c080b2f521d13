"""How many near duplicates are found, and how many other images are taken for some: one Markdown row a data set.

python benchmarks/duplicates.py                       # digits and noise
python benchmarks/duplicates.py CIFAR10/train CIFAR10/test  # and 20,000 + 2,000 pictures of two folders
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_overlap import arrays, reencoded

from twoview.data import digits, fake, folder
from twoview.evaluate.overlap import shared_images


def measure(name, train, clean, planted=500):
    copies = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:planted]
    bank = arrays(train)
    pairs = {pair.test: pair.train for pair in shared_images(bank, arrays(reencoded(train[copies])))}
    found = sum(pairs.get(i) == int(copy) for i, copy in enumerate(copies))
    alarms = len(shared_images(bank, arrays(clean)))
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
