"""``README.md`` of an exported backbone: use, input, training, results and limits."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twoview.encoder import Encoder
from twoview.errors import require
from twoview.evaluation.tables import Table
from twoview.files import read_json
from twoview.loading import LAST
from twoview.reporting.pages import markdown_cell
from twoview.reporting.tables import is_readable, tables

log = logging.getLogger(__name__)

README = "README.md"
CLASSES = 20  # largest number of classes whose names are listed
_TRAINING = ("epochs", "steps", "images_seen", "batch_size", "base_lr", "precision")  # facts of report.json

_USE = {
    "timm": """import timm

network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
features = network({pixels} -> fp32 [N, {width}]""",
    "loader": """import json, pathlib, runpy, timm

network = runpy.run_path("FOLDER/load.py")["load_network"]()
config = json.loads(pathlib.Path("FOLDER/config.json").read_text())["pretrained_cfg"]
transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
features = network({pixels} -> fp32 [N, {width}]""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
features = session.run(["features"], {{"images": images}})[0]  # numpy {dtype} [N, {shape}] -> fp32 [N, {width}]""",
    "torch": """import torch

network = torch.export.load("FOLDER/model.pt2").module()
features = network(images)  # {dtype} [N, {shape}] -> fp32 [N, {width}]""",
}
_TWOVIEW = """import twoview

encoder = twoview.load("FOLDER")
features = encoder(images)  # PIL images of any size, or uint8 [N, C, H, W] -> fp32 [N, {width}]"""


def training_report(encoder: Encoder) -> dict[str, Any] | None:
    """Return the content of ``report.json`` of the run that an encoder was loaded from.

    Args:
        encoder: an encoder of :func:`twoview.load`.

    Returns:
        The report; None if the encoder is not the last checkpoint of a run, which the report is about, or the run has
        no readable report of this network.
    """
    checkpoint = Path(encoder.source)
    if checkpoint.name != LAST or checkpoint.parent.name != "checkpoints":
        return None
    try:
        report = read_json(checkpoint.parent.parent / "report.json")
        same = (report.get("method"), report.get("seed")) == (encoder.card.method, encoder.card.seed)
        require(is_readable(report) and same, "it is incomplete, or of another network")
    except (OSError, ValueError) as error:
        log.warning("README.md has no results: the report of %s cannot be used (%s)", checkpoint.parent.parent, error)
        return None
    return report


def markdown(record: Mapping[str, Any], report: Mapping[str, Any] | None, has_loader: bool) -> str:
    """Return the content of ``README.md``, which holds no paths of this machine.

    Args:
        record: what :func:`twoview.tools.export` returns.
        report: content of ``report.json`` of the run; None for a card without results.
        has_loader: whether the folder holds ``load.py``.
    """
    card = record["card"]
    title = f"{card['backbone']['name']}: {card['method']}" + (f" on {card['data']}" if card["data"] else "")
    parts = [
        _front_matter(record),
        f"# {markdown_cell(title)}",
        f"A backbone that maps images to {record['width']} features. Exported by twoview, format={record['format']}.",
        *_use(record, has_loader),
        *_input(record),
        "## Training",
        _table(_training(card, report)),
        "## Results",
        *_results(report),
        "## Limits",
        "\n".join(f"* {line}" for line in _limits(record)),
        "## Check",
        f"After the export, the network was loaded from this folder without twoview. The largest difference of its "
        f"features from those of the exported encoder was {record['largest_difference']:.1e}, on images of noise; the "
        f"largest feature was {record['largest_feature']:.3g}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(record: Mapping[str, Any]) -> str:
    """Metadata for the Hugging Face Hub; all values are fixed, or checked by the export."""
    library = {"timm": "timm", "onnx": "onnx", "torch": "pytorch"}[record["format"]]
    lines = [f"license: {record['license']}"] if record["license"] else []
    lines += [f"library_name: {library}", "pipeline_tag: image-feature-extraction", "tags:", "- twoview"]
    return "\n".join(["---", *lines, "- self-supervised-learning", "---"])


def _use(record: Mapping[str, Any], has_loader: bool) -> list[str]:
    card, form = record["card"], record["format"]
    shape = f"{card['channels']}, {card['image_size']}, {card['image_size']}"
    words = {"width": record["width"], "dtype": "uint8" if record["preprocess"] == "inside" else "fp32", "shape": shape}
    mode = {1: "L", 3: "RGB"}.get(card["channels"])
    words["pixels"] = (
        f'transform(image.convert("{mode}"))[None])  # a PIL image' if mode else f"images)  # fp32 [N, {shape}]"
    )
    parts = ["## Use", "FOLDER is the path of this folder."]
    if has_loader:
        parts += [
            "timm has no name for the first layers of this network, so `timm.create_model` refuses the folder. "
            "`load.py` needs torch and timm; read it before you run it."
        ]
    parts += [_code(_USE["loader" if has_loader else form].format(**words))]
    if form == "timm":
        parts += ["With twoview, which applies the preprocessing below exactly:", _code(_TWOVIEW.format(**words))]
    return parts


def _input(record: Mapping[str, Any]) -> list[str]:
    card = record["card"]
    size, resize = card["image_size"], card["resize_size"] or card["image_size"]
    steps = [f"The image is converted to C={card['channels']} channels, three to one by ITU-R BT.601 luma."]
    if card["store_size"]:
        steps += [f"If its long side is above {card['store_size']} pixels, the image is reduced to that."]
    steps += [f"The center square is resized to {resize}x{resize} pixels, bilinear with antialiasing, and rounded."]
    if resize != size:
        steps += [f"The center of {size}x{size} pixels is cropped."]
    own = " This step is in the file, whose input is uint8." if record["preprocess"] == "inside" else ""
    steps += [f"x = (pixels / 255 - mean) / std with mean {list(card['mean'])} and std {list(card['std'])}.{own}"]
    parts = ["## Input", "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))]
    if record["format"] == "timm":
        parts += [
            "The transform of timm resizes the short side instead. Of images that do not have this size yet, pixels "
            "can differ by rounding and by a shift of the crop."
        ]
    return parts


def _training(card: Mapping[str, Any], report: Mapping[str, Any] | None) -> Table:
    names = f": {', '.join(card['classes'])}" if 0 < len(card["classes"]) <= CLASSES else ""
    facts = {
        "method": card["method"],
        "data": card["data"] or "not recorded",
        "classes": f"{len(card['classes'])}{names}" if card["classes"] else "no labels",
        "backbone": json.dumps(card["backbone"]),
        "seed": str(card["seed"]),
    }
    training = (report or {}).get("training", {})
    facts |= {name.replace("_", " "): str(training[name]) for name in _TRAINING if name in training}
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in card["versions"].items()) or "not recorded"
    return Table("Training", ["", ""], [[name, value] for name, value in facts.items()])


def _results(report: Mapping[str, Any] | None) -> list[str]:
    if report is None or "results" not in report:
        return ["None recorded. `task=evaluate checkpoint=FOLDER` of twoview evaluates the features on labeled images."]
    table = tables(report)[0]
    return [markdown_cell(table.title), _table(table), markdown_cell(table.note)]


def _limits(record: Mapping[str, Any]) -> list[str]:
    card = record["card"]
    lines = [
        "The features have been evaluated on no other images than those under Results. Evaluate them on labeled images "
        "of your own before use.",
        f"The network sees {card['image_size']}x{card['image_size']} pixels of the center square; finer detail and the "
        "border are lost.",
        "Bias, fairness and privacy were not measured. The license of the training images is not recorded here.",
    ]
    if card["channels"] == 1:
        lines += ["Color is not used."]
    if card["method"].startswith("random"):
        lines += ["The network has not been trained."]
    if not record["license"]:
        lines += ["No license of the weights is stated. Ask their author before you use or pass them on."]
    return lines


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _table(table: Table) -> str:
    header, *rows = ([markdown_cell(text) for text in row] for row in (table.header, *table.rows))
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
