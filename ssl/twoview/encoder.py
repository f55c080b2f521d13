"""A trained backbone with its preprocessing and the facts about its training; loading one from any source."""

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from twoview import __version__
from twoview.backbones import at_random, build_arguments, create_backbone, published_input
from twoview.data import Images, LazyImages, Preprocess, TensorImages, in_order
from twoview.errors import UserError, require

LAST = "last.ckpt"  # name of the newest checkpoint in the folder checkpoints/ of a run
PREFIX = "method.backbone."  # of the backbone's tensors in a checkpoint


@dataclass(frozen=True)
class ModelCard:
    """Facts about a network as plain values; stored in every checkpoint.

    Args:
        method: name of the method that it was trained with, or "timm NAME" or "random NAME".
        backbone: arguments of :func:`twoview.backbones.create_backbone` that build the architecture.
        image_size: height and width of its input in pixels.
        channels: C of its input.
        store_size: size in pixels to which images are resized before the central square of ``image_size`` is cut out;
            None for ``image_size``.
        mean: C channel means that the input is normalized with, on the scale [0, 1]; None if not known.
        std: C channel standard deviations on the same scale; None if not known.
        data: name of the training data.
        classes: names of the classes of the training data, if it had labels.
        seed: seed of the training run.
        versions: versions of the software that it was trained with.
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

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], source: str) -> Self:
        """The card in the values of a file, whose types are checked; other values are ignored.

        Raises:
            UserError: a value is missing or has another type.
        """
        try:
            found = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            for name in ("mean", "std"):
                found[name] = tuple(float(x) for x in found[name])
            found["classes"] = tuple(str(name) for name in found.get("classes", ()))
            # Only in checkpoints of version 0.1.0, and determined by the stem.
            found["backbone"] = {str(k): v for k, v in found["backbone"].items() if k != "small_patches"}
            card = cls(**found)
            sizes = (card.image_size, card.channels, card.store_size or 1)
            fit = all(isinstance(n, int) and n > 0 for n in sizes) and isinstance(card.seed, int)
            texts = (card.method, card.data, card.backbone["name"], card.versions.get("timm", ""))
            if not fit or not all(isinstance(text, str) for text in texts):
                raise TypeError("a size, the seed or a name has another type")
            if not len(found["mean"]) == len(found["std"]) == card.channels:
                raise ValueError("mean and std need one value per channel")
            if not card.backbone.keys() <= {"name", "in_chans", "image_size", "stem", "options"}:
                raise ValueError("unknown arguments of the backbone")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            message = f"its model card is damaged ({type(error).__name__}: {error}); give another checkpoint"
            raise UserError(f"checkpoint={source}: {message}") from error
        return card


class Encoder(nn.Module):
    """A backbone with its preprocessing: images to features. Without augmentation and without gradients.

    Args:
        network: ``fp32 [N, C, H, W] -> [N, F]``.
        card: facts about it.
        source: file or name that it was loaded from, for reports.

    Example:
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
        self.preprocess = Preprocess(card.image_size, mean, std, card.store_size)

    @property
    def width(self) -> int:
        """F, the number of features."""
        blank = torch.zeros(1, self.card.channels, self.card.image_size, self.card.image_size)
        return self.apply_network(blank).shape[1]

    @property
    def device(self) -> torch.device:
        """Where features are computed; move the encoder with ``to``."""
        return self.preprocess.mean.device

    def forward(self, images: Tensor | Image.Image | Iterable[Tensor | Image.Image]) -> Tensor:
        """Features of images.

        Args:
            images: uint8 ``[N, C, H, W]`` or ``[C, H, W]`` in [0, 255], a PIL image, or several of these.

        Returns:
            fp32 ``[N, F]`` on the device of the encoder.

        Raises:
            TypeError: tensors that are not uint8.
        """
        if isinstance(images, Tensor | Image.Image):
            return self.apply_network(self.preprocess(images))
        return self.apply_network(torch.cat([self.preprocess(image) for image in images]))

    def features(self, images: Images | Iterable[Tensor | Image.Image], batch_size: int = 512) -> Iterator[Tensor]:
        """Features of any number of images, in their order; memory is bounded by the batch.

        Args:
            images: images of :mod:`twoview.data`, labelled or not; or an iterable of uint8 ``[C, H, W]`` or PIL images.
            batch_size: images at a time.

        Yields:
            fp32 ``[n, F]`` on the CPU, n at most ``batch_size``.
        """
        if isinstance(images, TensorImages | LazyImages):
            for batch in in_order(images, batch_size):
                yield self(batch.pixels).cpu()
            return
        remaining = iter(images)
        while part := list(islice(remaining, batch_size)):
            yield self(part).cpu()

    def feature_matrix(self, images: Images | Iterable[Tensor | Image.Image], batch_size: int = 512) -> Tensor:
        """:meth:`features` as one tensor, fp32 ``[N, F]`` on the CPU."""
        return torch.cat(list(self.features(images, batch_size)))

    @torch.no_grad()
    def apply_network(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed images, in fp32 and evaluation mode; the training modes of all modules are restored.

        Args:
            pixels: fp32 ``[N, C, image_size, image_size]``, normalized.

        Returns:
            fp32 ``[N, F]`` on the device of the encoder.
        """
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                features: Tensor = self.network(pixels.to(self.device, memory_format=torch.channels_last))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return features.float()

    def with_card(self, **changes: Any) -> "Encoder":
        """The same network with some facts changed, such as ``mean`` and ``std``."""
        return Encoder(self.network, replace(self.card, **changes), self.source)

    def at_random(self, seed: int) -> "Encoder":
        """The same architecture and preprocessing at random initialization."""
        return Encoder(at_random(self.card.backbone, seed), replace(self.card, method="random initialization"))


def load(
    source: str | Path,
    image_size: int | None = None,
    channels: int | None = None,
    store_size: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> Encoder:
    """Load a backbone from any source, in evaluation mode on the CPU. Nothing in a file is executed.

    Args:
        source: a run folder, whose last checkpoint is taken; a checkpoint file; "timm:NAME" for a network with timm's
            published weights; or "random:NAME" for one at random initialization.
        image_size: height and width of the input in pixels; required for "random:NAME"; None for those of the
            checkpoint or of the published weights.
        channels: C of the input; None for those of the checkpoint, else 3.
        store_size: size in pixels of the stored images; refused unless it is that of the checkpoint or None.
        weights: local file of weights for "timm:NAME", instead of the published ones.
        seed: seed of random initialization.

    Raises:
        UserError: no such file, not a checkpoint of twoview, or another size than that of the checkpoint.

    Example:
        >>> encoder = load("random:test_resnet", image_size=32, channels=1)
        >>> encoder.width, encoder.card.channels
        (96, 1)
    """
    kind, _, name = str(source).partition(":")
    require(weights is None or kind == "timm", f"weights={weights}: goes with checkpoint=timm:NAME only")
    if name and kind in ("timm", "random"):
        return _from_timm(str(source), image_size, channels or 3, weights, seed)
    content = read_checkpoint(source)
    card = ModelCard.from_plain(content["twoview"], content["path"])
    for knob, given in (("image_size", image_size), ("channels", channels), ("store_size", store_size)):
        made_for = getattr(card, knob)
        message = f"the checkpoint was made for {made_for}; leave data.{knob} out"
        require(given in (None, made_for), f"data.{knob}={given}: {message}")
    return _from_checkpoint(content, card)


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """Read a checkpoint of twoview as plain containers and tensors on the CPU.

    Args:
        checkpoint: a run folder, whose last checkpoint is taken, or a file.

    Returns:
        The checkpoint, with the path of the file as "path".

    Raises:
        UserError: no such file, or not a checkpoint of twoview.
    """
    path = Path(str(checkpoint)).expanduser()  # YAML reads a folder name such as 0 as an integer
    if path.is_dir():
        path = next((p for p in (path / "checkpoints" / LAST, path / LAST) if p.exists()), path)
    advice = "give a run folder or one of its .ckpt files"
    require(path.is_file(), f"checkpoint={checkpoint}: there is no checkpoint; {advice}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = f"cannot be read as a checkpoint ({type(error).__name__}); {advice}"
        raise UserError(f"checkpoint={checkpoint}: {message}") from error
    ours = isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in ("twoview", "state_dict"))
    message = "was not written by twoview; load foreign weights with backbone.weights=FILE"
    require(ours, f"checkpoint={checkpoint}: {message}")
    return {**content, "path": str(path)}


def _from_checkpoint(content: Mapping[str, Any], card: ModelCard) -> Encoder:
    tensors = content["state_dict"].items()
    try:
        network, _ = create_backbone(**card.backbone)
        network.load_state_dict({k.removeprefix(PREFIX): v for k, v in tensors if k.startswith(PREFIX)}, strict=True)
    except (RuntimeError, TypeError) as error:
        message = f"its weights do not fit this timm's {card.backbone['name']} ({str(error).splitlines()[-1].strip()})"
        advice = f"use the timm of the run, {card.versions.get('timm')}"
        raise UserError(f"checkpoint={content['path']}: {message}; {advice}") from error
    return Encoder(network.eval(), card, content["path"])


def _from_timm(source: str, image_size: int | None, channels: int, weights: str | Path | None, seed: int) -> Encoder:
    kind, _, name = source.partition(":")
    mean, std = None, None
    if kind == "timm":
        size, *statistics = published_input(name)
        image_size = image_size or size
        mean, std = (tuple(x) if len(x) == channels else (sum(x) / len(x),) * channels for x in statistics)
    if image_size is None:
        raise UserError(f"checkpoint={source}: give data.image_size=N, the pixels that it is built for")
    try:
        arguments = {"name": name, "in_chans": channels, "image_size": image_size, "weights": weights}
        network = at_random({**arguments, "pretrained": kind == "timm" and weights is None}, seed)
    except UserError as error:  # name the knobs of this task instead of those of pretraining
        message = str(error).replace("backbone.pretrained=true", f"checkpoint={source}")
        raise UserError(message.replace("backbone.weights", "weights")) from error
    card = ModelCard(f"{kind} {name}", build_arguments(network), image_size, channels, None, mean, std)
    return Encoder(network.eval(), card, str(weights or source))


def versions() -> dict[str, str]:
    """Versions of the software that results depend on."""
    packages = ("torch", "torchvision", "lightning", "timm", "kornia", "scikit-learn")
    return {"twoview": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
