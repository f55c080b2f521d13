"""What BatchNorm sees: images in groups, as if on as many devices, and keys in other groups than their queries."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twoview.distributed import gather, rank_and_world
from twoview.errors import UserError


def in_groups(network: Callable[[Tensor], Tensor], views: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
    """What a network makes of each view, all in one pass; or in G passes, one for the images i mod G of every view.

    BatchNorm then sees what it would see on G devices, whatever its kind, and however the network is built.

    Args:
        network: rows to rows.
        views: each ``[N, ...]``.
        groups: G.
    """
    if groups == 1:
        return list(network(torch.cat(list(views))).chunk(len(views)))
    n = len(views[0])
    if n < 2 * groups:
        raise UserError(f"method.bn_groups={groups}: a batch of {n} images on a device leaves groups of fewer than two")
    outputs: list[Tensor] = []
    for g in range(groups):
        parts = network(torch.cat([view[g::groups] for view in views])).chunk(len(views))
        outputs = outputs or [part.new_empty(n, *part.shape[1:]) for part in parts]
        for output, part in zip(outputs, parts, strict=True):
            output[g::groups] = part
    return outputs


def in_shuffled_groups(network: Callable[[Tensor], Tensor], view: Tensor, groups: int = 1) -> Tensor:
    """As :func:`in_groups` for one view of all ranks, each image in another group, and back in order.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.3: what a group's statistics say of its members is of no use then.

    Args:
        network: rows to rows.
        view: ``[N, ...]``.
        groups: of each rank.
    """
    rank, world = rank_and_world()
    everyones = gather(view)
    order = spread(len(everyones), world * groups).to(view.device)
    mine = everyones[order[rank::world]].contiguous(memory_format=torch.channels_last)
    shuffled = gather(in_groups(network, (mine,), groups)[0])
    return shuffled[order.argsort()][rank::world]


def spread(n: int, groups: int) -> Tensor:
    """A permutation of n images that puts the g-th of G stretches where i mod G is g.

    Batches are in random order already, so that a fixed permutation hides as well as a drawn one which images were
    normalised together, and needs no state.

    >>> spread(6, 2).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    order = torch.empty(n, dtype=torch.int64)
    for g, stretch in enumerate(torch.arange(n).tensor_split(groups)):
        order[g::groups] = stretch
    return order
