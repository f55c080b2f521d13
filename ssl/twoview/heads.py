"""Projection heads, which map features ``[N, F]`` to embeddings ``[N, D]`` and are discarded after pretraining."""

from torch import nn

from twoview.errors import require, require_at_least


def projection_head(
    in_dim: int,
    hidden_dim: int = 512,
    out_dim: int = 128,
    layers: int = 2,
    hidden_bn: bool = True,
    last_bn: bool = True,
    last_affine: bool = True,
) -> nn.Sequential:
    """Build a multi-layer perceptron with ReLU between its linear layers.

    SimCLR: 2 or 3 layers, BatchNorm after each (google-research/simclr, model_util.py). MoCo v1: 1 layer. MoCo v2: 2
    layers without BatchNorm (facebookresearch/moco, builder.py). MoCo v3: BatchNorm after each layer, and the last
    BatchNorm has no scale and shift (facebookresearch/moco-v3, builder.py).

    Differs from the code of SimCLR: there the last BatchNorm has a scale but no shift; here it has both or neither.

    Args:
        in_dim: width F of the features.
        hidden_dim: width of the hidden layers, >= 1.
        out_dim: width D of the embeddings, >= 1.
        layers: number of linear layers, 1 to 3.
        hidden_bn: whether BatchNorm follows each hidden layer.
        last_bn: whether BatchNorm follows the last layer.
        last_affine: whether the last BatchNorm has scale and shift.

    Raises:
        UserError: if a width or the number of layers is out of range.

    Example:
        >>> import torch
        >>> projection_head(512, out_dim=64)(torch.zeros(4, 512)).shape
        torch.Size([4, 64])
    """
    require(layers in (1, 2, 3), f"head.layers={layers}: choose 1, 2 or 3")
    require_at_least("head", 1, hidden_dim=hidden_dim, out_dim=out_dim)
    modules: list[nn.Module] = []
    widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
    for i in range(layers):
        last = i == layers - 1
        bn = last_bn if last else hidden_bn
        modules.append(nn.Linear(widths[i], widths[i + 1], bias=not bn))
        if bn:
            modules.append(nn.BatchNorm1d(widths[i + 1], affine=last_affine or not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def output_width(head: nn.Module) -> int:
    """Return the output width D of a head, which is the output width of its last linear layer.

    Raises:
        ValueError: if the head has no linear layer.

    Example:
        >>> output_width(projection_head(512, out_dim=64))
        64
    """
    widths = [module.out_features for module in head.modules() if isinstance(module, nn.Linear)]
    if not widths:
        raise ValueError("the head has no linear layer, so its output width is unknown")
    return widths[-1]
