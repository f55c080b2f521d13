"""Test images that are also training images: accuracy on these images measures memorization, not generalization."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import Images, fit_channels, in_order
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Thumbnails, Workload
from twoview.evaluation.neighbors import neighbors
from twoview.evaluation.pixel_pairs import agreement, is_near, pixel_hashes
from twoview.evaluation.probe import Prediction
from twoview.evaluation.progress import add_steps, track
from twoview.evaluation.tables import Table, percent

SIDE = 32  # pixels per side at which images are compared
CANDIDATES = 5
BLOCK = 64  # test images that are compared with their candidates at once; the cache of a processor holds their pixels


class Shared(NamedTuple):
    """A test image that is also a training image.

    Attributes:
        test: position of the test image.
        train: position of the training image.
        exact: whether all pixels are equal.
        difference: root mean square difference of the pixels of both thumbnails, in gray levels from 0 to 255.
    """

    test: int
    train: int
    exact: bool
    difference: float


class SharedImages(NamedTuple):
    """Shared images and predictions.

    Attributes:
        shared: shared images by split: "train", and "pretrain" if the pretraining images are other images.
        predictions: predictions of all probes, by name of the probe.
    """

    shared: Mapping[str, list[Shared]]
    predictions: Mapping[str, Prediction]


@dataclass(frozen=True)
class Integrity(Measure):
    """Exact and near duplicates of training images among the test images, and accuracies without these test images."""

    name = "integrity"
    uses_thumbnails = True

    def applies(self, inputs: Inputs) -> bool:
        """Return True for the trained network only."""
        return inputs.name == "trained"

    def choose(self, inputs: Inputs, earlier: ByName) -> SharedImages:
        """Find shared images."""
        test, device = inputs.thumbnails["test"], inputs.device
        known = [p.neighbors for p in earlier.values() if isinstance(p, Prediction) and p.neighbors is not None]
        similar = known[0] if known else neighbors(inputs.train.features, inputs.test, CANDIDATES, device)[1]
        shared = {"train": shared_images(inputs.thumbnails["train"], test, similar[:, :CANDIDATES], device)}
        if inputs.pretrain_images is not None:
            theirs = thumbnails(inputs.pretrain_images, test.pixels.shape[-1])
            shared["pretrain"] = shared_images(theirs, test, device=device)
        return SharedImages(shared, {name: p for name, p in earlier.items() if isinstance(p, Prediction)})

    def score(self, chosen: SharedImages, inputs: Inputs, labels: Tensor) -> Figures:
        """Return the numbers of shared images, and the accuracies on the other test images."""
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

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        return work.search(work.train, work.test)  # by pixels; the search by features is that of kNN

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of the numbers of shared images, and of the accuracies with and without shared images."""
        (found,) = columns.values()
        rows = [
            [f"test images that are in {split} too", f"{count['exact']} equal, {count['near']} nearly"]
            for split, count in found["shared"].items()
        ]
        for probe, share in found["top1_without_shared"].items():
            before = report["results"]["trained"].get(probe, {}).get("test_top1")  # missing if the score failed
            text = f"{percent(share)} (with them {percent(before)})"
            rows.append([f"{probe.replace('_', ' ')} without them", text])
        return Table("Integrity", ["", ""], rows, "Mirrored or cropped copies are not searched for.")


def thumbnails(images: Images, side: int | None = None) -> Thumbnails:
    """Return the center squares of all images, and the hashes of the whole images.

    Args:
        images: images of one split.
        side: height and width of the thumbnails in pixels; None for 32, or less if the images are smaller.
    """
    side, small, hashes = side or min(images.size, SIDE), [], list[bytes]()
    add_steps(total=len(images))
    for batch in in_order(images):
        small.append(batch.squares(side).cpu())
        hashes += pixel_hashes(batch)
        add_steps(done=len(batch.ids))
    return Thumbnails(torch.cat(small), hashes)


def shared_images(
    train: Thumbnails,
    test: Thumbnails,
    similar: Tensor | None = None,
    device: torch.device | None = None,
) -> list[Shared]:
    """Find exact and near duplicates of training images among the test images.

    A test image whose hash equals the hash of a training image is an exact duplicate. Any other test image is compared
    with up to ten candidates: the five training images with the most similar 8x8 pixels, and the five training images
    with the most similar features. Thumbnails with three channels are compared in gray. The test image is a near
    duplicate of the candidate with the smallest root mean square (RMS) difference under the conditions of
    :func:`twoview.evaluation.pixel_pairs.is_near`, where the typical difference is the largest one among the first five
    candidates. Mirrored and cropped copies are not searched for.

    Args:
        train: thumbnails of N training images.
        test: thumbnails of T test images.
        similar: int64 ``[T, K]``, positions of the training images with the most similar features; None to select
            candidates by pixels only.
        device: device on which candidates are searched; None for the CPU.

    Returns:
        One entry for each test image that is a duplicate, in the order of the test images.
    """
    first = {digest: position for position, digest in reversed(list(enumerate(train.hashes)))}
    device = device or torch.device("cpu")
    candidates = neighbors(_coarse(train.pixels), _coarse(test.pixels), CANDIDATES, device)[1]
    if similar is not None:
        candidates = torch.cat([candidates, similar], 1)
    test_gray, train_gray = (x if x.shape[1] != 3 else fit_channels(x, 1) for x in (test.pixels, train.pixels))
    found = []
    for start in track(range(0, len(candidates), BLOCK)):
        positions = candidates[start : start + BLOCK]
        theirs = train_gray[positions].flatten(2).float()
        ours = test_gray[start : start + BLOCK].flatten(1).float()[:, None]
        difference, correlation, _ = agreement(ours, theirs)
        nearest = difference.argmin(1, keepdim=True)
        position, away, alike = (x.gather(1, nearest).flatten() for x in (positions, difference, correlation))
        near = is_near(away, alike, difference[:, :CANDIDATES].amax(1))
        rows = zip(position.tolist(), away.tolist(), near.tolist(), strict=True)
        for row, (train_position, distance, is_duplicate) in enumerate(rows, start):
            equal = first.get(test.hashes[row])
            if equal is not None:
                found.append(Shared(row, equal, True, 0.0))
            elif is_duplicate:
                found.append(Shared(row, train_position, False, distance))
    return found


def _coarse(pixels: Tensor) -> Tensor:
    parts = [F.adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in pixels.split(4096)]
    coarse = torch.cat(parts)
    return coarse - coarse.mean(1, keepdim=True)
