"""timm networks as feature extractors, which map images ``[N, C, H, W]`` to features ``[N, F]``."""

import difflib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from twoview.devices import explained_memory, require_memory
from twoview.errors import UserError, require, require_at_least, require_choice
from twoview.recomputation import recompute_activations, update_statistics_once, updates_statistics_once
from twoview.torch_files import load_safetensors, load_torch

log = logging.getLogger(__name__)

Stem = Literal["auto", "timm", "small", "small_stride2"]
SMALL_IMAGE = 64
# One block per stage. With stride 2 in the stem, the network trains on a CPU in minutes.
_RESNET10: dict[str, Any] = {"layers": [1, 1, 1, 1]}
# Additional networks: name of the timm network, arguments that differ, and stem for small images.
OURS: dict[str, tuple[str, dict[str, Any], Stem]] = {
    "resnet10": ("resnet18", _RESNET10, "small_stride2"),
    "resnet10_narrow": ("resnet18", _RESNET10 | {"channels": [32, 64, 128, 256], "stem_width": 32}, "small_stride2"),
}


def create_backbone(  # noqa: PLR0913
    name: str = "resnet10_narrow",
    in_chans: int = 3,
    image_size: int = 32,
    stem: Stem = "auto",
    weights: str | Path | None = None,
    pretrained: bool = False,
    partial_weights: bool = False,
    options: Mapping[str, Any] = {},
    checkpointing: bool = False,
) -> tuple[nn.Module, int]:
    """Create a timm network without its classifier.

    Args:
        name: a name in ``timm.list_models()``; "resnet10", which is the resnet18 of timm with one block per stage; or
            "resnet10_narrow", which is resnet10 with half the channels.
        in_chans: number of channels C of the images, >= 1.
        image_size: height and width of the images in pixels; transformers are built for this size.
        stem: first layers of the network, which can be adapted to small images.

            * "timm": the published layers. The stem of a ResNet is a 7x7 convolution of stride 2 and max-pooling; the
              last feature map of a 32-pixel image then has 1x1 positions.
            * "small", for ResNets only: 3x3 convolution of stride 1 without pooling, as in SimCLR on CIFAR-10
              (arXiv:2002.05709, appendix B.9).
            * "small_stride2", for ResNets only: 3x3 convolution of stride 2 without pooling, a quarter of the cost.
            * "auto": "timm" for images above 64 pixels or if weights are loaded. Otherwise "small_stride2" for resnet10
              and resnet10_narrow, "small" for other ResNets, and for transformers a patch size of an eighth of
              ``image_size``.
        weights: local file with weights, ``.safetensors`` or a PyTorch file of plain tensors; None to load no file.
        pretrained: whether to load the weights published by timm.
        partial_weights: whether ``weights`` may lack some tensors of the network; these tensors are then initialized at
            random.
        options: further arguments of the timm constructor, such as ``{"drop_path_rate": 0.1}``.
        checkpointing: whether activations are computed again in the backward pass, instead of being kept in memory. All
            results, running statistics of BatchNorm and :func:`build_arguments` are the same.

    Returns:
        The network, and the width F of its features. ``create_backbone(**build_arguments(network))`` creates the same
        architecture at random initialization.

    Raises:
        UserError: if the name is unknown, the network rejects the image size or an option, the weights do not fit, or
            timm does not support checkpointing of the network.

    Example:
        >>> network, width = create_backbone("test_resnet", in_chans=1, image_size=32)
        >>> width, network(torch.zeros(2, 1, 32, 32)).shape
        (96, torch.Size([2, 96]))
    """
    given: str = name
    auto_stem: Stem = "small"
    if name in OURS:
        name, defaults, auto_stem = OURS[name]
        options = {**defaults, **options}
    if not timm.is_model(name):
        raise UserError(f"backbone.name={name}: timm has no such network; {_nearest(name)}")
    require_choice("backbone", get_args(Stem), stem=stem)
    require_at_least("data", 1, channels=in_chans)
    small = stem == "auto" and image_size <= SMALL_IMAGE and not (weights or pretrained)
    network, sizes = _build(name, in_chans, image_size, pretrained, small, options)
    if stem == "auto":
        stem = auto_stem if small and isinstance(network, ResNet) else "timm"
    if stem != "timm":
        _use_small_stem(network, name, stride=2 if stem == "small_stride2" else 1)
    if weights is not None:
        _load_weights(network, Path(weights), partial_weights)
    if checkpointing:
        recompute_activations(network, given)
    arguments = {"name": name, "in_chans": in_chans, "image_size": image_size, "stem": stem}
    patches = {key: size for key, size in sizes.items() if key == "patch_size"}
    network.build_arguments = {**arguments, "options": {**options, **patches}}  # type: ignore[assignment]
    network.timm_arguments = (name, {"num_classes": 0, "in_chans": in_chans, **options, **sizes})  # type: ignore[assignment]
    return network, feature_width(network, in_chans, image_size, given)


