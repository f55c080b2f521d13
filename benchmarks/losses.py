"""Speed and memory of NT-Xent, forward and backward, beside other implementations; prints two Markdown tables.

    python benchmarks/losses.py                      # 512 to 65,536 images, 5 repeats; 15 minutes on two cores
    python benchmarks/losses.py --images 8192        # one number of images

Two random embeddings of width 128 for each image, temperature 0.1, fp32. Each implementation runs in its own process.
The repeats of the implementations alternate. Extra memory is the largest memory of the process during the loss and its
gradient, beyond the embeddings. Implementations:

* twoview: :func:`twoview.losses.nt_xent`;
* plain: the cross-entropy of a ``[2N, 2N]`` matrix of logits, whose diagonal is masked;
* lightly: ``lightly.loss.NTXentLoss`` of version 1.6, if it is installed.

Above 8,192 images, only twoview is measured: the others need more than 16 bytes for each of the 4N^2 logits.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from other_libraries import OwnProcess, missing
from side_by_side import begin, rates, save
from torch import Tensor
from torch.nn import functional as F

from twoview.losses import nt_xent

WIDTH, TEMPERATURE, LARGEST_OF_OTHERS = 128, 0.1, 8192
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(z_a: Tensor, z_b: Tensor) -> Tensor:
    """NT-Xent as the cross-entropy of a whole matrix of logits."""
    n, z = len(z_a), F.normalize(torch.cat([z_a, z_b]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def loss_of(name: str) -> Loss:
    """Return the loss function of an implementation."""
    if name == "twoview":
        return functools.partial(nt_xent, temperature=TEMPERATURE)
    if name == "plain":
        return plain
    from lightly.loss import NTXentLoss

    loss: Loss = NTXentLoss(temperature=TEMPERATURE)
    return loss


def seconds(name: str, images: int) -> Callable[[], float]:
    """Return a function that computes the loss and its gradient, and returns the seconds."""
    loss, tensors = loss_of(name), embeddings(images)

    def run() -> float:
        start = time.perf_counter()
        loss(*tensors).backward()
        return time.perf_counter() - start

    return run


def extra_memory(name: str, images: int) -> Callable[[], float]:
    """Return a function that computes the loss and its gradient once, and returns the bytes beyond the embeddings."""
    loss, tensors = loss_of(name), embeddings(images)
    loss(*embeddings(64)).backward()  # libraries allocate their buffers

    def run() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the largest memory is measured from here
        before = status("VmRSS")
        loss(*tensors).backward()
        return status("VmHWM") - before

    return run


def embeddings(images: int, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, WIDTH, generator=generator).to(device).requires_grad_() for _ in range(2)]


def status(key: str) -> float:
    """Bytes of an entry of the status of this process in Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[512, 2048, 8192, 65536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the tables as JSON")
    given = parser.parse_args()
    if min(given.images) < 2 or given.repeats < 1:
        parser.error(f"--images {given.images} --repeats {given.repeats}: nothing to measure")
    left_out = missing("lightly")
    names = ["twoview", "plain", *({"lightly"} - left_out.keys())]
    provenance, rows = begin("NT-Xent, forward and backward", "images/s", ["lightly"], left_out=left_out), []
    for images in given.images:
        chosen = names if images <= LARGEST_OF_OTHERS else names[:1]
        cases = {name: OwnProcess(seconds, name, images) for name in chosen}
        repeats = given.repeats if images <= LARGEST_OF_OTHERS else 1
        rows += rates(f"N = {images}", cases, images, repeats, warm_up=int(repeats > 1))
        for case in cases.values():
            case.pool.shutdown()
    print("\n| setting | implementation | extra memory in MiB |\n|---|---|---|")
    for row in rows:
        case = OwnProcess(extra_memory, row["name"], int(row["setting"].removeprefix("N = ")))
        row["extra_bytes"] = case()
        case.pool.shutdown()
        print(f"| {row['setting']} | {row['name']} | {row['extra_bytes'] / 2**20:,.1f} |", flush=True)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
