"""Networks and evaluations that do not fit in memory."""

import resource
from pathlib import Path

import pytest
import torch
from hostile_runs import SHORT, run
from torch import nn

from twoview import devices, runs
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
    "evaluation": ([], failing("_evaluate", RuntimeError(f"{CPU} 9 bytes.")), "out of memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_in_memory_is_said_in_a_sentence(name, tmp_path):
    arguments, prepare, message = REFUSED[name]
    names = {argument.partition("=")[0] for argument in arguments}
    base = [knob for knob in SHORT if knob.partition("=")[0] not in names]
    found = run(tmp_path / "work", "hydra.run.dir=runs/r", *base, *FAKE, *arguments, prepare=prepare)
    assert found.refused(message), found


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
    monkeypatch.setattr(trainer, "memory_size", lambda device: 7e6)
    with pytest.raises(UserError, match=r"weights and gradients need 0.0 GB, but there are 0.0 GB"):
        trainer.build_trainer(TrainerSettings(accelerator="cpu"), nn.Linear(1000, 1000), [], [], tmp_path)
    assert devices.memory_size(torch.device("cpu")) > 1e9
