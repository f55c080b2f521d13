"""Search for duplicates: equal images, candidate pairs, verified pairs, then groups."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from twoview.data.headers import file_size
from twoview.evaluation.progress import part
from twoview.tools.duplicate_candidates import candidate_pairs, thumbnails_of
from twoview.tools.duplicate_groups import Link, Member, equal_images, group
from twoview.tools.duplicate_pairs import NearPairs, is_blank, near_pairs
from twoview.tools.image_sets import ImageSets, SmallCopies

COMBINED = ("mirrored", "cropped", "recolored")  # kinds of which a pair may have several
KINDS = ("re-encoded", "resized", *COMBINED)


class Found(NamedTuple):
    """Result of a search.

    Attributes:
        groups: groups of duplicates.
        pairs: number of pairs by kind; of equal images, each one is paired with the first one only.
        candidates: number of pairs that were verified.
        blank: number of images that were compared by equality only.
    """

    groups: list[list[Member]]
    pairs: dict[str, int]
    candidates: int
    blank: int


def search_duplicates(
    sets: ImageSets, copies: SmallCopies, features: Tensor | None, kinds: Sequence[str], device: torch.device
) -> Found:
    """Search for duplicates in one set, or between two sets.

    Args:
        sets: N images of one or two sets.
        copies: small copies of the images.
        features: fp32 ``[N, F]``, which select further candidates; None to select by pixels only.
        kinds: kinds of duplicates besides equal images, see :data:`KINDS`.
        device: device of the computation.
    """
    blank, two = is_blank(copies.gray), sets.border < len(sets)
    first, second = _different(copies.hashes, blank, sets.border)
    with part("candidates for duplicates"):
        thumbnails, mirrored, cropped = thumbnails_of(copies.gray), "mirrored" in kinds, "cropped" in kinds
        bank = second if two else None
        pairs = candidate_pairs(thumbnails, first, bank, mirrored, cropped, features, device)
    with part("verification of candidates"):
        near = near_pairs(copies, pairs, mirrored, cropped, device)
    links = [*equal_images(copies.hashes), *_links(sets, copies, near, kinds)]
    groups = group(links)
    if two:
        groups = [found for found in groups if found[0].position < sets.border <= found[-1].position]
    grouped = {member.position for found in groups for member in found}
    numbers = Counter(link.kind for link in links if link.first in grouped)
    return Found(groups, dict(numbers), len(pairs), int(blank.sum()))


def _different(hashes: Sequence[bytes], blank: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """Positions in each set of images that are not blank; of equal images in a set, the first one stands for all."""
    sides: list[dict[bytes, int]] = [{}, {}]
    for position, (digest, empty) in enumerate(zip(hashes, blank.tolist(), strict=True)):
        if not empty:
            sides[position >= border].setdefault(digest, position)
    first, second = (torch.tensor(list(side.values()), dtype=torch.int64) for side in sides)
    return first, second


def _links(sets: ImageSets, copies: SmallCopies, near: NearPairs, kinds: Sequence[str]) -> Iterator[Link]:
    """Pairs of near duplicates whose kinds are all searched."""
    size = cache(partial(_size, sets, copies))
    columns = (near.pairs.tolist(), near.distance.tolist(), near.mirrored.tolist(), near.cropped.tolist())
    for (first, second), distance, *flags in zip(*columns, near.recolored.tolist(), strict=True):
        if copies.hashes[first] == copies.hashes[second]:  # in different sets
            continue
        found = [kind for kind, applies in zip(COMBINED, flags, strict=True) if applies]
        if not found:
            found = ["resized" if size(first) != size(second) else "re-encoded"]
        if set(found) <= set(kinds):
            yield Link(first, second, "+".join(found), distance)


def _size(sets: ImageSets, copies: SmallCopies, position: int) -> tuple[int, ...]:
    """Height and width of the file of an image; of the image as it is stored here, if it is not a file."""
    return file_size(sets.name(position)) or tuple(copies.sizes[position].tolist())
