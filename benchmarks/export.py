"""Differences between the features of exported networks and those of the encoder; prints a Markdown table.

    python benchmarks/export.py                       # ResNet-18 with the 3x3 stem, ViT-Tiny at 32 px, ConvNeXt-Atto
    python benchmarks/export.py --networks resnet50:64 runs/DATE/TIME    # a network of timm, and that of a run

A network of timm has random weights and, where it has BatchNorm, statistics of images of noise. Each network is
exported in every format. Another process, in which twoview cannot be imported, runs the code that README.md of the
folder shows, on 32 images of noise that have the size of the network. The table has the largest difference of a
feature, and the largest feature. For format=timm, the transform of timm and the preprocessing of the encoder are also
compared on smooth images of 320x240 pixels, by the smallest cosine similarity of their features.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from side_by_side import begin, save
from torch import Tensor, nn

import twoview
from twoview.tools import export

NETWORKS = ["resnet18:32", "vit_tiny_patch16_224:32", "convnext_atto:64"]
FORMS = [("timm", "outside"), ("onnx", "outside"), ("onnx", "inside"), ("torch", "outside"), ("torch", "inside")]
COLUMNS = ["network", "format", "input", "MB", "seconds", "largest difference", "largest feature", "cosine, transform"]

# Runs the code of README.md for each image, or for a batch, and saves the features.
WITHOUT_TWOVIEW = """
import re, sys
sys.modules["twoview"] = None  # importing it fails
from pathlib import Path
import torch

folder, given, result = sys.argv[1:]
torch.set_grad_enabled(False)
code = re.search("```python\\n(.*?)```", (Path(folder) / "README.md").read_text(), re.S)[1].replace("FOLDER", folder)
inputs = torch.load(given, weights_only=True)
if "transform" in code:
    from PIL import Image
    parts = []
    for pixels in inputs:
        names = {"image": Image.fromarray(pixels.permute(1, 2, 0).numpy())}
        exec(code, names)
        parts.append(names["features"])
    found = torch.cat(parts)
else:
    names = {"images": inputs.numpy() if "onnxruntime" in code else inputs}
    exec(code, names)
    found = torch.as_tensor(names["features"])
torch.save(found, result)
"""


def make_encoder(network: str) -> twoview.Encoder:
    """Return the network of a run; or a random one whose weights all take part, with the normalization of a run."""
    if Path(network).exists():
        return twoview.load(network)
    name, size = network.split(":")[0], int(network.split(":")[1])
    encoder = twoview.load(f"random:{name}", size)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.network.parameters():  # the scale of a residual branch may be initialized at 1e-6
            parameter.add_(0.02 * torch.randn_like(parameter))
        encoder.network.train()(torch.randn(64, 3, size, size))
    encoder.network.eval()
    return encoder.with_card(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


def features_without_twoview(folder: Path, inputs: Tensor) -> Tensor:
    """Return the features that the code in ``README.md`` computes in a process without twoview."""
    given, result = (folder.with_suffix(suffix) for suffix in (".given", ".found"))
    torch.save(inputs, given)
    subprocess.run([sys.executable, "-c", WITHOUT_TWOVIEW, str(folder), str(given), str(result)], check=True)
    return torch.load(result, weights_only=True)


def measure(encoder: twoview.Encoder, form: str, place: str, folder: Path) -> dict[str, Any]:
    """Export an encoder, and compare features of images of noise that have the size of the network."""
    size = encoder.card.image_size
    noise = torch.randint(0, 256, (32, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    record = export(encoder, folder, form, place)
    seconds = time.process_time() - start
    uint8 = form == "timm" or place == "inside"
    expected = encoder(noise)
    found = features_without_twoview(folder, noise if uint8 else encoder.preprocess(noise))
    return {
        "network": f"{encoder.card.backbone['name']}, {encoder.card.backbone['stem']} stem, {size} px",
        "format": form,
        "input": place,
        "bytes": (folder / record["file"]).stat().st_size,
        "seconds": seconds,
        "difference": (found - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
    }


def transform_similarity(encoder: twoview.Encoder, folder: Path) -> float:
    """Return the smallest cosine similarity of features by the transform of timm and by the encoder."""
    size = encoder.card.image_size
    resized = encoder.with_card(store_size=2 * size, resize_size=round(1.15 * size))
    export(resized, folder)
    coarse = torch.randint(0, 256, (8, 3, 9, 12), generator=torch.Generator().manual_seed(1)).float()
    smooth = nn.functional.interpolate(coarse, (240, 320), mode="bicubic").clamp(0, 255).to(torch.uint8)
    expected = resized([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in smooth])
    return torch.cosine_similarity(features_without_twoview(folder, smooth), expected).min().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="NAME:PIXELS or RUN each")
    parser.add_argument("--json", help="file for the table")
    given = parser.parse_args()
    provenance, rows = begin("Exported networks", "", ("onnx", "onnxruntime"), columns=COLUMNS), []
    with tempfile.TemporaryDirectory() as temporary:
        for number, network in enumerate(given.networks):
            encoder = make_encoder(network)
            for form, place in FORMS:
                folder = Path(temporary) / f"{number}_{form}_{place}"
                row = measure(encoder, form, place, folder)
                row["cosine"] = transform_similarity(encoder, folder) if form == "timm" else None
                rows.append(row)
                cells = [row["network"], form, place, f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.1f}"]
                cells += [f"{row['difference']:.1e}", f"{row['largest']:.2f}"]
                similarity = "" if row["cosine"] is None else f"{row['cosine']:.4f}"
                print(f"| {' | '.join(cells)} | {similarity} |", flush=True)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