def at_random(arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """Create a network at random initialization. The state of the global random number generator is preserved.

    Args:
        arguments: arguments of :func:`create_backbone`.
        seed: seed of the initialization.

    Example:
        >>> network, _ = create_backbone("test_resnet")
        >>> type(at_random(build_arguments(network), seed=0)).__name__
        'ResNet'
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return create_backbone(**arguments)[0]


def published_input(name: str) -> tuple[int, list[float], list[float]]:
    """Return the input format of the weights published by timm.

    Args:
        name: name of a timm network.

    Returns:
        Height and width in pixels, mean of each channel, and standard deviation of each channel on the scale [0, 1].

    Raises:
        UserError: if timm publishes no weights of this name.

    Example:
        >>> published_input("resnet18")
        (224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    """
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        raise UserError(f"checkpoint=timm:{name}: timm has no published weights of that name; {_nearest(name)}")
    return known.input_size[-1], list(known.mean), list(known.std)


def build_arguments(network: nn.Module) -> dict[str, Any]:
    """Return the arguments of :func:`create_backbone` that create the same architecture, as plain values.

    Args:
        network: a network created by :func:`create_backbone`.

    Example:
        >>> build_arguments(create_backbone("resnet10")[0])["stem"]
        'small_stride2'
    """
    return cast(dict[str, Any], network.build_arguments)


def timm_arguments(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of ``timm.create_model`` for the same network with the stem of timm.

    Args:
        network: a network created by :func:`create_backbone`.

    Example:
        >>> timm_arguments(create_backbone("resnet10")[0])
        ('resnet18', {'num_classes': 0, 'in_chans': 3, 'layers': [1, 1, 1, 1]})
    """
    return cast(tuple[str, dict[str, Any]], network.timm_arguments)


@torch.no_grad()
def feature_width(network: nn.Module, in_chans: int, image_size: int, name: str = "") -> int:
    """Measure the width F of the features by a forward pass, since ``num_features`` is wrong for some timm networks.

    Args:
        network: ``[N, C, H, W] -> [N, F]``; the training mode is preserved.
        in_chans: number of channels C.
        image_size: height and width of the images in pixels.
        name: name of the network, for error messages.

    Raises:
        UserError: if the network cannot process images of this size, or the output is not ``[N, F]``.

    Example:
        >>> feature_width(nn.Flatten(), in_chans=3, image_size=4)
        48
    """
    was_training = network.training
    _require_memory_of_first_layer(network, in_chans, image_size)
    try:
        features = network.eval()(torch.zeros(2, in_chans, image_size, image_size))
    except Exception as error:
        message = f"{name} cannot run on {in_chans}x{image_size}x{image_size} pixels ({str(error).splitlines()[0]})"
        raise UserError(f"data.image_size={image_size}: {message}; choose another size or network") from error
    finally:
        network.train(was_training)
    shape = list(features.shape)
    require(len(shape) == 2, f"backbone.name={name}: its features have shape {shape}, not [N, F]; choose another")
    return int(shape[1])


def _require_memory_of_first_layer(network: nn.Module, in_chans: int, image_size: int) -> None:
    """Refuse images of which two, and what the first convolution makes of them, do not fit in memory."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    values = in_chans if first is None else in_chans + first.out_channels / math.prod(first.stride)
    needed = math.ceil(2 * 4 * values) * image_size**2
    require_memory(f"data.image_size={image_size}", needed, "choose a smaller one")


def check_patches(network: nn.Module, image_size: int) -> None:
    """Refuse image sizes that the patches of a network do not divide; it would ignore the remaining pixels.

    Raises:
        UserError: if the size is not a multiple of the size of the patches.

    Example:
        >>> check_patches(create_backbone("vit_tiny_patch16_224", image_size=32)[0], image_size=32)
    """
    embeddings = (m for m in network.modules() if isinstance(m, timm.layers.PatchEmbed) and not m.dynamic_img_pad)
    for size in (size for embedding in embeddings for size in embedding.patch_size):
        message = (
            f"cannot be divided into patches of {size} pixels; choose a multiple, or backbone.options.patch_size=N"
        )
        require(image_size % size == 0, f"data.image_size={image_size}: {message}")


def is_depthwise(network: nn.Module) -> bool:
    """Return whether most convolutions are depthwise or grouped. On a CPU, these are slower in bf16 than in fp32.

    Example:
        >>> is_depthwise(create_backbone("test_resnet")[0])
        False
    """
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return sum(m.groups > 1 for m in convolutions) > len(convolutions) / 2


def _build(
    name: str, in_chans: int, image_size: int, pretrained: bool, small: bool, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, int]]:
    """Build the network; the mapping holds ``img_size`` if it takes one, and ``patch_size`` if that was adapted."""
    arguments = {"num_classes": 0, "in_chans": in_chans, "pretrained": pretrained, **options}
    sizes: list[dict[str, int]] = [{"img_size": image_size}, {}]
    if small and "patch_size" not in arguments:
        # Eight patches per side. ViT-S/16 has 14 patches per side at 224 pixels, but only 2 at 32 pixels.
        patch_size = next(p for p in range(max(1, image_size // 8), 0, -1) if image_size % p == 0)
        sizes.insert(0, {"img_size": image_size, "patch_size": patch_size})
    for size in sizes:
        try:
            with explained_memory(f"backbone.name={name}: out of memory; choose a smaller network"):
                network = timm.create_model(name, **arguments, **size)
            return network, size
        except UserError:
            raise
        except OSError as error:
            message = f"the weights of {name} could not be downloaded ({error}); give a file as backbone.weights=FILE"
            raise UserError(f"backbone.pretrained=true: {message}") from error
        except Exception as error:  # the constructor rejects img_size or patch_size
            if size:
                continue
            problem = f"cannot be built with backbone.options={dict(options)} ({error})"
            raise UserError(f"backbone.name={name}: {problem}") from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def _use_small_stem(network: nn.Module, name: str, stride: int) -> None:
    if not isinstance(network, ResNet):
        raise UserError(f"backbone.stem: {name} is not of timm's ResNet family; use backbone.stem=auto")
    first = network.conv1
    if isinstance(first, nn.Sequential):  # a deep stem of 3x3 convolutions
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
    found_all = f"{len(matching)} of {len(wanted)} tensors of the network matched (missing: {', '.join(missing[:3])})"
    advice = "choose the network of these weights, or backbone.partial_weights=true to keep the others at random"
    require(not missing or (partial and matching), f"backbone.weights={file}: {found_all}; {advice}")
    network.load_state_dict(matching, strict=False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or PyTorch file by name, without executing code from the file.

    The state dict may be nested under "state_dict", "model" or "teacher". Values that are not tensors are skipped.

    Raises:
        UserError: if the file is missing or cannot be read as plain tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file)
        content = load_torch(file)
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
    """Remove the prefix of tensor names, such as "module.", after which most names and shapes match ``wanted``."""
    last = list(wanted)[-1]
    prefixes = {key.removesuffix(last) for key in found if key.endswith(last)} | {""}

    def under(prefix: str) -> dict[str, Tensor]:
        same = [key for key in wanted if prefix + key in found and found[prefix + key].shape == wanted[key].shape]
        return {key: found[prefix + key] for key in same}

    return max(map(under, prefixes), key=len)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, [*timm.list_models(), *OURS], n=3)
    return f"did you mean {' or '.join(near)}?" if near else "see timm.list_models() for the names"


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Convert BatchNorm to SyncBatchNorm with the timm function, which keeps the activations of norm-act layers.

    Example:
        >>> type(sync_batch_norm(nn.Sequential(nn.BatchNorm2d(4)))[0]).__name__
        'SyncBatchNorm'
    """
    checkpointing = updates_statistics_once(module)
    converted = cast(nn.Module, timm.layers.convert_sync_batchnorm(module))
    if checkpointing:  # the new modules do not have the hooks of the old ones
        update_statistics_once(converted)
    return converted
