"""Pairs of images that may be duplicates, by 8x8 pixels of whole images and of windows in them, and by features."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.evaluation.neighbors import neighbors
from twoview.losses import l2_normalize
from twoview.tools.registration import sample

THUMBNAIL = 16  # height and width in pixels of what descriptors are computed from
DESCRIPTOR = 8  # height and width in pixels of a descriptor
NEIGHBORS = 5  # candidates of an image by each kind of descriptor
CROPS = 10  # candidates of an image by the descriptors of all of its windows
# Windows that stand for crops: (share of width and height, number of places in each direction). With the tolerance of
# registration, they cover crops of at least about 70 % of width and height, and of 70 % of one of them.
WINDOWS = ((0.92, 0.92, 2, 2), (0.8, 0.8, 3, 3), (0.75, 1.0, 3, 1), (1.0, 0.75, 1, 3))


def search_windows(cropped: bool) -> Tensor:
    """Return the windows that are searched, fp32 ``[W, 4]``, see :mod:`twoview.tools.registration`.

    Args:
        cropped: whether crops are searched; otherwise the only window is the whole image, which is always the first.
    """
    windows = [(1.0, 1.0, 0.0, 0.0)]
    for sx, sy, columns, rows in WINDOWS if cropped else ():
        places = [(x, y) for x in _places(sx, columns) for y in _places(sy, rows)]
        windows += [(sx, sy, x, y) for x, y in places]
    return torch.tensor(windows)


def _places(scale: float, count: int) -> list[float]:
    return torch.linspace(scale - 1, 1 - scale, count).tolist() if count > 1 else [0.0]


def thumbnails_of(gray: Tensor) -> Tensor:
    """Reduce uint8 ``[N, 64, 64]`` to fp32 ``[N, 256]``, 16x16 pixels each."""
    cells = (THUMBNAIL, -1)
    parts = (part.float().unflatten(2, cells).unflatten(1, cells) for part in gray.split(4096))
    return torch.cat([part.mean((2, 4)).flatten(1) for part in parts])


def flipped(thumbnails: Tensor) -> Tensor:
    """Mirror thumbnails fp32 ``[N, 256]``."""
    return thumbnails.view(-1, THUMBNAIL, THUMBNAIL).flip(2).flatten(1)


def descriptor_matrices(windows: Tensor) -> Tensor:
    """Return the matrices that compute the descriptors of windows from a thumbnail.

    Args:
        windows: fp32 ``[W, 4]``.

    Returns:
        fp32 ``[W, 256, 64]``; ``thumbnails @ matrix`` are 8x8 pixels of the window, less their mean.
    """
    pixels = torch.eye(THUMBNAIL**2).view(-1, THUMBNAIL, THUMBNAIL)  # the matrix consists of the windows of these
    cut = torch.stack([sample(pixels, window.expand(len(pixels), 4))[0] for window in windows])
    matrices = F.adaptive_avg_pool2d(cut, DESCRIPTOR).flatten(2)
    return matrices - matrices.mean(2, keepdim=True)


def candidate_pairs(
    thumbnails: Tensor,
    first: Tensor,
    second: Tensor | None,
    mirrored: bool,
    cropped: bool,
    features: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Select pairs of images that may be duplicates.

    An image is paired with its five nearest neighbors by 8x8 pixels of whole images, by the same pixels mirrored, and
    by features, and with ten by 8x8 pixels of windows in it. The number of pairs grows with the number of images only.

    Args:
        thumbnails: fp32 ``[N, 256]``.
        first: int64 ``[A]``, positions of the images of the first set.
        second: int64 ``[B]``, positions of the images of the second set; pairs then have an image of each set. None to
            pair the images of the first set with each other.
        mirrored: whether mirrored copies are searched.
        cropped: whether cropped copies are searched.
        features: fp32 ``[N, F]``; None to select by pixels only.
        device: device of the computation.

    Returns:
        int64 ``[P, 2]``, different pairs of different positions, the smaller position first.
    """
    codes = torch.zeros(0, dtype=torch.int64)
    for queries, bank in [(first, first)] if second is None else [(first, second), (second, first)]:
        if not len(queries) or not len(bank):
            continue
        found = list(_by_pixels(thumbnails[queries], thumbnails[bank], mirrored, cropped, device))
        if features is not None:
            found.append(neighbors(features[bank], features[queries], NEIGHBORS + 1, device)[1])
        for positions in found:  # -1 stands for none
            a, b = queries[:, None].expand_as(positions).flatten(), bank[positions.flatten()]
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            kept = (low < high) & (positions.flatten() >= 0)
            codes = torch.cat([codes, (low * len(thumbnails) + high)[kept]]).unique()
    return torch.stack([codes // max(1, len(thumbnails)), codes % max(1, len(thumbnails))], 1)


def _by_pixels(queries: Tensor, bank: Tensor, mirrored: bool, cropped: bool, device: torch.device) -> Iterator[Tensor]:
    """Positions in the bank of the nearest neighbors of each query, int64 ``[n, k]``.

    An image may be its own neighbor. Positions are -1 where the bank has too few images.
    """
    whole, *parts = descriptor_matrices(search_windows(cropped))
    described, turned = bank @ whole, [queries, flipped(queries)] if mirrored else [queries]
    for thumbnails in turned:
        yield neighbors(described, thumbnails @ whole, NEIGHBORS + 1, device)[1]
    if not parts:
        return
    best = torch.full((len(queries), CROPS), -2.0), torch.full((len(queries), CROPS), -1)
    for thumbnails in turned:
        for part in parts:
            found = neighbors(described, thumbnails @ part, NEIGHBORS + 1, device)
            best = _merged(best, (found[0].cpu(), found[1].cpu()))
    yield best[1]


def _merged(best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The most similar neighbors of both, each position once."""
    same = best[1][:, :, None] == found[1][:, None, :]
    known = (same & (best[0][:, :, None] >= found[0][:, None, :])).any(1)
    better = (same & (best[0][:, :, None] < found[0][:, None, :])).any(2)
    similarity = torch.cat([best[0].masked_fill(better, -2.0), found[0].masked_fill(known, -2.0)], 1)
    values, order = similarity.topk(best[0].shape[1], dim=1)
    positions = torch.cat([best[1].masked_fill(better, -1), found[1].masked_fill(known, -1)], 1)
    return values, positions.gather(1, order)


class Hypotheses:
    """Which window of one image of a pair resembles the other image most, at 8x8 pixels.

    Args:
        mirrored: whether the first image may be mirrored.
        cropped: whether windows other than the whole image are tried, in either image.
        device: device of the computation.
    """

    def __init__(self, mirrored: bool, cropped: bool, device: torch.device) -> None:
        self.mirrored, self.windows = mirrored, search_windows(cropped).to(device)
        self.matrices = descriptor_matrices(search_windows(cropped)).to(device)
        sx, sy, tx, ty = self.windows.unbind(1)
        inverse = torch.stack([1 / sx, 1 / sy, -tx / sx, -ty / sy], 1)
        self.of_first = torch.cat([self.windows, inverse])

    def best(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare pairs of images.

        Args:
            first: fp32 ``[P, 256]``, thumbnails.
            second: fp32 ``[P, 256]``, thumbnails.

        Returns:
            fp32 ``[P]``, correlation of the most similar windows; fp32 ``[P, 4]``, the window of the first image that
            shows the second image; and bool ``[P]``, whether the first image has to be mirrored before.
        """
        theirs = self._descriptors(second)
        tried = []
        for thumbnails in (first, flipped(first)) if self.mirrored else (first,):
            ours = self._descriptors(thumbnails)
            tried += [(ours * theirs[:1]).sum(2), (theirs * ours[:1]).sum(2)]
        similarity, place = torch.cat(tried).max(0)
        count = len(self.of_first)
        return similarity, self.of_first[place % count], place >= count

    def _descriptors(self, thumbnails: Tensor) -> Tensor:
        """Unit-length descriptors fp32 ``[W, P, 64]``."""
        return torch.stack([l2_normalize(thumbnails @ matrix) for matrix in self.matrices])
