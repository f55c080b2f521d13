"""Memory and arithmetic of a training step per image, from which a long run can be sized; prints a Markdown table.

    python benchmarks/sizing.py                          # a minute on two cores
    python benchmarks/sizing.py --networks resnet18 --image-size 32

Measured on a CPU, since neither depends on the speed of the device:

* parameters of the backbone, and bytes of weights, gradients and the moments of the optimizer (16 bytes per parameter
  for AdamW and fp32 weights);
* activations: bytes that autograd keeps for the backward pass of one view with bf16 autocast, each storage once;
* arithmetic: floating-point operations of the forward pass of one view. A step of SimCLR takes 3 forward passes'
  worth for each of two views; MoCo takes 3 for one view and 1 for the other.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from side_by_side import begin, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from twoview.backbones import create_backbone

NETWORKS = ["resnet18", "resnet50", "vit_small_patch16_224", "vit_base_patch16_224"]


@contextmanager
def kept_bytes(network: nn.Module) -> Iterator[dict[int, int]]:
    """Context manager: sizes of the storages that autograd keeps, by address, without those of the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def activations(network: nn.Module, size: int, views: int) -> int:
    """Bytes that a forward pass of some views keeps."""
    images = torch.randn(views, 3, size, size).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), kept_bytes(network) as sizes:
        network(images)
        return sum(sizes.values())


def measure(name: str, size: int) -> dict[str, Any]:
    """Figures of a network for one view."""
    network = create_backbone(name, image_size=size, stem="timm")[0].to(memory_format=torch.channels_last).train()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(2, 3, size, size))
    parameters = sum(p.numel() for p in network.parameters())
    # Copies of the weights in bf16 are kept once, whatever the number of views.
    kept = (activations(network, size, 6) - activations(network, size, 2)) / 4
    operations = counter.get_total_flops() / 2
    return {"name": name, "size": size, "parameters": parameters, "activations": kept, "operations": operations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of timm")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--json", help="file for the table as JSON")
    given = parser.parse_args()
    columns = ["network", "pixels", "parameters", "weights, gradients, AdamW", "activations of a view", "forward pass"]
    provenance, rows = begin("Parts of a training step", columns=columns), []
    for name in given.networks:
        row = measure(name, given.image_size)
        rows.append(row)
        parts = [f"{row['parameters'] / 1e6:.1f} M", f"{16 * row['parameters'] / 1e6:,.0f} MB"]
        parts += [f"{row['activations'] / 1e6:,.1f} MB", f"{row['operations'] / 1e9:.2f} GFLOP"]
        print(f"| {name} | {row['size']} | {' | '.join(parts)} |", flush=True)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
