"""Export of a backbone into a folder that other programs load: timm, ONNX or torch.export."""

import contextlib
import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from twoview.backbones import create_backbone
from twoview.data import Preprocess
from twoview.encoder import Encoder, ModelCard
from twoview.errors import UserError, require
from twoview.files import read_json, write_atomically, write_folder_atomically
from twoview.timm_folder import CONFIG, LOADER, WEIGHTS, load_without_twoview, loader_script, timm_config
from twoview.tools.model_card import README, markdown, training_report

log = logging.getLogger(__name__)

FILES = {"timm": WEIGHTS, "onnx": "model.onnx", "torch": "model.pt2"}
# Largest difference from the features of the encoder, as a share of the largest feature where that is above 1.
LIMITS = {"timm": 1e-5, "onnx": 1e-4, "torch": 1e-5}
ONNX_BYTES = 2**31  # largest ONNX file, a limit of Protocol Buffers
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCH = ({0: torch.export.Dim("batch")},)  # the first dimension of the only argument may have any size
_REPLACED = {CONFIG, README, LOADER, *FILES.values(), "__pycache__"}  # Python adds the last one

Run = Callable[[Tensor], Tensor]  # pixels [N, C, S, S] to features [N, F]


class _Deployed(nn.Module):
    """A network for normalized fp32 pixels ``[N, C, S, S]``, or for uint8 pixels if the preprocessing is given."""

    def __init__(self, network: nn.Module, preprocess: Preprocess | None) -> None:
        super().__init__()
        self.network, self.preprocess = network, preprocess

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocess is not None:
            images = images.float().div(255).sub(self.preprocess.mean).div(self.preprocess.std)
        return cast(Tensor, self.network(images))


def export(
    encoder: Encoder,
    to: str | Path,
    format: str = "timm",  # noqa: A002 (the name of the knob)
    preprocess: str = "outside",
    license: str | None = None,  # noqa: A002
) -> dict[str, Any]:
    """Write a backbone into a folder that other programs load, and compare it with the encoder.

    The folder holds the network, ``config.json`` with the model card, and ``README.md``, which describes use, training,
    figures and limits. The network is loaded from the folder without this package, and its features of images of noise
    are compared with those of the encoder, in batches of different sizes.

    Args:
        encoder: the backbone; its model card must describe how the network is built.
        to: path of the folder. It is created if missing; an earlier export is replaced once the new one is complete.
        format: what the folder holds.

            * "timm": ``model.safetensors``, which ``timm.create_model("local-dir:TO", pretrained=True)`` and
              :func:`twoview.load` load. A ResNet with a stem for small images has no name in timm; the folder then
              holds ``load.py``, a script that needs torch and timm.
            * "onnx": ``model.onnx`` with a dynamic batch size.
            * "torch": ``model.pt2``, a program of ``torch.export`` with a dynamic batch size.
        preprocess: for "onnx" and "torch", whether the input is fp32 pixels ``[N, C, S, S]`` that are normalized
            ("outside"), or uint8 pixels ``[N, C, S, S]`` in [0, 255], which the network normalizes ("inside").
            Images are cropped and resized outside in both cases, as ``encoder.preprocess.crops`` does.
        license: identifier of the license of the weights for ``README.md``, such as "mit"; None to state none.

    Returns:
        The entry "twoview" of ``config.json``: ``card``, ``format``, ``file``, ``sha256`` of the file, ``preprocess``,
        ``license``, ``width``, ``largest_difference`` and ``largest_feature``.

    Raises:
        UserError: if an argument is invalid, ``to`` holds other files, a library is missing, the network cannot be
            exported, or its features differ from those of the encoder by more than 1e-5 ("onnx": 1e-4), as a share of
            the largest feature where that is above 1. The content of ``to`` is then unchanged.
        OSError: if the folder cannot be written.

    Example:
        >>> import twoview
        >>> encoder = twoview.load("random:test_vit", image_size=32)
        >>> export(encoder, f"{folder}/vit", license="mit")["largest_difference"] < 1e-5
        True
        >>> twoview.load(f"{folder}/vit").width
        64
    """
    path = Path(str(to)).expanduser()
    _check_arguments(encoder, format, preprocess, license)
    _require_replaceable(path)
    encoder = encoder if encoder.device.type == "cpu" else copy.deepcopy(encoder).cpu()
    card = asdict(_complete(encoder))
    record: dict[str, Any] = {
        "card": card,
        "format": format,
        "file": FILES[format],
        "preprocess": preprocess,
        "license": license,
    }
    with write_folder_atomically(path) as folder:
        network = _rebuilt(encoder)
        preprocessing = {name: card[name] for name in ("image_size", "resize_size", "mean", "std")}
        config = timm_config(network, **preprocessing) if format == "timm" else {}
        write_atomically(folder / CONFIG, _json(config))  # timm reads it when the network is loaded
        model = _Deployed(network, encoder.preprocess if preprocess == "inside" else None).eval()
        inputs, features = _pairs(encoder, preprocess)
        write = {"timm": _write_timm, "onnx": _write_onnx, "torch": _write_torch}[format]
        with _explained(format):
            run = write(folder, model, inputs[:2])
            found = torch.cat([run(part).detach() for part in (inputs[:1], inputs[1:])])  # other sizes than the example
        record |= _compared(found, features, format)
        record["sha256"] = hashlib.sha256((folder / FILES[format]).read_bytes()).hexdigest()
        write_atomically(folder / CONFIG, _json(config | {"twoview": record}))
        has_loader = (folder / LOADER).exists()
        write_atomically(folder / README, markdown(record, training_report(encoder), has_loader))
        _require_replaceable(path)  # files may have been added meanwhile
    log.info("%s: format=%s, largest difference from the encoder %.1e", path, format, record["largest_difference"])
    return record


