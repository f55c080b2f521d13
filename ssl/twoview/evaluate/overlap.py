"""Images that training and test share, exactly or nearly: test figures count them as if they had been recognised."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import Images, fit_channels, fit_size, in_order
from twoview.metrics import knn_neighbours

SIDE = 32  # pixels a side at which images are compared
# Of re-encoded images and of others, how many lie within these bounds is in docs/evaluation.md.
DIFFERENCE = 18.0
SURE = 8.0
NEXT = 3.0
CORRELATION = 0.85
CANDIDATES = 5


class Shared(NamedTuple):
    """Position of a test image and of the training image that it is.

    ``exact`` if they are equal in every pixel; ``difference`` is their root mean square one in grey levels of 255.
    """

    test: int
    train: int
    exact: bool
    difference: float


class Thumbnails(NamedTuple):
    """``pixels`` uint8 ``[N, C, s, s]``, s <= 32, and a hash of each image as it was."""

    pixels: Tensor
    hashes: list[bytes]


def thumbnails(images: Images) -> Thumbnails:
    """All images at 32 pixels a side at the most, and their hashes, in one pass."""
    side, small, hashes = min(images.size, SIDE), [], list[bytes]()
    for batch in in_order(images):
        pixels = batch.pixels.cpu()
        small.append(fit_size(pixels, side))
        hashes += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels]
    return Thumbnails(torch.cat(small), hashes)


def shared_images(train: Thumbnails, test: Thumbnails, features: tuple[Tensor, Tensor] | None = None) -> list[Shared]:
    """Test images that are training images too, as they were or re-encoded, each with the training image nearest to it.

    Equal hashes are exact. Else the five training images that are most similar in 8x8 pixels, and the five in features,
    are compared pixel by pixel, in grey where they have colours. Near is a correlation above 0.85 and a root mean
    square difference below 18 of 255 that is below 8, or below a third of that of the farthest of the first five: of
    images that are alike by nature, such as digits, the nearest is not much nearer than the next ones. Mirrored or cut
    images are not looked for.

    Args:
        train: of N images.
        test: of T images.
        features: ``[N, F]`` and ``[T, F]``; None for pixels alone.

    Returns:
        In the order of the test images.
    """
    first = {digest: position for position, digest in reversed(list(enumerate(train.hashes)))}
    candidates = knn_neighbours(_coarse(train.pixels), _coarse(test.pixels), CANDIDATES)[1]
    if features is not None:
        candidates = torch.cat([candidates, knn_neighbours(*features, CANDIDATES)[1]], 1)
    test_grey, train_grey = (x if x.shape[1] != 3 else fit_channels(x, 1) for x in (test.pixels, train.pixels))
    found = []
    for start in range(0, len(candidates), 512):
        positions = candidates[start : start + 512]
        theirs = train_grey[positions].flatten(2).float()
        ours = test_grey[start : start + 512].flatten(1).float()[:, None]
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
            elif alike > CORRELATION and away < min(DIFFERENCE, max(SURE, far / NEXT)):
                found.append(Shared(row, position, False, away))
    return found


def _coarse(pixels: Tensor) -> Tensor:
    parts = [F.adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in pixels.split(4096)]
    coarse = torch.cat(parts)
    return coarse - coarse.mean(1, keepdim=True)
