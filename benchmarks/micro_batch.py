"""Memory, time and gradients of a batch in pieces (trainer.micro_batch) beside the whole batch; Markdown tables.

    python benchmarks/micro_batch.py                      # batch 1024 in pieces of 128; 6 minutes on one core
    python benchmarks/micro_batch.py --only simclr --json table.json

A step makes the views of a batch of 64-pixel images, computes the loss, and propagates its gradient. The network is a
ResNet-18 with the ImageNet stem, GroupNorm in place of BatchNorm, and drop path. Each case runs in its own process on
one thread. Images per second are per second of processor time, which other processes on the machine hardly change.
Extra memory is the peak of the memory of the process above that before the step.

The gradient of the pieces is compared with that of plain autograd over all pieces, with the same random draws of the
views and of drop path, whose activations are all in memory ("activations kept"). The difference is the largest over all
parameters of norm(gradient - other) / norm(other).
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import begin, save, table_row
from torch import Tensor

from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.heads import projection_head
from twoview.methods import NNCLR, Method, MoCoV3, SimCLR, SupCon
from twoview.training.gradient_caching import Pieces, join_outputs, split_batch, step_in_pieces

KEY = (0, 1, 0)
HEAD = partial(projection_head, hidden_bn=False, last_bn=False)
METHODS: dict[str, Callable[..., Method]] = {
    "simclr": SimCLR,
    "moco_v3": partial(MoCoV3, predictor=HEAD),
    "supcon": SupCon,
    "nnclr": partial(NNCLR, predictor=HEAD, queue_size=4096),
}


@dataclass(frozen=True)
class Sizes:
    """Network, height and width of the images, images of a batch, and largest number of images of a piece."""

    backbone: str
    image_size: int
    batch: int
    micro_batch: int


class Training:
    """One step of a method in three forms."""

    def __init__(self, name: str, sizes: Sizes, batch: int) -> None:
        torch.manual_seed(0)
        size, self.sizes = sizes.image_size, sizes
        options = {"norm_layer": "groupnorm", "drop_path_rate": 0.1, "zero_init_last": False}
        backbone, width = create_backbone(sizes.backbone, image_size=size, stem="timm", options=options)
        self.method = METHODS[name](backbone, HEAD(width)).to(memory_format=torch.channels_last)
        self.augment = TwoViews(size, 3, [0.5] * 3, [0.25] * 3)
        self.pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        self.ids, self.labels = torch.arange(batch), torch.arange(batch) % 100
        self.draws = self.augment.draw(self.pixels, KEY)
        self.pieces = split_batch(batch, sizes.micro_batch)

    def views(self, part: slice) -> tuple[Tensor, Tensor]:
        """Make the views of the images of a slice."""
        return self.augment(self.pixels, draws=self.draws, part=part)

    def whole(self) -> Tensor:
        """Return the loss; all images are encoded together."""
        views = self.views(slice(None))
        torch.manual_seed(0)
        return self.method(*views, ids=self.ids, labels=self.labels).loss

    def in_pieces(self) -> Tensor:
        """Return the loss; the activations of one piece are in memory."""
        return step_in_pieces(self.method, self.views, self.pieces, KEY, self.ids, self.labels).loss

    def activations_kept(self) -> Tensor:
        """Return the loss; the images are encoded in pieces whose activations are all in memory."""
        pieces = Pieces(self.method, self.views, self.pieces, KEY)
        encoded = join_outputs([pieces.encode(i) for i in range(len(self.pieces))])
        return self.method.loss(encoded, self.ids, self.labels).loss


def measure(name: str, form: str, sizes: Sizes, file: str) -> None:
    """Take one step in this process; writes memory in bytes, seconds, and the gradient of each parameter."""
    torch.set_num_threads(1)
    getattr(Training(name, sizes, 4), form)().backward()  # loads what the first step loads
    training = Training(name, sizes, sizes.batch)
    before, start = memory("VmRSS"), time.process_time()
    getattr(training, form)().backward()
    seconds = time.process_time() - start
    gradients = [p.grad for p in training.method.parameters() if p.requires_grad]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save({"memory": peak - before, "seconds": seconds, "gradients": gradients}, file)


def memory(field: str) -> int:
    """Bytes of memory of this process, from a line of its status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_own_process(*arguments: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/result.pt"
        process = multiprocessing.get_context("fork").Process(target=measure, args=(*arguments, file))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{arguments}: the process ended with exit code {process.exitcode}")
        return dict(torch.load(file))


def difference(found: list[Tensor | None], other: list[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(found, other, strict=True) if a is not None and b is not None]
    if len(pairs) < sum(a is not None or b is not None for a, b in zip(found, other, strict=True)):
        raise SystemExit("a parameter has a gradient in one form only")
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def rows_of(name: str, sizes: Sizes) -> list[dict[str, Any]]:
    forms = {
        "whole batch": "whole",
        f"pieces of {sizes.micro_batch}": "in_pieces",
        f"pieces of {sizes.micro_batch}, activations kept": "activations_kept",
    }
    measured = {label: in_own_process(name, form, sizes) for label, form in forms.items()}
    whole, pieces, kept = measured.values()
    rows = []
    for label, found in measured.items():
        row = {
            "setting": f"{name}, {sizes.image_size} px, batch {sizes.batch}",
            "name": label,
            "per_second": sizes.batch / found["seconds"],
            "ratio": whole["seconds"] / found["seconds"],
            "seconds": found["seconds"],
            "extra_memory": found["memory"],
            "share_of_memory": found["memory"] / whole["memory"],
            "gradient_difference": difference(pieces["gradients"], kept["gradients"]) if found is pieces else None,
        }
        print(table_row(row), flush=True)
        rows.append(row)
    return rows


def print_memory(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| setting | implementation | extra memory (MiB) | share of the whole batch | seconds | gradient differs by |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        differs = "" if row["gradient_difference"] is None else f"{row['gradient_difference']:.1e}"
        sizes = f"{row['extra_memory'] / 2**20:,.0f} | {row['share_of_memory']:.2f} | {row['seconds']:,.1f}"
        print(f"| {row['setting']} | {row['name']} | {sizes} | {differs} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="a few images of 32 px and a small network")
    parser.add_argument("--json", help="file for the tables as JSON")
    given = parser.parse_args()
    chosen = [name for name in METHODS if given.only in name]
    if not chosen:
        parser.error(f"--only={given.only}: choose from {', '.join(METHODS)}")
    sizes = Sizes("resnet10_narrow", 32, 8, 4) if given.smoke else Sizes("resnet18", 64, 1024, 128)
    provenance = begin("Batches in pieces", "images/s", reference="the whole batch")
    rows = [row for name in chosen for row in rows_of(name, sizes)]
    print_memory(rows)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