def _check_arguments(encoder: Encoder, form: str, preprocess: str, license_id: str | None) -> None:
    for knob, value, choices in (("format", form, FILES), ("preprocess", preprocess, ("outside", "inside"))):
        require(value in choices, f"{knob}={value}: choose one of {', '.join(choices)}")
    message = "the network of format=timm takes normalized pixels; use format=onnx or torch, or leave it out"
    require(form != "timm" or preprocess == "outside", f"preprocess={preprocess}: {message}")
    known = license_id is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", str(license_id))
    require(known, f"license={license_id}: give an identifier such as mit, apache-2.0 or cc-by-nc-4.0")
    if form == "onnx":
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        require(not missing, f'format=onnx: {", ".join(missing)} is not installed; pip install "twoview[onnx]"')
        size = sum(tensor.nbytes for tensor in encoder.network.state_dict().values())
        message = f"the weights take {size / 1e9:.1f} GB and an ONNX file at most 2.1 GB; use format=timm or torch"
        require(size < ONNX_BYTES, f"format=onnx: {message}")


def _require_replaceable(path: Path) -> None:
    """Refuse a path at which anything but an earlier export would be replaced, or what was added to that."""
    require(not path.is_symlink(), f"to={path}: is a symbolic link; give the folder that it points to")
    require(not path.exists() or path.is_dir(), f"to={path}: is a file; give a folder")
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if not found:
        return
    try:
        record = read_json(path / CONFIG).get("twoview")
    except (OSError, ValueError):
        record = None
    exported = isinstance(record, dict) and "card" in record and record.get("format") in FILES
    require(exported, f"to={path}: holds files that are not an export; give a new or empty folder")
    added = ", ".join([name for name in found if name not in _REPLACED][:3])
    require(not added, f"to={path}: {added} would be lost with the earlier export; move it elsewhere")


def _complete(encoder: Encoder) -> ModelCard:
    """Return the model card with the mean and standard deviation that the encoder uses if it has none."""
    mean, std = (tuple(part.flatten().tolist()) for part in (encoder.preprocess.mean, encoder.preprocess.std))
    return replace(encoder.card, mean=encoder.card.mean or mean, std=encoder.card.std or std)


def _rebuilt(encoder: Encoder) -> nn.Module:
    """Build the network from the model card, as loading does, with the weights of the encoder."""
    try:
        network, _ = create_backbone(**encoder.card.backbone)
        network.load_state_dict(encoder.network.state_dict())
    except (RuntimeError, TypeError) as error:
        message = "its model card describes another network; give an encoder of twoview.load"
        raise UserError(f"encoder: {message} ({str(error).splitlines()[-1].strip()})") from error
    return network.eval()


def _write_timm(folder: Path, model: _Deployed, example: Tensor) -> Run:
    tensors = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    if script := loader_script(model.network):
        write_atomically(folder / LOADER, script)
    return load_without_twoview(folder)


def _write_onnx(folder: Path, model: _Deployed, example: Tensor) -> Run:
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=_BATCH, verbose=False, **names)
    content = cast(torch.onnx.ONNXProgram, program).model_proto.SerializeToString()
    write_atomically(folder / FILES["onnx"], content)
    session = onnxruntime.InferenceSession(folder / FILES["onnx"], providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _write_torch(folder: Path, model: _Deployed, example: Tensor) -> Run:
    program = torch.export.export(model, (example,), dynamic_shapes=_BATCH)
    write_atomically(folder / FILES["torch"], lambda file: torch.export.save(program, file))
    return torch.export.load(folder / FILES["torch"]).module()


@contextlib.contextmanager
def _explained(form: str) -> Iterator[None]:
    """Raise one sentence for any failure of the exporters and loaders, which raise many classes."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        message = f"this network cannot be exported, or not with a dynamic batch size ({reason}); use another format"
        raise UserError(f"format={form}: {message}") from error


def _pairs(encoder: Encoder, preprocess: str) -> tuple[Tensor, Tensor]:
    """Return inputs for a network and the features that the encoder computes from them: fine and coarse noise."""
    draws = torch.Generator().manual_seed(0)
    channels, size = encoder.card.channels, encoder.card.image_size
    noise = [torch.randint(0, 256, (5, channels, side, side), generator=draws, dtype=torch.uint8) for side in (size, 4)]
    inputs, features = [], []
    for images in noise:
        inputs.append(encoder.preprocess.crops(images) if preprocess == "inside" else encoder.preprocess(images))
        features.append(encoder(images))
    return torch.cat(inputs), torch.cat(features)


def _compared(found: Tensor, expected: Tensor, form: str) -> dict[str, Any]:
    """Compare the features of a reloaded network with those of the encoder.

    Returns:
        The number F of features, the largest difference, and the largest feature of the encoder.

    Raises:
        UserError: if the difference is above the limit.
    """
    fits = found.shape == expected.shape
    difference = (found - expected).abs().max().item() if fits else math.inf
    largest, limit = expected.abs().max().item(), LIMITS[form]
    message = f"the exported network gives other features than the encoder, by up to {difference:.1e}"
    advice = "use another format" if form != "timm" else "its model card may describe another network"
    # A comparison with NaN is false, so features that are not finite are refused.
    require(difference <= limit * max(1.0, largest), f"format={form}: {message}, above {limit:.0e}; {advice}")
    return {"width": expected.shape[1], "largest_difference": difference, "largest_feature": largest}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
