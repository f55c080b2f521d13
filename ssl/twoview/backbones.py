"""Any timm network as a feature extractor: images ``[N, C, H, W]`` to features ``[N, F]``."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from safetensors.torch import load_file
from timm.models.resnet import ResNet
from torch import Tensor, nn

from twoview.errors import UserError

log = logging.getLogger(__name__)

Stem = Literal["auto", "timm", "small", "small_stride2"]
SMALL_IMAGE = 64
# Networks that timm lacks, as one of timm's with other arguments, and their stem for small images.
OURS: dict[str, tuple[str, dict[str, Any], Stem]] = {
    # One block a stage and a stride in the stem: residual networks that a CPU trains in minutes.
    "resnet10": ("resnet18", {"layers": [1, 1, 1, 1]}, "small_stride2"),
    "resnet10_narrow": (
        "resnet18",
        {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_width": 32},
        "small_stride2",
    ),
}


def create_backbone(
    name: str,
    in_chans: int = 3,
    image_size: int = 32,
    stem: Stem = "auto",
    weights: str | Path | None = None,
    pretrained: bool = False,
    partial_weights: bool = False,
    options: Mapping[str, Any] | None = None,
    small_patches: bool = True,
) -> tuple[nn.Module, int]:
    """Build a timm network without its classifier.

    Args:
        name: any name in ``timm.list_models()``, or "resnet10": timm's resnet18 with one block a stage, or
            "resnet10_narrow": that with half the channels.
        in_chans: channels of the images, >= 1.
        image_size: height and width of the images in pixels; transformers are built for it.
        stem: how a residual network begins. "timm": as published (7x7 at stride 2 and max-pooling: a 32-pixel image is
            left with 1x1 positions); "small": stride 1 and no pooling, as SimCLR does for CIFAR-10 (arXiv:2002.05709,
            B.9); "small_stride2": stride 2 and no pooling, a quarter of the cost; "auto": "small" ("small_stride2" for
            the resnet10s) at 64 pixels and below unless weights are loaded, else "timm". Networks of
            other families have "auto" and "timm" alone.
        weights: local file of weights, ``.safetensors`` or a PyTorch file of plain tensors.
        pretrained: load timm's published weights.
        partial_weights: allow ``weights`` that do not cover every tensor of the network.
        options: further arguments of the timm constructor, such as ``{"drop_path_rate": 0.1}``.
        small_patches: transformers have eight patches a side at 64 pixels and below, unless weights are loaded.

    Returns:
        The network and the width F of its features, measured by a dry run. ``network.build_arguments`` are plain
        values with which this function builds the same architecture at random initialisation.

    Raises:
        UserError: an unknown name, an image size or option that the network refuses, weights that do not fit.
    """
    given: str = name
    auto_stem: Stem = "small"
    if name in OURS:
        name, defaults, auto_stem = OURS[name]
        options = {**defaults, **(options or {})}
    if not timm.is_model(name):
        raise UserError(f"backbone.name={name}: timm has no such network; {_nearest(name)}")
    if stem not in get_args(Stem):
        raise UserError(f"backbone.stem={stem}: choose one of {', '.join(get_args(Stem))}")
    if in_chans < 1:
        raise UserError(f"data.channels={in_chans}: must be at least 1")
    network, used = _build(
        name, in_chans, image_size, pretrained, small_patches and not (weights or pretrained), options=options
    )
    if stem == "auto":
        small = isinstance(network, ResNet) and image_size <= SMALL_IMAGE and not (weights or pretrained)
        stem = auto_stem if small else "timm"
    if stem != "timm":
        _use_small_stem(network, name, stride=2 if stem == "small_stride2" else 1)
    if weights is not None:
        _load_weights(network, Path(weights), partial_weights)
    network.build_arguments = {  # type: ignore[assignment]
        "name": name,
        "in_chans": in_chans,
        "image_size": image_size,
        "stem": stem,
        "options": {**(options or {}), **used},
        "small_patches": small_patches and not (weights or pretrained),
    }
    return network, feature_width(network, in_chans, image_size, given)


def at_random(arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """The network of :func:`build_arguments` at random initialisation; torch's generator is left as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return create_backbone(**arguments)[0]


def published_input(name: str) -> tuple[int, list[float], list[float]]:
    """Image size in pixels, and means and deviations of the channels, that timm's weights of a network were made for.

    Raises:
        UserError: an unknown name.
    """
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        raise UserError(f"checkpoint=timm:{name}: timm has no published weights of that name; {_nearest(name)}")
    return known.input_size[-1], list(known.mean), list(known.std)


def build_arguments(network: nn.Module) -> dict[str, Any]:
    """The plain values with which :func:`create_backbone` builds this network's architecture again."""
    return cast(dict[str, Any], network.build_arguments)


