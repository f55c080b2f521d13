"""Features of images, once, without augmentation."""

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
    modes = {module: module.training for module in backbone.modules()}
    backbone.to(device).eval()
    preprocess.to(device)
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            parts = [
                backbone(preprocess(batch.pixels.to(device)).to(memory_format=torch.channels_last)).float().cpu()
                for batch in in_order(images, batch_size)
            ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(parts)
