"""Test images that are training images too: their accuracy measures memory, not generalization."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import Images, fit_channels, fit_size, in_order
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Thumbnails
from twoview.evaluation.probe import Prediction
from twoview.evaluation.tables import Table, percent
from twoview.metrics import knn_neighbors

SIDE = 32  # pixels per side at which images are compared
# docs/evaluation.md states how many re-encoded images, and how many other images, lie within these bounds.
MAX_DIFFERENCE = 18.0
CERTAIN = 8.0
RATIO = 3.0
MIN_CORRELATION = 0.85
CANDIDATES = 5


class Shared(NamedTuple):
    """Positions of a test image and of the training image that is the same.

    ``exact`` if all pixels are equal; ``difference`` is their root mean square difference in gray levels of 255.
    """

    test: int
    train: int
    exact: bool
    difference: float


class SharedImages(NamedTuple):
    """Shared images by split ("train", and "pretrain" if that is another), and the predictions of all probes."""

    shared: Mapping[str, list[Shared]]
    predictions: Mapping[str, Prediction]


@dataclass(frozen=True)
class Integrity(Measure):
    """Test images that equal training images exactly or nearly, and the accuracies without them."""

    name = "integrity"
    uses_thumbnails = True

    def applies(self, inputs: Inputs) -> bool:
        """Only to the trained network."""
        return inputs.name == "trained"

    def choose(self, inputs: Inputs, earlier: ByName) -> SharedImages:
        """Find shared images."""
        test = inputs.thumbnails["test"]
        shared = {"train": shared_images(inputs.thumbnails["train"], test, (inputs.train.features, inputs.test))}
        if inputs.pretrain_images is not None:
            shared["pretrain"] = shared_images(thumbnails(inputs.pretrain_images), test)
        return SharedImages(shared, {name: p for name, p in earlier.items() if isinstance(p, Prediction)})

    def score(self, chosen: SharedImages, inputs: Inputs, labels: Tensor) -> Figures:
        """Counts of shared images, and accuracies on the other test images."""
        clean = torch.ones(len(labels), dtype=torch.bool)
        for pairs in chosen.shared.values():
            clean[[pair.test for pair in pairs]] = False
        counts = {
            split: {"exact": sum(pair.exact for pair in pairs), "near": sum(not pair.exact for pair in pairs)}
            for split, pairs in chosen.shared.items()
        }
        without = {
            probe: float((p.classes == labels)[clean].double().mean()) if clean.any() else None
            for probe, p in chosen.predictions.items()
        }
        return {"shared": counts, "test_images_left": int(clean.sum()), "top1_without_shared": without}

    def table(self, columns: ByName, report: ByName) -> Table:
        """Counts, and accuracies with and without shared images."""
        (found,) = columns.values()
        rows = [
            [f"test images that are in {split} too", f"{count['exact']} equal, {count['near']} nearly"]
            for split, count in found["shared"].items()
        ]
        for probe, share in found["top1_without_shared"].items():
            before = report["results"]["trained"][probe]["test_top1"]
            text = f"{percent(share)} (with them {percent(before)})"
            rows.append([f"{probe.replace('_', ' ')} without them", text])
        return Table("Integrity", ["", ""], rows, "Mirrored or cropped copies are not searched for.")


def thumbnails(images: Images) -> Thumbnails:
    """All images at 32 pixels per side or less, and their hashes, in one pass."""
    side, small, hashes = min(images.size, SIDE), [], list[bytes]()
    for batch in in_order(images):
        pixels = batch.pixels.cpu()
        small.append(fit_size(pixels, side))
        hashes += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels]
    return Thumbnails(torch.cat(small), hashes)


def shared_images(train: Thumbnails, test: Thumbnails, features: tuple[Tensor, Tensor] | None = None) -> list[Shared]:
    """Test images that are training images too, exactly or re-encoded, each with the nearest training image.

    Equal hashes are exact matches. Otherwise the five training images most similar in 8x8 pixels, and the five most
    similar in features, are compared pixel by pixel, in gray if they have three channels. A near match has a
    correlation above 0.85 and a root mean square difference below 18 of 255. The difference must also be below 8, or
    below a third of that of the least similar of the first five: where all images are alike, such as digits, the
    nearest image is not much nearer than the next ones. Mirrored or cropped copies are not searched for.

    Args:
        train: thumbnails of N training images.
        test: thumbnails of T test images.
        features: ``[N, F]`` and ``[T, F]``; None to compare pixels only.

    Returns:
        In the order of the test images.
    """
    first = {digest: position for position, digest in reversed(list(enumerate(train.hashes)))}
    candidates = knn_neighbors(_coarse(train.pixels), _coarse(test.pixels), CANDIDATES)[1]
    if features is not None:
        candidates = torch.cat([candidates, knn_neighbors(*features, CANDIDATES)[1]], 1)
    test_gray, train_gray = (x if x.shape[1] != 3 else fit_channels(x, 1) for x in (test.pixels, train.pixels))
    found = []
    for start in range(0, len(candidates), 512):
        positions = candidates[start : start + 512]
        theirs = train_gray[positions].flatten(2).float()
        ours = test_gray[start : start + 512].flatten(1).float()[:, None]
        difference = (theirs - ours).square().mean(2).sqrt()
        a, b = theirs - theirs.mean(2, keepdim=True), ours - ours.mean(2, keepdim=True)
        correlation = F.cosine_similarity(a, b, dim=2)
        nearest = difference.argmin(1, keepdim=True)
        rows = [x.gather(1, nearest).flatten().tolist() for x in (positions, difference, correlation)]
        rows.append(difference[:, :CANDIDATES].amax(1).tolist())
        for row, (position, away, alike, far) in enumerate(zip(*rows, strict=True), start):
            equal = first.get(test.hashes[row])
            if equal is not None:
                found.append(Shared(row, equal, True, 0.0))
            elif alike > MIN_CORRELATION and away < min(MAX_DIFFERENCE, max(CERTAIN, far / RATIO)):
                found.append(Shared(row, position, False, away))
    return found


def _coarse(pixels: Tensor) -> Tensor:
    parts = [F.adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in pixels.split(4096)]
    coarse = torch.cat(parts)
    return coarse - coarse.mean(1, keepdim=True)
