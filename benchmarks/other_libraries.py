"""Training steps of other libraries as their documentation shows them. None of them is a dependency of twoview.

lightly 1.6: examples/pytorch/simclr.py and moco.py of its repository.

stable-pretraining 0.1: benchmarks/cifar10/simclr-resnet18.py of its repository, with the augmentation of lightly's
example, without the online probes, and at fp32. It has no MoCo v2. Where it is installed, it adds callbacks to every
Trainer of Lightning, also to those of twoview; it therefore runs in a process of its own, and
:func:`without_added_callbacks` keeps these callbacks out of the other Trainers.

solo-learn is left out: its release 1.0.2 needs pl_bolts, whose last release imports a module of Lightning 1
(``pytorch_lightning.utilities.apply_func``), and twoview needs Lightning 2.6.
"""

import copy
import importlib.util
import itertools
import logging
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from stopwatch import WARM_UP, Stopwatch, seconds_of_steps
from torch import nn
from torch.utils.data import DataLoader, Dataset

from twoview.devices import pick_device

WORKERS = (0, 2)  # numbers of loader processes of the other libraries


@dataclass(frozen=True)
class Setting:
    """What all libraries have in common.

    Attributes:
        name: name in the table.
        method: "simclr" or "moco".
        size: height and width of the views in pixels.
        batch: number of images per step.
        small_stem: whether ResNet-18 begins with a 3x3 convolution of stride 1 without pooling, instead of the layers
            for ImageNet.
        blur_p: probability of the blur; 0.0 where the example of lightly has none.
        files: whether the images are JPEG files.
    """

    name: str
    method: str
    size: int
    batch: int
    small_stem: bool
    blur_p: float
    files: bool = False


def missing(*libraries: str) -> dict[str, str]:
    """Return the libraries that cannot be imported, with the reason. They are imported in another process."""
    found = {}
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            found[library] = "not installed"
            continue
        tried = subprocess.run([sys.executable, "-c", f"import {library}"], capture_output=True, text=True, check=False)
        if tried.returncode:
            found[library] = tried.stderr.strip().splitlines()[-1]
    return found


def without_added_callbacks() -> None:
    """Let Lightning in this process ignore the callbacks that installed packages register for every Trainer."""
    from lightning.pytorch.trainer.connectors import callback_connector

    callback_connector._load_external_callbacks = lambda group: []


def resnet18(small_stem: bool) -> nn.Module:
    """Return torchvision's ResNet-18 without its last layer, random weights."""
    import torchvision

    network = torchvision.models.resnet18()
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    return nn.Sequential(*list(network.children())[:-1])


def loader(dataset: Dataset, setting: Setting, workers: int) -> DataLoader:
    return DataLoader(dataset, batch_size=setting.batch, shuffle=True, drop_last=True, num_workers=workers)


def lightly_transform(setting: Setting) -> Any:
    if setting.method == "moco":
        from lightly.transforms.moco_transform import MoCoV2Transform

        return MoCoV2Transform(input_size=setting.size, gaussian_blur=setting.blur_p)
    from lightly.transforms.simclr_transform import SimCLRTransform

    return SimCLRTransform(input_size=setting.size, gaussian_blur=setting.blur_p)


def lightly(setting: Setting, dataset: Dataset, workers: int, steps: int) -> Callable[[], float]:
    """Return a function that trains with lightly's example, and returns the seconds of ``steps`` steps.

    Args:
        setting: method, network and batch size.
        dataset: items are tuples that begin with the two views of :func:`lightly_transform`.
        workers: number of loader processes.
        steps: number of steps whose time is measured.
    """
    device = pick_device()
    step = (_lightly_moco if setting.method == "moco" else _lightly_simclr)(setting.small_stem, device)
    return lambda: seconds_of_steps(step, loader(dataset, setting, workers), steps)


