"""Compilation of networks and augmentation by torch.compile during training."""

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from twoview.errors import UserError, require
from twoview.methods import Method
from twoview.momentum import MomentumCopy
from twoview.training.lightning_internals import swap_compiled_call

log = logging.getLogger(__name__)


def should_compile(choice: bool | str, device: torch.device) -> bool:
    """Decide whether to compile the networks.

    Args:
        choice: True, False, or "auto", which compiles on CUDA if the compilers are there. On a CPU, compiled networks
            are not faster.
        device: device of the training.

    Raises:
        UserError: if the choice is True and a compiler is missing.
    """
    if choice is False or (choice == "auto" and device.type != "cuda"):
        return False
    missing = _missing(device)
    if choice == "auto" and missing:
        log.info("trainer.compile=auto: the networks are not compiled: %s", missing)
        return False
    require(not missing, f"trainer.compile=true: {missing}; install what is missing, or set trainer.compile=false")
    return True


def _missing(device: torch.device) -> str:
    """What torch.compile needs and this machine lacks; empty if nothing is missing."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or above"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
    names = ("cl",) if os.name == "nt" else ("g++", "c++", "clang++", "gcc", "cc", "clang")
    found = any(shutil.which(name) for name in (os.environ.get("CXX") or os.environ.get("CC"), *names) if name)
    return "" if found else "there is no C++ compiler"


@contextlib.contextmanager
def compiled(method: Method, enabled: bool, others: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Within this context, the backbone and the momentum encoders of a method are compiled, and some other modules.

    The modules stay as they are, with the same names of tensors in a state dict. Evaluation afterwards, and that of the
    exported network, run without compilation.

    Args:
        method: method whose networks are compiled.
        enabled: whether to do anything.
        others: further modules that are compiled.

    Raises:
        UserError: if a network cannot be compiled.
    """
    copies = [module.copy for module in method.modules() if isinstance(module, MomentumCopy)]
    networks: list[nn.Module] = [method.backbone, *copies, *others] if enabled else []
    for network in networks:
        network.compile()
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        message = f"the networks cannot be compiled ({str(error).strip().partition(chr(10))[0]})"
        raise UserError(f"trainer.compile: {message}; set trainer.compile=false") from error
    finally:
        for network in networks:
            swap_compiled_call(network, None)


@contextlib.contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Within this context, a network runs without compilation; other batches would be compiled anew."""
    call = swap_compiled_call(network, None)
    try:
        yield
    finally:
        swap_compiled_call(network, call)