@torch.no_grad()
def feature_width(network: nn.Module, in_chans: int, image_size: int, name: str = "") -> int:
    """Width of the features of one image, by a dry run: timm's ``num_features`` is another number for some networks.

    Raises:
        UserError: the network cannot take images of this size, or does not give ``[N, F]``.
    """
    was_training = network.training
    try:
        features = network.eval()(torch.zeros(2, in_chans, image_size, image_size))
    except Exception as error:
        raise UserError(
            f"data.image_size={image_size}: {name} cannot run on images of {in_chans}x{image_size}x{image_size} "
            f"({str(error).splitlines()[0]}); choose another data.image_size, backbone.name or backbone.options"
        ) from error
    finally:
        network.train(was_training)
    if features.ndim != 2:
        raise UserError(
            f"backbone.name={name}: gives features of shape {list(features.shape)}, not one vector an image"
        )
    return int(features.shape[1])


def is_depthwise(network: nn.Module) -> bool:
    """Whether most convolutions are depthwise or grouped: these run slower, not faster, in bf16 on a CPU."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return sum(m.groups > 1 for m in convolutions) > len(convolutions) / 2


def _build(
    name: str, in_chans: int, image_size: int, pretrained: bool, from_scratch: bool, options: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, int]]:
    """The network, and the patch size that it was given if it was."""
    arguments = {"num_classes": 0, "in_chans": in_chans, "pretrained": pretrained, **(options or {})}
    sizes: list[dict[str, int]] = [{"img_size": image_size}, {}]
    if from_scratch and image_size <= SMALL_IMAGE and "patch_size" not in arguments:
        # Eight patches a side: ViT-S/16 for 224 pixels has 14, but at 32 pixels it would have 2.
        sizes.insert(0, {"img_size": image_size, "patch_size": max(1, image_size // 8)})
    for size in sizes:
        try:
            network: nn.Module = timm.create_model(name, **arguments, **size)
        except OSError as error:
            raise UserError(
                f"backbone.pretrained=true: no published weights of {name} could be fetched ({error}); "
                "check the network, or give a local file as backbone.weights=FILE"
            ) from error
        except Exception as error:  # this family has no such argument, or takes no such size
            if size:
                continue
            raise UserError(
                f"backbone.name={name} cannot be built with backbone.options={dict(options or {})} ({error})"
            ) from error
        else:
            return network, {k: v for k, v in size.items() if k == "patch_size"}
    raise AssertionError("the last attempt passes no size")


def _use_small_stem(network: nn.Module, name: str, stride: int) -> None:
    if not isinstance(network, ResNet):
        raise UserError(f"backbone.stem: {name} is no residual network of timm's ResNet family; use backbone.stem=auto")
    first = network.conv1
    if isinstance(first, nn.Sequential):  # a deep stem is 3x3 already
        first[0].stride = (stride, stride)  # type: ignore[assignment]
    else:
        small = nn.Conv2d(first.in_channels, first.out_channels, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        network.conv1 = small
    network.maxpool = nn.Identity()


def _load_weights(network: nn.Module, file: Path, partial: bool) -> None:
    found = read_tensors(file)
    wanted = network.state_dict()
    matching = _best_match(found, wanted)
    missing = [key for key in wanted if key not in matching]
    log.info("backbone.weights=%s: %d of %d tensors matched", file, len(matching), len(wanted))
    if missing and not (partial and matching):
        raise UserError(
            f"backbone.weights={file}: {len(matching)} of {len(wanted)} tensors of the network matched "
            f"(missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); use the network they were "
            "made for, or backbone.partial_weights=true to leave the rest at random"
        )
    network.load_state_dict(matching, strict=False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or PyTorch file, by name; nothing else in it is ever executed.

    Raises:
        UserError: the file is missing or holds no plain tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"backbone.weights={file}: there is no such file") from None
    except Exception as error:
        raise UserError(f"backbone.weights={file}: not a file of plain tensors ({type(error).__name__})") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in tensors if isinstance(value, Tensor)}


def _best_match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the wanted names, with whichever prefix ("module.", "method.backbone.") fits most of them."""
    last = list(wanted)[-1]
    prefixes = {key.removesuffix(last) for key in found if key.endswith(last)} | {""}
    matches = [
        {
            key: found[p + key]
            for key, value in wanted.items()
            if p + key in found and found[p + key].shape == value.shape
        }
        for p in prefixes
    ]
    return max(matches, key=len)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, [*timm.list_models(), *OURS], n=3)
    return f"did you mean {' or '.join(near)}?" if near else "see timm.list_models() for the names"


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Every BatchNorm replaced by one that sees all ranks; timm's own conversion keeps activations inside them."""
    return cast(nn.Module, timm.layers.convert_sync_batchnorm(module))
