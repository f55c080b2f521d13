"""Registration: which window of an image shows the same as another image, at the precision of a fraction of a pixel.

A window is ``(sx, sy, tx, ty)``: the point (x, y) of the other image lies at (sx * x + tx, sy * y + ty) of the image,
where coordinates run from -1 to 1 over the width and the height. The whole image is the window (1, 1, 0, 0); a scale
above 1 is a window that reaches beyond the image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = (16, 32, 64)  # heights and widths in pixels, one after the other
STEPS = 5  # per level
MAX_STEP = 0.1  # change of a scale or an offset in one step
SCALES = (0.6, 1.6)
MAX_OFFSET = 0.5


def sample(images: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Cut windows out of images, by bilinear interpolation.

    Args:
        images: fp32 ``[N, S, S]``.
        windows: fp32 ``[N, 4]``, one window for each image.

    Returns:
        fp32 ``[N, S, S]``, the windows scaled to the size of the images; and fp32 ``[N, S, S]``, 1 for pixels inside of
        the image and 0 outside, where the nearest pixel is repeated.

    Example:
        >>> image = torch.arange(16.0).view(1, 4, 4)
        >>> cut, inside = sample(image, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))  # the lower right quarter
        >>> cut[0, 1:3, 1:3].tolist(), bool(inside.all())
        ([[11.25, 11.75], [13.25, 13.75]], True)
    """
    size = images.shape[-1]
    line = _line(size, images.device)
    x = windows[:, 0, None] * line + windows[:, 2, None]
    y = windows[:, 1, None] * line + windows[:, 3, None]
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    inside = (x.abs() <= 1)[:, None] & (y.abs() <= 1)[:, :, None]
    cut = F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)
    return cut[:, 0], inside.to(images.dtype)


def register(images: Tensor, others: Tensor, windows: Tensor) -> Tensor:
    """Refine windows so that they show the same as other images.

    The squared difference is minimized over the four numbers of the window, and brightness and contrast of the image,
    by Gauss-Newton steps at three resolutions (Lucas and Kanade, "An iterative image registration technique", 1981;
    with brightness and contrast as Evangelidis and Psarakis, "Parametric image alignment using enhanced correlation
    coefficient maximization", 2008). A start that is off by up to a tenth of the image converges for photographs.

    Args:
        images: fp32 ``[N, 64, 64]`` in [0, 255].
        others: fp32 ``[N, 64, 64]`` in [0, 255].
        windows: fp32 ``[N, 4]``, first estimates.

    Returns:
        fp32 ``[N, 4]``, scales in 0.6 to 1.6, offsets in -0.5 to 0.5.
    """
    windows = windows.clone()
    for size in LEVELS:
        small, target = (F.adaptive_avg_pool2d(x, size) for x in (images, others))
        line = _line(size, images.device)
        for _ in range(STEPS):
            cut, inside = sample(small, windows)
            dy, dx = torch.gradient(cut, spacing=2 / size, dim=(1, 2))
            dx, dy = dx / windows[:, 0, None, None], dy / windows[:, 1, None, None]  # in coordinates of the image
            columns = [dx * line, dy * line[:, None], dx, dy, cut, torch.ones_like(cut)]
            windows += _step(torch.stack(columns, -1).flatten(1, 2), target.flatten(1), inside.flatten(1))
            windows[:, :2].clamp_(*SCALES)
            windows[:, 2:].clamp_(-MAX_OFFSET, MAX_OFFSET)
    return windows


def _step(columns: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Change of the windows ``[N, 4]`` that least squares give, with contrast and brightness as further unknowns."""
    weighted = (columns * inside[:, :, None]).transpose(1, 2)
    normal = weighted @ columns
    diagonal = normal.diagonal(dim1=1, dim2=2)
    normal = normal + torch.diag_embed(1e-4 * diagonal + 1e-6)  # images without detail determine no window
    solution: Tensor = torch.linalg.solve_ex(normal, weighted @ target[:, :, None]).result
    contrast = solution[:, 4]
    contrast = torch.where(contrast.abs() < 0.1, 0.1, contrast)
    return (solution[:, :4, 0] / contrast).nan_to_num(0.0).clamp(-MAX_STEP, MAX_STEP)


def _line(size: int, device: torch.device) -> Tensor:
    """Coordinates of the centers of pixels, from -1 to 1."""
    return (torch.arange(size, device=device) + 0.5) * 2 / size - 1
