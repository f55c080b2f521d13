"""Loading of encoders from runs, checkpoint files, exported folders and timm."""

import hashlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from twoview.backbones import at_random, build_arguments, check_patches, create_backbone, published_input
from twoview.encoder import Encoder, ModelCard
from twoview.errors import UserError, require
from twoview.files import open_regular, read_json
from twoview.timm_folder import CONFIG, WEIGHTS
from twoview.torch_files import load_safetensors, load_torch

LAST = "last.ckpt"  # newest checkpoint of a run, in the subfolder checkpoints/
MAX_CONFIG = 2**24  # largest config.json of an exported folder in bytes
PREFIX = "method.backbone."  # prefix of the names of backbone tensors in a checkpoint


def load(
    source: str | Path,
    image_size: int | None = None,
    channels: int | None = None,
    store_size: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> Encoder:
    """Load a backbone in evaluation mode on the CPU. No code in a checkpoint file or an exported folder is executed.

    Args:
        source: a run folder, from which the last checkpoint is loaded; a checkpoint file; a folder of
            :func:`twoview.tools.export`; "timm:NAME" for a network with the weights published by timm; or "random:NAME"
            for a network at random initialization.
        image_size: height and width of the network's input in pixels. Required for "random:NAME". None: the size
            that the checkpoint stores, or the input size of the published weights. For a checkpoint, another size is an
            error.
        channels: number of channels C of the network's input. None for the number in the checkpoint, or 3 without a
            checkpoint. For a checkpoint, another number is an error.
        store_size: None, or the ``store_size`` of the checkpoint, see :class:`ModelCard`; another size is an error.
        weights: local file with weights for "timm:NAME"; None for the published weights.
        seed: seed of the random initialization.

    Returns:
        The encoder.

    Raises:
        UserError: if the source does not exist, cannot be read, or does not match the other arguments.

    Example:
        >>> encoder = load("random:test_resnet", image_size=32, channels=1)
        >>> encoder.width, encoder.card.channels
        (96, 1)
    """
    kind, _, name = str(source).partition(":")
    require(weights is None or kind == "timm", f"weights={weights}: goes with checkpoint=timm:NAME only")
    if name and kind in ("timm", "random"):
        return _from_timm(str(source), image_size, channels or 3, weights, seed)
    folder = Path(str(source)).expanduser()
    exported = (folder / CONFIG).exists() and not (folder / "checkpoints").exists()
    content = _read_export(folder) if exported else read_checkpoint(source)
    card = ModelCard.from_plain(content["twoview"], content["path"])
    for knob, given in (("image_size", image_size), ("channels", channels), ("store_size", store_size)):
        made_for = getattr(card, knob)
        message = f"the checkpoint was made for {made_for or 'squares'}; leave data.{knob} out"
        require(given in (None, made_for), f"data.{knob}={given}: {message}")
    return _from_checkpoint(content, card)


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """Read a checkpoint of twoview as plain containers and tensors on the CPU.

    Args:
        checkpoint: a checkpoint file, or a run folder, from which the last checkpoint is read.

    Returns:
        The content of the checkpoint; the entry "path" is the path of the file.

    Raises:
        UserError: if the file does not exist or is not a checkpoint of twoview.
    """
    path = Path(str(checkpoint)).expanduser()  # YAML reads a folder name such as 0 as an integer
    if path.is_dir():
        path = next((p for p in (path / "checkpoints" / LAST, path / LAST) if p.exists()), path)
    advice = "give a run folder or one of its .ckpt files"
    require(path.exists() and not path.is_dir(), f"checkpoint={checkpoint}: there is no checkpoint; {advice}")
    try:
        content = load_torch(path)
    except Exception as error:
        reason = str(error).splitlines()[0][:80] if isinstance(error, ValueError) else type(error).__name__
        message = f"cannot be read as a checkpoint ({reason}); {advice}"
        raise UserError(f"checkpoint={checkpoint}: {message}") from error
    ours = isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in ("twoview", "state_dict"))
    message = "was not written by twoview; load foreign weights with backbone.weights=FILE"
    require(ours, f"checkpoint={checkpoint}: {message}")
    return {**content, "path": str(path)}


def _read_export(folder: Path) -> dict[str, Any]:
    """Read an exported folder as :func:`read_checkpoint` reads a checkpoint."""
    advice = "export the network again"
    for name in (CONFIG, WEIGHTS):
        message = f"{name} is a symbolic link; copy the file into the folder"
        require(not (folder / name).is_symlink(), f"checkpoint={folder}: {message}")
    try:
        require((folder / CONFIG).stat().st_size <= MAX_CONFIG, f"checkpoint={folder}: {CONFIG} is too large; {advice}")
        ours: Any = read_json(folder / CONFIG).get("twoview")
        message = f"its {CONFIG} was not written by task=export; give a run, or timm:NAME with weights=FILE"
        require(isinstance(ours, dict) and isinstance(ours.get("card"), dict), f"checkpoint={folder}: {message}")
        form = ours.get("format")
        message = f"holds an export with format={str(form)[:20]}; give one with format=timm"
        require(form == "timm", f"checkpoint={folder}: {message}")
        with open_regular(folder / WEIGHTS) as file:
            intact = hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest() == ours.get("sha256")
        require(intact, f"checkpoint={folder}: {WEIGHTS} is not the file that {CONFIG} describes; {advice}")
        tensors = load_safetensors(folder / WEIGHTS)
    except UserError:
        raise
    except Exception as error:  # safetensors raises several classes
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"checkpoint={folder}: cannot be read as an exported folder ({reason}); {advice}") from error
    weights = {PREFIX + name: tensor for name, tensor in tensors.items()}
    return {"twoview": ours["card"], "state_dict": weights, "path": str(folder / WEIGHTS)}


def _from_checkpoint(content: Mapping[str, Any], card: ModelCard) -> Encoder:
    tensors = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    try:
        network, _ = create_backbone(**card.backbone)
        network.load_state_dict(tensors, strict=True)
        for name, value in network.state_dict().items():  # load_state_dict would convert other types
            if value.is_floating_point() != tensors[name].is_floating_point():
                raise TypeError(f"{name} has {tensors[name].dtype}")
    except UserError as error:
        raise UserError(f"checkpoint={content['path']}: {error}") from error
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
    except UserError as error:  # the message names knobs of pretraining: replace them by the knobs of this task
        message = str(error).replace("backbone.pretrained=true", f"checkpoint={source}")
        raise UserError(message.replace("backbone.weights", "weights")) from error
    check_patches(network, image_size)
    card = ModelCard(f"{kind} {name}", build_arguments(network), image_size, channels, None, mean, std)
    return Encoder(network.eval(), card, str(weights or source))
