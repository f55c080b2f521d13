"""BatchNorm over groups of images, as on several devices, and shuffled BatchNorm."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twoview.distributed import gather, rank_and_world
from twoview.errors import require


def in_groups(network: Callable[[Tensor], Tensor], views: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
    """Apply a network to all views, in one pass per group of images.

    Image i of each view belongs to group i mod G. BatchNorm normalizes each group separately, as on G devices.

    Args:
        network: network, ``[M, ...] -> [M, ...]``.
        views: V tensors ``[N, ...]``.
        groups: number G of groups.

    Returns:
        V outputs ``[N, ...]``, with rows in the order of the input.

    Raises:
        UserError: if a group would have fewer than two images.
    """
    if groups == 1:
        return list(network(torch.cat(list(views))).chunk(len(views)))
    n = len(views[0])
    message = f"a batch of {n} images on a device leaves groups of fewer than two images"
    require(n >= 2 * groups, f"method.bn_groups={groups}: {message}")
    outputs: list[Tensor] = []
    for g in range(groups):
        parts = network(torch.cat([view[g::groups] for view in views])).chunk(len(views))
        outputs = outputs or [part.new_empty(n, *part.shape[1:]) for part in parts]
        for output, part in zip(outputs, parts, strict=True):
            output[g::groups] = part
    return outputs


def in_shuffled_groups(network: Callable[[Tensor], Tensor], view: Tensor, groups: int = 1) -> Tensor:
    """Apply a network to one view with shuffled BatchNorm.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.3. The images of all ranks are permuted, encoded by
    :func:`in_groups`, and put back in order. BatchNorm thus normalizes a query and its key with different images.

    Args:
        network: network, ``[M, ...] -> [M, ...]``.
        view: ``[N, ...]``, the images of this rank.
        groups: number of groups per rank.

    Returns:
        Output ``[N, ...]`` for the images of this rank, with rows in the order of the input.

    Raises:
        UserError: if a group would have fewer than two images.
    """
    rank, world = rank_and_world()
    everyones = gather(view)
    order = spread(len(everyones), world * groups, view.device)
    mine = everyones[order[rank::world]].contiguous(memory_format=torch.channels_last)
    shuffled = gather(in_groups(network, (mine,), groups)[0])
    return shuffled[order.argsort()][rank::world]


def spread(n: int, groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a permutation of n images that moves the g-th of G contiguous parts to group g, as in :func:`in_groups`.

    A fixed permutation suffices, since the images of a batch are already in random order.

    Args:
        n: number of images.
        groups: number G of groups.
        device: device of the result, which is computed there.

    Returns:
        int64 ``[n]``; element i is the image that moves to position i.

    Example:
        >>> spread(6, 2).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    position = torch.arange(n, device=device)
    group = position % groups
    # The first n mod G parts have one image more than the others.
    return group * (n // groups) + group.clamp(max=n % groups) + position // groups
