"""False alarms of task=drift on splits without drift, and changes of images that it notices.

python benchmarks/drift.py FOLDER                       # raw pixels at 32x32
python benchmarks/drift.py FOLDER --checkpoint RUN      # features of a network

FOLDER holds images in one folder for each class, such as the 10,000 test images of CIFAR-10. All pairs of sets hold
different images. Without drift, both are random samples. With drift, the current images are

* brighter: a number of gray levels (of 255) is added to all pixels;
* blurred: by a Gaussian with a standard deviation in pixels;
* noisy: Gaussian noise with a standard deviation in gray levels is added to each value of each pixel;
* of a missing class: a share of the images of one class is replaced by images of the other classes;
* of a new class: a share of the images is of one class, of which the reference has none.

Each repeat draws new images, and the next class. Changed pixels are rounded and clipped to 0 to 255. Images of changed
pixels are embedded once, 2,000 for each change, and drawn from these. The tests are those of task=drift with its
defaults; "noticed" is its decision at level 0.05, the other columns are its tests, adjusted for each other.
"""

import argparse
import sys
import time
from pathlib import Path

import kornia
import numpy as np
import torch
from side_by_side import begin, save

from twoview.data import square
from twoview.evaluation.two_sample import TESTS, compare_sets, share_interval
from twoview.tools import DriftSettings
from twoview.tools.near_duplicates import optional_encoder

SETTINGS = DriftSettings()
SUFFIXES = {".jpg", ".jpeg", ".png"}
SIDE = 32  # height and width of raw pixels
PIXELS = {  # strengths, and their unit
    "brighter": ((8, 16, 32), "+{} gray levels"),
    "blurred": ((0.4, 0.6, 0.8), "sigma {} pixels"),
    "noisy": ((4, 8, 16), "sigma {} gray levels"),
}
CLASSES = {
    "missing class": ((0.3, 0.6, 1.0), "{:.0%} of its images"),
    "new class": ((0.02, 0.05, 0.1), "{:.0%} of all images"),
}


def changed(pixels, kind, strength, generator):
    """Images uint8 ``[N, C, H, W]`` with another brightness, blur or noise."""
    values = pixels.float()
    if kind == "brighter":
        values = values + strength
    elif kind == "blurred":
        values = kornia.filters.gaussian_blur2d(values, (9, 9), (strength, strength), border_type="reflect")
    else:
        values = values + strength * torch.randn(values.shape, generator=generator)
    return values.round().clamp(0, 255).to(torch.uint8)


class Embedded:
    """Embeddings of a folder, and of a part of its images with changed pixels."""

    def __init__(self, root, checkpoint, part):
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
        names = sorted({file.parent.name for file in files})
        self.labels = np.array([names.index(file.parent.name) for file in files])
        encoder = optional_encoder(checkpoint, SIDE, 3)
        decode = encoder.preprocess.decoded if encoder is not None else lambda file: [square(file, SIDE, 3)]
        pixels = torch.stack([decode(str(file))[0] for file in files])
        self.clean = features(encoder, pixels)
        generator = torch.Generator().manual_seed(0)
        self.part = torch.randperm(len(files), generator=generator)[:part].numpy()
        self.changed = {}
        for kind, (strengths, _) in PIXELS.items():
            for strength in strengths:
                some = changed(pixels[self.part], kind, strength, generator)
                self.changed[kind, strength] = features(encoder, some)

    def pair(self, kind, strength, size, number, generator):
        """Vectors of a reference and of current images, ``[size, D]`` each."""
        everything = generator.permutation(len(self.labels))
        if kind in PIXELS:
            current = generator.permutation(len(self.part))[:size]
            rest = everything[~np.isin(everything, self.part[current])]
            return self.clean[rest[:size]], self.changed[kind, strength][current]
        reference, current = everything[:size], everything[size : 2 * size]
        if kind in CLASSES:
            own = self.labels[everything] == number % (1 + self.labels.max())
            own, others = everything[own], everything[~own]
            if kind == "missing class":
                kept = np.flatnonzero(np.isin(current, own))
                gone = kept[: round(strength * len(kept))]
                current[gone] = others[~np.isin(others, [*reference, *current])][: len(gone)]
            else:
                new = round(strength * size)
                reference, current = others[:size], np.concatenate([others[size : 2 * size - new], own[:new]])
        return self.clean[reference], self.clean[current]


def features(encoder, pixels):
    """Vectors float64 ``[N, D]`` of images uint8 ``[N, C, H, W]``."""
    if encoder is None:
        return pixels.flatten(1).double().numpy()
    parts = [encoder.apply_network(encoder.preprocess.normalized(part)) for part in pixels.split(256)]
    return torch.cat(parts).double().numpy()


def measure(embedded, kind, strength, size, repeats, seed):
    """Adjusted p values, ``[repeats, 3]``."""
    found = []
    for number in range(repeats):
        generator = np.random.default_rng([seed, size, number, *map(ord, f"{kind} {strength}")])
        pair = embedded.pair(kind, strength, size, number, generator)
        found.append(compare_sets(*pair, SETTINGS.clusters, SETTINGS.permutations, generator).adjusted_p)
    return np.array(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--checkpoint", help="run folder, checkpoint file, timm:NAME; raw pixels if it is left out")
    parser.add_argument("--splits", type=int, default=100, help="pairs without drift for each size")
    parser.add_argument("--repeats", type=int, default=10, help="pairs for each change and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000], help="images of each set")
    kinds = ["none", *PIXELS, *CLASSES]
    parser.add_argument("--changes", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--part", type=int, default=2000, help="images that are changed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the table with provenance")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    embedded = Embedded(given.root, given.checkpoint, given.part)
    print(f"embedded in {time.process_time() - start:.0f} CPU seconds", file=sys.stderr)
    columns = ("change", "strength", "images of each set", "pairs", "noticed", *TESTS)
    facts = {"images": len(embedded.labels), "dimensions": embedded.clean.shape[1], "seed": given.seed}
    provenance = begin("Drift", columns=columns, **facts)
    cases = [("none", 0, "")]
    cases += [(k, s, unit.format(s)) for k, (all_of, unit) in (PIXELS | CLASSES).items() for s in all_of]
    rows = []
    for kind, strength, shown in (case for case in cases if case[0] in given.changes):
        for size in given.sizes:
            repeats = given.splits if kind == "none" else given.repeats
            p = measure(embedded, kind, strength, size, repeats, given.seed)
            counts = [int((p.min(1) <= SETTINGS.level).sum()), *(p <= SETTINGS.level).sum(0).tolist()]
            rows.append(
                {
                    "change": kind,
                    "strength": shown,
                    "images": size,
                    "pairs": repeats,
                    "noticed": counts[0],
                    **dict(zip(TESTS, counts[1:], strict=True)),
                }
            )
            if kind == "none":
                rows[-1]["interval"] = share_interval(counts[0], repeats)
            print(f"| {kind} | {shown} | {size:,} | {repeats} | {' | '.join(map(str, counts))} |", flush=True)
    print(f"{time.process_time() - start:.0f} CPU seconds in all", file=sys.stderr)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
