"""What a GPU does with twoview, in one command of less than 10 minutes; prints Markdown tables and writes JSON.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --small          # a few images on the CPU, to see that it runs

* Augmentation: views per second at 32, 96 and 224 px, beside stock Kornia.
* NT-Xent: images per second and memory of the loss and its gradient, width 128, fp32, beside the cross-entropy of a
  whole matrix of logits.
* Training step: images per second of four methods with ResNet-18, 3x3 stem, 32 px, batch 512, bf16 autocast, and of
  three settings for ImageNet at 224 px, batch 256; share of the rate of a large bf16 matrix product on the same device;
  share of the time that augmentation takes; largest memory. The augmentation is compiled, the networks are not.
* Whole run: images per second of ``runs.pretrain`` with the same settings, from its log. Networks and
  augmentation are compiled.
* Waits: host synchronizations of one step, counted by the debug mode of CUDA; none on a CPU.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import augment
import losses
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from side_by_side import begin, median_seconds, rates, save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from twoview import runs
from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.data import fake
from twoview.heads import projection_head
from twoview.methods import NNCLR, Method, MoCo, MoCoV3, SimCLR
from twoview.optim import OptimizerSettings
from twoview.training.settings import Recipe, RunSettings, TrainerSettings

SMALL_RECIPE = augment.SMALL
METHODS: dict[str, Callable[..., Method]] = {
    "SimCLR": SimCLR,
    "MoCo": partial(MoCo, queue_size=4096),
    "MoCo v3": partial(MoCoV3, predictor=partial(projection_head, out_dim=128)),
    "NNCLR": partial(NNCLR, predictor=partial(projection_head, out_dim=128)),
}


class Setting(NamedTuple):
    """What is trained.

    Attributes:
        method: key of ``METHODS``.
        backbone: name of the network.
        batch: number of images per step.
        size: height and width of the views in pixels.
        recipe: knobs of the augmentation.
    """

    method: str
    backbone: str
    batch: int
    size: int
    recipe: dict[str, Any]


LARGE = [("SimCLR", "resnet50"), ("MoCo", "resnet50"), ("MoCo v3", "vit_small_patch16_224")]
SETTINGS = [Setting(name, "resnet18", 512, 32, SMALL_RECIPE) for name in METHODS]
SETTINGS += [Setting(name, backbone, 256, 224, {}) for name, backbone in LARGE]
SMALL_SETTINGS = [Setting(name, "test_resnet", 8, 16, SMALL_RECIPE) for name in METHODS]


class Training:
    """One training step of a method, as the Trainer does it: views, autocast, optimizer, EMA, queue."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        torch.manual_seed(0)
        batch, size = setting.batch, setting.size
        network, width = create_backbone(setting.backbone, image_size=size)
        method = METHODS[setting.method](network, projection_head(width))
        self.method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.augment = TwoViews(size, 3, [0.5] * 3, [0.25] * 3, **setting.recipe).to(device)
        for module in self.augment.compilable:
            module.compile()
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        self.ids, self.labels = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
        self.optimizer = OptimizerSettings().build(method, batch)
        self.device, self.steps = device, 0

    def views(self) -> tuple[Tensor, Tensor]:
        """Make the views of the next step."""
        self.steps += 1
        return self.augment(self.images, key=(0, self.steps))  # type: ignore[no-any-return]

    def loss(self, views: tuple[Tensor, Tensor]) -> Any:
        """Compute the networks and the loss under autocast."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.method(*views, ids=self.ids, labels=self.labels)

    def step(self) -> None:
        """Do the whole step."""
        made = self.loss(self.views())
        made.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_update(0.5)
        self.method.after_batch(made)

    def flops(self) -> float:
        """Floating-point operations of forward and backward pass, counted by torch."""
        with FlopCounterMode(display=False) as counter:
            self.loss(self.views()).loss.backward()
        return float(counter.get_total_flops())


def product_rate(device: torch.device, size: int, repeats: int) -> float:
    """FLOP/s of a bf16 matrix product of ``size``."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / median_seconds({"product": lambda: a @ a}, repeats, warm_up=3)["product"]


def count_waits(step: Callable[[], Any]) -> int | None:
    """Host synchronizations of one step, or None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


class Clock(DummyLogger):  # type: ignore[misc]
    """Times of the logged steps."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[int, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Note the time of a logged step."""
        self.times.append((step or 0, time.perf_counter()))


