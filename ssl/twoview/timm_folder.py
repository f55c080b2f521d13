"""Folders that timm loads by itself, in its local-dir format, or by a script of a few lines beside the weights."""

import math
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from twoview.backbones import build_arguments, timm_arguments

CONFIG, WEIGHTS, LOADER = "config.json", "model.safetensors", "load.py"

# timm cannot name these networks: no argument of its ResNet replaces the first convolution or removes the pooling.
_LOADER = '''"""Load the network in this folder with torch and timm. timm has no name for its stem for small images."""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn


def load_network(folder=Path(__file__).parent):
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    network = timm.create_model(config["timm_architecture"], **config["model_args"])
    {stem}
    network.maxpool = nn.Identity()
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return network.eval()
'''


def timm_config(
    network: nn.Module, image_size: int, resize_size: int | None, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Return the content of ``config.json`` in the local-dir format of timm.

    Args:
        network: a network created by :func:`twoview.backbones.create_backbone`.
        image_size: height and width of its input in pixels.
        resize_size: height and width that the center square is resized to before the center crop; None for
            ``image_size``.
        mean: mean of each of the C channels on the scale [0, 1].
        std: standard deviation of each channel on the same scale.

    Returns:
        Plain values. If :func:`loader_script` returns a script, ``architecture`` is a name that timm refuses, so that
        it never builds a network with another stem, and ``timm_architecture`` is the name that the script uses.

    Example:
        >>> from twoview.backbones import create_backbone
        >>> config = timm_config(create_backbone("test_vit", image_size=32)[0], 32, 37, (0.5,) * 3, (0.25,) * 3)
        >>> config["architecture"], config["model_args"]["patch_size"], config["pretrained_cfg"]["input_size"]
        ('test_vit', 4, [3, 32, 32])
    """
    name, arguments = timm_arguments(network)
    name = name.partition(".")[0]  # timm accepts any tag of published weights behind the dot
    published: Any = network.pretrained_cfg
    pretrained_cfg = {
        "input_size": [arguments["in_chans"], image_size, image_size],
        "fixed_input_size": published.get("fixed_input_size", False),
        "interpolation": "bilinear",
        "crop_pct": _crop_share(image_size, resize_size or image_size),
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": published.get("first_conv"),
        "classifier": published.get("classifier"),
    }
    stem = build_arguments(network)["stem"]
    named = {"architecture": name}
    if stem != "timm":
        named = {"architecture": f"{name}_{stem}_stem", "timm_architecture": name}
    return {**named, "num_classes": 0, "model_args": arguments, "pretrained_cfg": pretrained_cfg}


def loader_script(network: nn.Module) -> str | None:
    """Return a script that loads the network with torch and timm; None if timm loads it by its name.

    Args:
        network: a network created by :func:`twoview.backbones.create_backbone`.

    Example:
        >>> from twoview.backbones import create_backbone
        >>> loader_script(create_backbone("resnet18", image_size=224)[0]) is None
        True
    """
    if build_arguments(network)["stem"] == "timm":
        return None
    first = cast(nn.Sequential | nn.Conv2d, network.conv1)
    if isinstance(first, nn.Sequential):
        return _LOADER.format(stem=f"network.conv1[0].stride = {cast(nn.Conv2d, first[0]).stride}")
    shape = f"{first.in_channels}, {first.out_channels}, {first.kernel_size[0]}, {first.stride[0]}, {first.padding[0]}"
    return _LOADER.format(stem=f"network.conv1 = nn.Conv2d({shape}, bias=False)")


def load_without_twoview(folder: Path) -> nn.Module:
    """Load the network as a user without twoview does. The script in the folder, if there is one, is executed.

    Args:
        folder: a folder that this process has written.

    Returns:
        The network in evaluation mode.
    """
    if (folder / LOADER).exists():
        return cast(nn.Module, runpy.run_path(str(folder / LOADER))["load_network"]())
    return cast(nn.Module, timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()


def _crop_share(image_size: int, resize_size: int) -> float:
    """Return the share that timm divides the size by, which must give back ``resize_size`` when rounded down."""
    share = image_size / resize_size
    return share if math.floor(image_size / share) == resize_size else math.nextafter(share, 0)
