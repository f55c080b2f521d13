"""A backbone with its preprocessing and its model card."""

import hashlib
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from itertools import islice
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from twoview import __version__
from twoview.backbones import at_random
from twoview.data import Images, LazyImages, Preprocess, TensorImages, in_order
from twoview.errors import UserError
from twoview.folding import fold_batch_norm

MAX_SIZE = 2**14  # largest input in pixels and channels that a model card may ask for
CPU_PIXELS = (
    2**17
)  # pixels of a forward pass on the CPU; the cache of a processor holds the activations of about so many
CPU_IMAGES = 8  # images of such a forward pass at least
# Arguments of timm.create_model that read files or download weights: a model card from anyone must not hold them.
_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class ModelCard:
    """Metadata of a network as plain values, stored in every checkpoint.

    Args:
        method: name of the training method; "timm NAME" for published weights, "random NAME" for random initialization.
        backbone: arguments of :func:`twoview.backbones.create_backbone` that build the architecture.
        image_size: height and width of the network's input in pixels.
        channels: number of channels C of the network's input.
        store_size: largest height and width of an image in pixels before its center square is cropped; None to reduce
            no image before.
        resize_size: height and width that the center square is resized to; then the center of ``image_size`` is
            cropped. None for ``image_size``.
        mean: mean of each of the C channels on the scale [0, 1], for normalization; None if not known.
        std: standard deviation of each channel on the same scale; None if not known.
        data: name of the training data; empty if not known.
        classes: names of the classes of the training data; empty without labels.
        seed: seed of the training run.
        versions: versions of the software used for training, by package.
        hidden_labels: :func:`hidden_labels` of the training images; None if the network was trained without labels.
    """

    method: str
    backbone: Mapping[str, Any]
    image_size: int
    channels: int
    store_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    data: str = ""
    classes: tuple[str, ...] = ()
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    hidden_labels: Mapping[str, Any] | None = None
    resize_size: int | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], source: str) -> Self:
        """Create a card from the values stored in a checkpoint, and check their types.

        Args:
            values: fields of the card by name; other entries are ignored.
            source: path of the checkpoint, for error messages.

        Raises:
            UserError: if a value is missing or invalid.
        """
        try:
            found = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            if "resize_size" not in found:  # earlier versions resized the short side of the whole image to store_size
                found["resize_size"] = found.pop("store_size", None)
            for name in ("mean", "std"):
                found[name] = tuple(float(x) for x in found[name])
            if found["method"] == "SupCon":  # checkpoints of earlier versions do not tell which labels were hidden
                found.setdefault("hidden_labels", {})
            found["classes"] = tuple(str(name) for name in found.get("classes", ()))
            # Checkpoints of version 0.1.0 have small_patches, whose value follows from the stem.
            found["backbone"] = {str(k): v for k, v in found["backbone"].items() if k != "small_patches"}
            card = cls(**found)
            sizes = (card.image_size, card.channels, card.store_size or 1, card.resize_size or card.image_size)
            fit = all(isinstance(n, int) and 0 < n <= MAX_SIZE for n in sizes) and isinstance(card.seed, int)
            fit = fit and sizes[3] >= sizes[0]
            texts = (card.method, card.data, card.backbone["name"], card.versions.get("timm", ""))
            fit = fit and isinstance(card.hidden_labels, Mapping | None)
            if not fit or not all(isinstance(text, str) for text in texts):
                raise TypeError("a size, the seed or a name has another type")
            if not len(found["mean"]) == len(found["std"]) == card.channels:
                raise ValueError("mean and std need one value per channel")
            if not card.backbone.keys() <= {"name", "in_chans", "image_size", "stem", "options"}:
                raise ValueError("unknown arguments of the backbone")
            if _SOURCES & card.backbone.get("options", {}).keys():
                raise ValueError("options of the backbone name files or downloads")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            message = f"its model card is damaged ({type(error).__name__}: {error}); give another checkpoint"
            raise UserError(f"checkpoint={source}: {message}") from error
        return card


