"""Features of images, without augmentation."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from twoview.data import Images, in_order


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: Images,
    preprocess: nn.Module,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Tensor:
    """Features of clean images; leaves every weight, statistic and mode of the backbone as it was.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``, in any mode.
        images: the images, in memory or not.
        preprocess: ``uint8 [N, C, H, W] -> fp32 [N, C, h, w]``.
        device: where to compute.
        batch_size: images at a time.

    Returns:
        fp32 ``[N, F]`` on the CPU.
    """
    preprocess.to(device)
    with evaluating(backbone, device) as features_of:
        return torch.cat([features_of(preprocess(batch.pixels.to(device))) for batch in in_order(images, batch_size)])


@contextlib.contextmanager
def evaluating(backbone: nn.Module, device: torch.device | str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, ``fp32 [N, C, h, w] -> fp32 [N, F]`` on the CPU; the backbone's modes come back after it."""
    modes, where = {module: module.training for module in backbone.modules()}, torch.device(device)
    backbone.to(where).eval()

    @torch.no_grad()
    def features_of(pixels: Tensor) -> Tensor:
        with torch.autocast(where.type, enabled=False):
            features: Tensor = backbone(pixels.to(where, memory_format=torch.channels_last))
        return features.float().cpu()

    try:
        yield features_of
    finally:
        for module, mode in modes.items():
            module.training = mode
