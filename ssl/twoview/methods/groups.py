"""BatchNorm over groups of images, as on several devices, and regrouping of keys (shuffled BatchNorm)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twoview.distributed import gather, rank_and_world
from twoview.errors import require


def in_groups(network: Callable[[Tensor], Tensor], views: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
    """Apply a network to all views in one pass, or in G passes, one for the images i mod G of every view.

    With G passes, BatchNorm sees what it would see on G devices.

    Args:
        network: maps ``[M, ...]`` to ``[M, ...]``.
        views: each ``[N, ...]``.
        groups: number G of groups.

    Returns:
        The output for each view, ``[N, ...]``, rows in the order of the input.

    Raises:
        UserError: groups of fewer than two images.
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
    """As :func:`in_groups` for one view of all ranks, with the images regrouped before and reordered after.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.3: a query and its key are then normalized with different images.

    Args:
        network: maps ``[M, ...]`` to ``[M, ...]``.
        view: ``[N, ...]``.
        groups: number of groups of each rank.
    """
    rank, world = rank_and_world()
    everyones = gather(view)
    order = spread(len(everyones), world * groups).to(view.device)
    mine = everyones[order[rank::world]].contiguous(memory_format=torch.channels_last)
    shuffled = gather(in_groups(network, (mine,), groups)[0])
    return shuffled[order.argsort()][rank::world]


def spread(n: int, groups: int) -> Tensor:
    """Permutation of n images that moves the g-th of G contiguous parts to the positions i with i mod G = g.

    Batches are in random order already, so a fixed permutation mixes the groups as well as a random one, without state.

    Example:
        >>> spread(6, 2).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    order = torch.empty(n, dtype=torch.int64)
    for g, stretch in enumerate(torch.arange(n).tensor_split(groups)):
        order[g::groups] = stretch
    return order