def whole_run(setting: Setting, steps: int) -> float:
    """Images per second of a run between the first logged step after a fifth of it and the last."""
    clock = Clock()
    recipe = Recipe(
        method=METHODS[setting.method],
        backbone=partial(create_backbone, setting.backbone, image_size=setting.size),
        augment=partial(TwoViews, **setting.recipe),
    )
    length = TrainerSettings(max_epochs=None, max_steps=steps, log_every=5, check_every=0)
    data = partial(fake, image_size=setting.size, batch_size=setting.batch, images=40 * setting.batch)
    with tempfile.TemporaryDirectory() as folder:
        runs.pretrain(data, recipe, length, None, RunSettings(run_dir=folder, loggers=[clock]))
    settled = [entry for entry in clock.times if entry[0] >= steps // 5]
    (first, start), (last, end) = settled[0], settled[-1]
    return setting.batch * (last - first) / (end - start)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Largest memory of tensors on the GPU during a call, beyond that before it; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def shown_bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:,.2f} GB"


def steps_table(settings: list[Setting], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Print and return a row for each setting, of training steps without a Trainer."""
    peak = product_rate(device, 8192 if device.type == "cuda" else 256, repeats)
    print(f"\nbf16 matrix product: {peak / 1e12:,.1f} TFLOP/s\n")
    columns = [
        "method",
        "network",
        "images/s",
        "share of the matrix product",
        "augmentation",
        "waits per step",
        "memory",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    rows = []
    for setting in settings:
        training = Training(setting, device)
        seconds = median_seconds({"step": training.step, "views": training.views}, repeats, warm_up=3)
        row = {
            **setting._asdict(),
            "per_second": setting.batch / seconds["step"],
            "share_of_product": training.flops() / seconds["step"] / peak,
            "share_of_augmentation": seconds["views"] / seconds["step"],
            "waits": count_waits(training.step),
            "bytes": peak_bytes(training.step, device),
        }
        rows.append(row)
        waits = "-" if row["waits"] is None else row["waits"]
        shares = f"{row['share_of_product']:.1%} | {row['share_of_augmentation']:.1%}"
        print(
            f"{start_of(setting)} | {row['per_second']:,.0f} | {shares} | {waits} | {shown_bytes(row['bytes'])} |",
            flush=True,
        )
    return rows


def runs_table(settings: list[Setting], steps: int) -> list[dict[str, Any]]:
    """Print and return a row for each setting, of whole runs."""
    print("\n| method | network | images/s of a whole run, compiled |\n|---|---|---|", flush=True)
    rows = []
    for setting in settings:
        rows.append({**setting._asdict(), "per_second": whole_run(setting, steps)})
        print(f"{start_of(setting)} | {rows[-1]['per_second']:,.0f} |", flush=True)
    return rows


def start_of(setting: Setting) -> str:
    """First cells of a row."""
    return f"| {setting.method} | {setting.backbone}, {setting.size} px, batch {setting.batch}"


def gradient(loss: losses.Loss, tensors: list[Tensor]) -> None:
    """Compute a loss and its gradient."""
    loss(*tensors).backward()


def losses_table(numbers: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Print and return a row for each implementation of NT-Xent and each number of images."""
    rows: list[dict[str, Any]] = []
    print("\n| images | NT-Xent | images/s | ratio to the last | memory |\n|---|---|---|---|---|", flush=True)
    for images in numbers:
        tensors = losses.embeddings(images, device)
        names = ["twoview", "plain"] if images <= losses.LARGEST_OF_OTHERS else ["twoview"]
        made = {name: losses.loss_of(name) for name in names}
        made = {"twoview, bf16 products": partial(made["twoview"], products="bf16"), **made}
        calls = {name: partial(gradient, loss, tensors) for name, loss in made.items()}
        medians = median_seconds(calls, repeats, warm_up=2)
        for name, call in calls.items():
            row = {"images": images, "name": name, "per_second": images / medians[name]}
            row |= {"ratio": medians[names[-1]] / medians[name], "bytes": peak_bytes(call, device)}
            rows.append(row)
            speed = f"{row['per_second']:,.0f} | {row['ratio']:.2f}"
            print(f"| {images:,} | {name} | {speed} | {shown_bytes(row['bytes'])} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few images of 16 px, on any device")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="file for the tables as JSON")
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; give --small to see that the benchmark runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    provenance = begin("Two views of a batch", "views/s")
    rows: list[dict[str, Any]] = []
    settings = (
        [("16 px, batch 8", 16, 16, 8, {})]
        if given.small
        else [
            ("32 px, batch 512, no blur", 32, 32, 512, SMALL_RECIPE),
            ("96 px, batch 256, blur", 96, 110, 256, {}),
            ("224 px, batch 256, blur", 224, 256, 256, {}),
        ]
    )
    for name, size, source, batch, knobs in settings:
        made = augment.cases(size, source, 3, batch, knobs, str(device), others=False)
        rows += rates(name, made, 2 * batch, given.repeats)
    provenance["losses"] = losses_table([16] if given.small else [512, 8192, 65536], given.repeats, device)
    chosen = SMALL_SETTINGS if given.small else SETTINGS
    provenance["steps"] = steps_table(chosen, given.repeats, device)
    provenance["runs"] = runs_table(chosen, 10 * given.repeats)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