class Encoder(nn.Module):
    """A backbone with its preprocessing, which computes features of images without augmentation and without gradients.

    Args:
        network: backbone, fp32 ``[N, C, H, W]`` to features ``[N, F]``.
        card: metadata of the network; if ``mean`` and ``std`` are None, inputs are normalized with 0.5 and 0.25.
        source: file or name that the network was loaded from, for reports.

    Example:
        >>> from twoview import load
        >>> encoder = load("random:test_resnet", image_size=32)
        >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> encoder(images).shape, encoder.card.method
        (torch.Size([4, 96]), 'random test_resnet')
        >>> sum(len(part) for part in encoder.features(images, batch_size=3))
        4
    """

    def __init__(self, network: nn.Module, card: ModelCard, source: str = "") -> None:
        super().__init__()
        self.network, self.card, self.source = network, card, source
        mean, std = card.mean or (0.5,) * card.channels, card.std or (0.25,) * card.channels
        self.preprocess = Preprocess(card.image_size, mean, std, card.store_size, card.resize_size)

    @property
    def width(self) -> int:
        """Number F of features, measured by a forward pass."""
        blank = torch.zeros(1, self.card.channels, self.card.image_size, self.card.image_size)
        return self.apply_network(blank).shape[1]

    @property
    def location(self) -> str:
        """The source, as an absolute path if it is a file or a folder."""
        return os.path.abspath(self.source) if os.path.exists(self.source) else self.source

    @property
    def device(self) -> torch.device:
        """Device that features are computed on; changed by ``to``."""
        return self.preprocess.mean.device

    def forward(self, images: Tensor | Image.Image | Iterable[Tensor | Image.Image]) -> Tensor:
        """Preprocess images and compute their features in one batch.

        Args:
            images: uint8 tensor ``[N, C, H, W]`` or ``[C, H, W]`` in [0, 255], a PIL image, or an iterable of such
                tensors and PIL images. Images may have any size; 1 and 3 channels are converted to each other.

        Returns:
            fp32 ``[N, F]`` on the device of the encoder; N = 1 for a single image.

        Raises:
            TypeError: if a tensor is not uint8.
            UserError: if the number of channels cannot be converted.
        """
        if isinstance(images, Tensor | Image.Image):
            return self.apply_network(self.preprocess(images))
        return self.apply_network(torch.cat([self.preprocess(image) for image in images]))

    def features(self, images: Images | Iterable[Tensor | Image.Image], batch_size: int = 512) -> Iterator[Tensor]:
        """Compute features batch by batch, so that memory does not grow with the number of images.

        Args:
            images: images of :mod:`twoview.data`, with or without labels; or an iterable of uint8 tensors ``[C, H, W]``
                or PIL images.
            batch_size: largest number n of images per batch.

        Yields:
            fp32 ``[n, F]`` on the CPU, in the order of the images.
        """
        if isinstance(images, TensorImages | LazyImages):
            for batch in in_order(images, batch_size):
                yield self.apply_network(self.preprocess(batch.pixels, batch.sizes)).cpu()
            return
        remaining = iter(images)
        while part := list(islice(remaining, batch_size)):
            yield self(part).cpu()

    def feature_matrix(self, images: Images | Iterable[Tensor | Image.Image], batch_size: int = 512) -> Tensor:
        """Compute features as :meth:`features` does, and concatenate them.

        Args:
            images: as for :meth:`features`; at least one image.
            batch_size: largest number of images per batch.

        Returns:
            fp32 ``[N, F]`` on the CPU, in the order of the images.
        """
        return torch.cat(list(self.features(images, batch_size)))

    @torch.no_grad()
    def apply_network(self, pixels: Tensor) -> Tensor:
        """Compute features of preprocessed images in fp32 and evaluation mode.

        The training mode of each module is restored afterwards. On the CPU, images pass through the network in parts of
        about 130,000 pixels, which is faster than larger batches.

        Args:
            pixels: fp32 ``[N, C, image_size, image_size]``, normalized.

        Returns:
            fp32 ``[N, F]`` on the device of the encoder.
        """
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                pixels = pixels.to(self.device, memory_format=torch.channels_last)
                parts = pixels.split(self._images_per_pass(pixels))
                features = torch.cat([self.network(part) for part in parts])
        finally:
            for module, mode in modes.items():
                module.training = mode
        return features.float()

    def _images_per_pass(self, pixels: Tensor) -> int:
        n, _, height, width = pixels.shape
        return max(CPU_IMAGES, CPU_PIXELS // (height * width)) if self.device.type == "cpu" else max(1, n)

    def folded(self) -> "Encoder":
        """Return an encoder with the same features up to rounding that computes them faster.

        BatchNorm is folded into convolutions, see :func:`twoview.folding.fold_batch_norm`. The encoder does not follow
        later changes of the weights.
        """
        folded = Encoder(fold_batch_norm(self.network), self.card, self.source)
        folded.preprocess = self.preprocess  # on its device
        return folded

    def with_card(self, **changes: Any) -> "Encoder":
        """Return an encoder that shares the network and has another card.

        Args:
            **changes: fields of :class:`ModelCard` and their new values, such as ``mean`` and ``std``.
        """
        return Encoder(self.network, replace(self.card, **changes), self.source)

    def at_random(self, seed: int) -> "Encoder":
        """Return an encoder of the same architecture and preprocessing at random initialization.

        Args:
            seed: seed of the initialization.
        """
        return Encoder(at_random(self.card.backbone, seed), replace(self.card, method="random initialization"))


def hidden_labels(labels: Tensor, holdout: float) -> dict[str, Any]:
    """Which labels were hidden from training: a function of all labels, the share and the seed of the training.

    An evaluation of the same labels that holds out the same share with the same seed chooses on unseen labels.

    Args:
        labels: int64 ``[N]`` labels of all training images.
        holdout: share of the labels that was hidden, in (0, 1).
    """
    return {"holdout": holdout, "labels": hashlib.blake2b(labels.numpy().tobytes(), digest_size=16).hexdigest()}


def versions() -> dict[str, str]:
    """Return the versions of the software that results depend on, by package."""
    packages = ("torch", "torchvision", "lightning", "timm", "kornia", "scikit-learn")
    return {"twoview": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