def _lightly_simclr(small_stem: bool, device: torch.device) -> Callable[[Any], None]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    model = nn.Sequential(resnet18(small_stem), nn.Flatten(), SimCLRProjectionHead(512, 512, 128)).to(device)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def step(batch: Any) -> None:
        x0, x1 = (view.to(device) for view in batch[0])
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _lightly_moco(small_stem: bool, device: torch.device) -> Callable[[Any], None]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    backbone, head = resnet18(small_stem).to(device), MoCoProjectionHead(512, 512, 128).to(device)
    backbone_momentum, head_momentum = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(backbone_momentum)
    deactivate_requires_grad(head_momentum)
    criterion = NTXentLoss(memory_bank_size=(4096, 128)).to(device)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)

    def step(batch: Any) -> None:
        update_momentum(backbone, backbone_momentum, m=0.996)
        update_momentum(head, head_momentum, m=0.996)
        x_query, x_key = (view.to(device) for view in batch[0])
        query = head(backbone(x_query).flatten(start_dim=1))
        key = head_momentum(backbone_momentum(x_key).flatten(start_dim=1)).detach()
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class OwnProcess:
    """Calls a function in a process of its own, which does nothing between the calls.

    Args:
        build: function of a module that returns the function to call; called in the process.
        arguments: arguments of ``build``.
    """

    def __init__(self, build: Callable[..., Callable[[], float]], *arguments: Any) -> None:
        # The server of forks imports the benchmark once for all processes.
        context = multiprocessing.get_context("forkserver")
        self.pool = ProcessPoolExecutor(1, context, initializer=_build, initargs=(build, *arguments))

    def __call__(self) -> float:
        """Call the function, and return its result."""
        return self.pool.submit(_call).result()


_built: list[Callable[[], float]] = []  # in the process of OwnProcess


def _build(build: Callable[..., Callable[[], float]], *arguments: Any) -> None:
    os.dup2(2, 1)  # the standard output is for the table
    _built.append(build(*arguments))


def _call() -> float:
    return _built[0]()


def stable_pretraining(setting: Setting, dataset: Dataset, workers: int, steps: int) -> Callable[[], float]:
    """Return a function as :func:`lightly` does, for SimCLR of stable-pretraining.

    Args:
        setting: network and batch size.
        dataset: items are tuples of a PIL image and a label.
        workers: number of loader processes.
        steps: number of steps whose time is measured.
    """
    import lightning as L
    import stable_pretraining as spt
    from loguru import logger
    from stable_pretraining import forward
    from stable_pretraining.data import transforms as T

    logger.remove()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    one_view = T.Compose(
        T.RGB(),
        T.RandomResizedCrop((setting.size, setting.size)),
        T.RandomHorizontalFlip(p=0.5),
        T.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
        T.RandomGrayscale(p=0.2),
        *([T.PILGaussianBlur(p=setting.blur_p)] if setting.blur_p else []),
        T.ToImage(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    )
    views = spt.data.FromTorchDataset(
        dataset, names=["image", "label"], transform=T.MultiViewTransform([one_view, one_view])
    )

    def run() -> float:
        widths = (512, 2048, 2048, 256)
        layers = [nn.Linear(widths[0], widths[1])]
        for narrow, wide in itertools.pairwise(widths[1:]):
            layers += [nn.BatchNorm1d(narrow), nn.ReLU(inplace=True), nn.Linear(narrow, wide)]
        module = spt.Module(
            backbone=nn.Sequential(resnet18(setting.small_stem), nn.Flatten()),
            projector=nn.Sequential(*layers),
            forward=forward.simclr,
            simclr_loss=spt.losses.NTXEntLoss(temperature=0.5),
            optim={
                "optimizer": {"type": "LARS", "lr": 5, "weight_decay": 1e-6},
                "scheduler": {"type": "LinearWarmupCosineAnnealing"},
                "interval": "epoch",
            },
        )
        watch = Stopwatch(steps)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(max_steps=WARM_UP + steps, devices=1, callbacks=[watch], **quiet)
            trainer.fit(module, datamodule=spt.data.DataModule(train=loader(views, setting, workers)))
        return watch.seconds

    return run
