"""Groups of images that are linked by pairs of duplicates."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """A pair of duplicates: positions of both images, kind, and distance in gray levels."""

    first: int
    second: int
    kind: str
    distance: float


class Member(NamedTuple):
    """An image of a group: its position, and the pair with the smallest distance that it is a part of."""

    position: int
    closest: int
    kind: str
    distance: float


def equal_images(keys: Sequence[Hashable]) -> list[Link]:
    """Link each image to the first image with the same key; the number of links is at most the number of images.

    Example:
        >>> equal_images("abca")
        [Link(first=0, second=3, kind='equal', distance=0.0)]
    """
    first: dict[Hashable, int] = {}
    places = ((first.setdefault(key, position), position) for position, key in enumerate(keys))
    return [Link(start, position, "equal", 0.0) for start, position in places if start != position]


def group(links: Iterable[Link]) -> list[list[Member]]:
    """Join images that are linked, directly or by other images, to groups.

    Args:
        links: pairs of duplicates.

    Returns:
        Groups in the order of their first images, with their images in order.

    Example:
        >>> first, second = group([Link(5, 6, "equal", 0.0), Link(0, 2, "resized", 3.0), Link(2, 4, "cropped", 1.0)])
        >>> [member.position for member in first], second[0].closest
        ([0, 2, 4], 6)
        >>> first[1]
        Member(position=2, closest=4, kind='cropped', distance=1.0)
    """
    parent: dict[int, int] = {}
    best: dict[int, Member] = {}

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = position = parent[parent[position]]  # shortens the way for later calls
        return position

    for first, second, kind, distance in links:
        for position, other in ((first, second), (second, first)):
            parent.setdefault(position, position)
            if position not in best or distance < best[position].distance:
                best[position] = Member(position, other, kind, distance)
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    groups: dict[int, list[Member]] = {}
    for position in sorted(parent):
        groups.setdefault(root(position), []).append(best[position])
    return list(groups.values())
