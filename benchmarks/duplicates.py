"""Planted duplicates of photographs that task=duplicates finds, and different photographs that it reports.

python benchmarks/duplicates.py FOLDER                                 # without a network
python benchmarks/duplicates.py FOLDER --checkpoint random:resnet18    # and with features of a network
python benchmarks/duplicates.py FOLDER --kind cropped --share 0.8      # deeper crops

Of each photograph in FOLDER, one copy of each kind is written to a temporary folder; with several kinds, the copies are
searched in one run. The table counts pairs of a photograph and its copy that are in one group, pairs of copies of
different photographs that are reported, and the pairs that this is to be compared with.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from twoview.data import folder
from twoview.tools import find_duplicates
from twoview.tools.near_duplicates import optional_encoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def reencoded(image, draw, share):
    return image, 60


def resized(image, draw, share):
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC), 90


def mirrored(image, draw, share):
    return ImageOps.mirror(image), 90


def cropped(image, draw, share):
    width, height = round(share * image.width), round(share * image.height)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height)), 90


def recolored(image, draw, share):
    return image.convert("L").convert("RGB"), 90


COPIES = {"re-encoded": reencoded, "resized": resized, "mirrored": mirrored, "cropped": cropped, "recolored": recolored}


def plant(files, root, kinds, share):
    """Write ROOT/NUMBER-KIND.jpg for each file and kind, and the file itself as ROOT/NUMBER-original.SUFFIX."""
    draw = random.Random(0)
    for number, file in enumerate(files):
        (root / f"{number}-original{file.suffix.lower()}").write_bytes(file.read_bytes())
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        for kind in kinds:
            copy, quality = COPIES[kind](image, draw, share)
            copy.save(root / f"{number}-{kind}.jpg", quality=quality)


def measure(files, kinds, share, encoder):
    """Search the photographs with their copies; return a row of the table for each kind, and one for all of them."""
    with tempfile.TemporaryDirectory() as place:
        root, run = Path(place) / "images", Path(place) / "run"
        root.mkdir()
        plant(files, root, kinds, share)
        start = time.process_time()
        loaded = partial(folder, str(root), cache=False, num_workers=0)
        report = find_duplicates(loaded, encoder, kinds=[*kinds], run_dir=run)
        seconds = time.process_time() - start
        with open(run / "duplicates.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    group = {Path(row["path"]).stem: row["group"] for row in rows}
    members = {}
    for name, number in group.items():
        members.setdefault(number, []).append(name.split("-")[0])
    different = sum(a != b for names in members.values() for i, a in enumerate(names) for b in names[:i])
    linked = {frozenset((Path(row["path"]).stem, Path(row["closest"]).stem)) for row in rows}
    linked_wrongly = sum(len({name.split("-")[0] for name in pair}) > 1 for pair in linked)
    table = []
    for kind in kinds:
        originals = [group.get(f"{number}-original") for number in range(len(files))]
        found = sum(o is not None and o == group.get(f"{n}-{kind}") for n, o in enumerate(originals))
        table.append([kind, str(len(files)), f"{found} ({found / len(files):.1%})"])
    possible = report["images"] * (report["images"] - 1) // 2
    of = f"{different / max(1, report['candidates']):.3%} of {report['candidates']:,} verified pairs"
    of += f", {different / max(1, possible):.5%} of {possible:,} possible pairs"
    table.append([f"different photographs, {linked_wrongly} linked", of, f"{different} in one group"])
    print(f"{seconds:.0f} CPU seconds", file=sys.stderr)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], help="run folders, checkpoint files, timm:NAME, random:NAME"
    )
    parser.add_argument("--kind", nargs="*", default=list(COPIES)[:4], choices=list(COPIES))
    parser.add_argument("--share", type=float, default=0.9, help="share of width and height that a crop keeps")
    parser.add_argument("--most", type=int, default=300, help="largest number of photographs")
    options = parser.parse_args()
    files = sorted(file for file in options.folder.rglob("*") if file.suffix.lower() in SUFFIXES)[: options.most]
    print("| candidates | kind | planted | found |\n|---|---|---|---|")
    for source in [None, *options.checkpoint]:
        encoder = optional_encoder(source, 64, 3)
        for row in measure(files, options.kind, options.share, encoder):
            print(f"| {'pixels' if source is None else f'pixels and {source}'} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
