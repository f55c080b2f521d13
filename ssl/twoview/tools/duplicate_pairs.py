"""Verification of candidate pairs on their pixels: which of them are near duplicates, and of which kind."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.evaluation.pixel_pairs import agreement, is_near
from twoview.evaluation.progress import track
from twoview.tools.duplicate_candidates import Hypotheses, thumbnails_of
from twoview.tools.image_sets import COLOR_SIDE, SmallCopies
from twoview.tools.registration import register, sample

BLOCK = 1024  # pairs that are compared at once
MIN_SIMILARITY = 0.7  # of 8x8 pixels, below which a pair is not registered
MIN_OVERLAP = 0.5  # share of the second image that both images of a pair show
MIN_DETAIL = 0.9  # correlation within patches
PATCH = 8  # height and width in pixels of a patch
MIN_SHIFT = 0.04  # of an edge of a crop, in halves of the image: 2 % of width or height
MAX_CHROMA_DIFFERENCE = 8.0  # RMS, in levels of 255
MAX_LIGHT_DIFFERENCE = 12.0  # RMS of what equal brightness and contrast remove, in levels of 255
MIN_CONTRAST = 4.0  # standard deviation in gray levels, below which images are blank


class NearPairs(NamedTuple):
    """Pairs of near duplicates.

    Attributes:
        pairs: int64 ``[M, 2]``, positions of the images.
        distance: fp32 ``[M]``, RMS difference of the pixels that both images show, in gray levels, after brightness and
            contrast have been made equal.
        mirrored: bool ``[M]``, whether one image is mirrored.
        cropped: bool ``[M]``, whether the images show different parts.
        recolored: bool ``[M]``, whether brightness, contrast or colors differ.
    """

    pairs: Tensor
    distance: Tensor
    mirrored: Tensor
    cropped: Tensor
    recolored: Tensor


class _Compared(NamedTuple):
    """Fields of :class:`NearPairs` of pairs that may be near duplicates; and what decides, fp32 ``[n]`` each."""

    distance: Tensor
    mirrored: Tensor
    cropped: Tensor
    recolored: Tensor
    correlation: Tensor
    detail: Tensor


def is_blank(gray: Tensor) -> Tensor:
    """Return which images have nearly one gray level, so that their correlation with others says nothing.

    Args:
        gray: uint8 ``[N, 64, 64]``.

    Returns:
        bool ``[N]``, whether the standard deviation is below 4 gray levels.
    """
    parts = (part.float().flatten(1) for part in gray.split(4096))
    return torch.cat([part.square().mean(1) - part.mean(1).square() < MIN_CONTRAST**2 for part in parts])


def near_pairs(copies: SmallCopies, pairs: Tensor, mirrored: bool, cropped: bool, device: torch.device) -> NearPairs:
    """Select the near duplicates among candidate pairs.

    The images of a pair are registered (see :func:`twoview.tools.registration.register`) if crops are searched, and
    compared at 64x64 pixels. A pair is a near duplicate if all of these conditions hold:

    * the conditions of :func:`twoview.evaluation.pixel_pairs.is_near`, where the typical difference of a pair is the
      median of all pairs with one of its images, and the smaller one of the two images;
    * the correlation within patches of 8x8 pixels, averaged with their contrasts as weights, is above 0.9;
    * the images have at least half of the pixels in common.

    Args:
        copies: small copies of N images.
        pairs: int64 ``[P, 2]``, positions of the images of each candidate pair.
        mirrored: whether the first image may be mirrored.
        cropped: whether the images may show different parts.
        device: device of the computation.
    """
    if not len(pairs):
        none = torch.zeros(0, dtype=torch.bool)
        return NearPairs(pairs, torch.zeros(0), none, none, none)
    hypotheses = Hypotheses(mirrored, cropped, device)
    blocks = [_compare(copies, block, hypotheses, cropped, device) for block in track(pairs.split(BLOCK))]
    found = _Compared(*(torch.cat(column).cpu() for column in zip(*blocks, strict=True)))
    near = is_near(found.distance, found.correlation, _typical(pairs, found.distance)) & (found.detail > MIN_DETAIL)
    return NearPairs(pairs[near], *(column[near] for column in found[:4]))


def _compare(
    copies: SmallCopies, pairs: Tensor, hypotheses: Hypotheses, cropped: bool, device: torch.device
) -> _Compared:
    """Compare a block of pairs; those that cannot be near duplicates have an infinite distance."""
    ours, theirs = (copies.gray[pairs[:, i]].to(device).float() for i in (0, 1))
    similarity, windows, mirrored = hypotheses.best(thumbnails_of(ours), thumbnails_of(theirs))
    distance = torch.full_like(similarity, torch.inf)
    correlation, detail = torch.zeros_like(similarity), torch.zeros_like(similarity)
    recolored = torch.zeros_like(mirrored)
    rows = (similarity > MIN_SIMILARITY).nonzero().flatten()
    if not len(rows):
        return _Compared(distance, mirrored, recolored, recolored, correlation, detail)
    turned = mirrored[rows, None, None]
    ours, theirs = torch.where(turned, ours[rows].flip(2), ours[rows]), theirs[rows]
    if cropped:
        windows[rows] = register(ours, theirs, windows[rows])
    cut, inside = sample(ours, windows[rows])
    found = agreement(cut.flatten(1), theirs.flatten(1), inside.flatten(1))
    correlation[rows], detail[rows] = found.correlation, _detail(cut, theirs, inside)
    # What least squares leave once brightness and contrast of the weaker image are adapted to the stronger one.
    adapted = found.contrast * (1 - found.correlation.square()).clamp(min=0).sqrt()
    distance[rows] = torch.where(inside.mean((1, 2)) >= MIN_OVERLAP, adapted, torch.inf)
    light = (found.difference.square() - adapted.square()).clamp(min=0).sqrt()
    first, second = (copies.color[pairs[rows.cpu(), i]].to(device).float() for i in (0, 1))
    first = torch.where(turned[..., None], first.flip(3), first)
    chroma = _chroma_difference(first, second, windows[rows])
    recolored[rows] = (chroma > MAX_CHROMA_DIFFERENCE) | (light > MAX_LIGHT_DIFFERENCE)
    moved = ((1 - windows[:, :2]).abs() + windows[:, 2:].abs()).amax(1) > MIN_SHIFT  # of the edges
    return _Compared(distance, mirrored, moved, recolored, correlation, detail)


def _detail(ours: Tensor, theirs: Tensor, inside: Tensor) -> Tensor:
    """Correlation within patches of images fp32 ``[n, 64, 64]``, averaged with the contrasts of the patches."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, None], PATCH).flatten(1)

    whole = mean(inside) == 1
    a, b = mean(ours), mean(theirs)
    covariance = mean(ours * theirs) - a * b
    contrasts = ((mean(ours.square()) - a.square()) * (mean(theirs.square()) - b.square())).clamp(min=0).sqrt()
    return (covariance * whole).sum(1) / (contrasts * whole).sum(1).clamp(min=1)


def _chroma_difference(ours: Tensor, theirs: Tensor, windows: Tensor) -> Tensor:
    """RMS difference fp32 ``[n]`` of colors fp32 ``[n, 3, 16, 16]`` less their mean, where both images show something.

    Chroma is smooth, so that few pixels are enough.
    """
    ours, theirs = ((x - x.mean(1, keepdim=True)).flatten(0, 1) for x in (ours, theirs))
    cut, inside = sample(ours, windows.repeat_interleave(3, 0))
    squares, inside = (x.reshape(-1, 3 * COLOR_SIDE**2).sum(1) for x in ((cut - theirs).square() * inside, inside))
    return (squares / inside.clamp(min=1)).sqrt()


def _typical(pairs: Tensor, distance: Tensor) -> Tensor:
    """Median distance of the candidate pairs of an image, and the smaller one of both images of a pair, ``[P]``."""
    images, twice = pairs.T.flatten(), distance.repeat(2)
    order = twice.argsort()
    order = order[images[order].argsort(stable=True)]  # by image, then by distance
    _, place, counts = images.unique(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    medians = twice[order][starts + (counts - 1) // 2]
    return torch.minimum(*medians[place].view(2, -1))
