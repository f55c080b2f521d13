"""Networks and evaluations that do not fit in memory."""

import math
import resource
from pathlib import Path

import pytest
import torch
from hostile_runs import SHORT, run
from PIL import Image
from torch import nn

from twoview import devices, runs
from twoview.data import digits, fake, folder
from twoview.devices import explained_memory
from twoview.errors import UserError
from twoview.training import TrainerSettings, trainer

FAKE = ("data=fake", "data.images=64", "data.batch_size=32", "eval.parts=[knn]")
CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def limited():
    """This process can have half a gigabyte more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def nothing():
    """Nothing is prepared."""


def failing(function, error):
    """A function of ``twoview.runs`` or of a method fails."""

    def prepare():
        def fails(*arguments, **knobs):
            raise error

        owner, _, name = function.rpartition(".")
        setattr(runs if not owner else getattr(runs, owner), name, fails)

    return prepare


# Further arguments, what is prepared, and a part of the sentence.
REFUSED = {
    "network": (
        ["backbone.name=vit_giant_patch14_224", "data.image_size=224"],
        limited,
        "backbone.name=vit_giant_patch14_224: out of memory; choose a smaller network (a tensor of",
    ),
    "preparation": ([], failing("prepare", MemoryError()), "out of memory; try a smaller data.batch_size"),
    "images": (["data.images=1000000000000"], nothing, "data.images=1000000000000 data.image_size=16: needs 6,912,0"),
    "size of images": (["data.image_size=100000"], nothing, "data.image_size=100000: needs "),
    "queue": (
        ["method=moco", "method.queue_size=1000000000000"],
        nothing,
        "queue_size=1000000000000: needs 528,000.0 GB",
    ),
    "support set": (
        ["method=nnclr", "method.queue_size=1000000000000"],
        nothing,
        "queue_size=1000000000000: needs 528,0",
    ),
    "evaluation": ([], failing("_evaluate", RuntimeError(f"{CPU} 9 bytes.")), "out of memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_in_memory_is_said_in_a_sentence(name, tmp_path):
    arguments, prepare, message = REFUSED[name]
    names = {argument.partition("=")[0] for argument in arguments}
    base = [knob for knob in (*SHORT, *FAKE) if knob.partition("=")[0] not in names]
    found = run(tmp_path / "work", "hydra.run.dir=runs/r", *base, *arguments, prepare=prepare)
    assert found.refused(message), found


def test_held_images_that_do_not_fit_are_refused_before_they_are_read(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    (tmp_path / "list.txt").write_text("one.png\n" * 2000)
    sentence = r"data.memory=100TB: holding images of up to 16000 pixels: needs 1,536\.0 GB .*; set data.memory=0"
    with pytest.raises(UserError, match=sentence):
        folder(str(tmp_path / "list.txt"), store_size=16_000, memory="100TB")


@pytest.mark.parametrize(
    ("error", "figure"),
    [
        (MemoryError(), "x"),
        (RuntimeError(f"{CPU} 4000000000 bytes."), r"x \(a tensor of 4 GB was asked for\)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), r"x \(a tensor of 2.5 GiB"),
        (OSError(12, "Cannot allocate memory"), "x"),
    ],
)
def test_all_kinds_of_missing_memory_are_recognized(error, figure):
    with pytest.raises(UserError, match=f"^{figure}"), explained_memory("x"):
        raise error


def test_other_errors_are_unchanged():
    for error in (RuntimeError("shapes"), UserError("out of memory"), OSError(28, "No space left on device")):
        with pytest.raises(type(error)) as caught, explained_memory("x"):
            raise error
        assert caught.value is error


def test_a_network_that_is_larger_than_the_memory_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda device: 3e8)
    sentence = "backbone.name: needs 0.4 GB of memory, but there are 0.3 GB; choose a smaller network"
    with pytest.raises(UserError, match=sentence):
        trainer.build_trainer(TrainerSettings(accelerator="cpu"), nn.Linear(10_000, 10_000), [], [], tmp_path)


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def group(folder, limit, used, cached=0, version=2):
    """Files of a control group in which each of two kinds of cached files takes half of ``cached``."""
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    stat = f"anon 1\n{prefix}active_file {cached // 2}\n{prefix}inactive_file {cached // 2}\n"
    return {f"{folder}/memory.{n}": str(v) for n, v in zip((*names, "stat"), (limit, used, stat), strict=True)}


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
# Files of the kernel, and the memory that a process can have.
FREE = {
    "not Linux": ({}, math.inf),
    "machine": (MACHINE, 8_192_000),
    "no limit": (MACHINE | {"proc/self/cgroup": "0::/a"} | group(f"{V2}/a", "max", 5), 8_192_000),
    "container": (MACHINE | {"proc/self/cgroup": "0::/"} | group(V2, 5000, 3000), 2000),
    "path outside of the container": (MACHINE | {"proc/self/cgroup": "0::/../b"} | group(V2, 5000, 3000), 2000),
    "cached files": (MACHINE | {"proc/self/cgroup": "0::/"} | group(V2, 5000, 4000, 1000), 2000),
    "cluster job": (
        MACHINE | {"proc/self/cgroup": "0::/job/step"} | group(f"{V2}/job/step", "max", 9) | group(f"{V2}/job", 99, 9),
        90,
    ),
    "the limit is reached": (MACHINE | {"proc/self/cgroup": "0::/"} | group(V2, 5000, 6000), 0),
    "version 1": (
        MACHINE | {"proc/self/cgroup": "9:cpu:/x\n4:memory:/a\n0::/"} | group(f"{V1}/a", 5000, 4000, 1000, 1),
        2000,
    ),
    "odd files": (MACHINE | {"proc/self/cgroup": "x\n0::/"} | group(V2, 5000, "?"), 8_192_000),
}


@pytest.mark.parametrize("name", FREE)
def test_the_memory_of_a_container_is_what_its_limit_leaves(name, tmp_path):
    files, expected = FREE[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert devices.available_memory(torch.device("cpu"), tmp_path) == expected


def test_what_exceeds_the_memory_is_refused_and_what_fits_is_not(monkeypatch):
    assert 1e8 < devices.available_memory(torch.device("cpu")) < math.inf
    monkeypatch.setattr(devices, "available_memory", lambda device: 2e9)
    devices.require_memory("x=1", 2e9, "choose less")
    with pytest.raises(UserError, match=r"^x=1: needs 2.1 GB of memory, but there are 2.0 GB; choose less$"):
        devices.require_memory("x=1", 2.1e9, "choose less")
    with pytest.raises(UserError, match="^x=1: needs 1,000,000"):
        devices.require_memory("x=1", 10**400, "choose less")
    monkeypatch.setattr(devices, "available_memory", lambda device: 1e6)
    with pytest.raises(UserError, match=r"data.images=50 data.image_size=64: needs 0.0 GB of memory"):
        fake(images=50, image_size=64)
    with pytest.raises(UserError, match=r"data.image_size=64: needs 0.0 GB of memory"):
        digits(image_size=64)
    assert len(fake(images=8, image_size=32).pretrain) == 8
