"""A CUDA device without a GPU: tensors without values, which show where a host would wait for the device."""

import contextlib

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Raised by FakeTensorMode where a value or a shape depends on the content of a tensor.
WAITING = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class WaitError(AssertionError):
    """An operation for which the host waits, or with tensors of different devices."""


class _Watch(TorchDispatchMode):
    """Refuses what FakeTensorMode accepts: blocking copies between devices, and inputs on both."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            raise WaitError(f"{func}: inputs on {' and '.join(sorted(devices))}")
        if func in COPIES and "device" in kwargs and kwargs["device"] is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            raise WaitError(f"{func}: a blocking copy between {' and '.join(sorted(devices))}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def bf16_autocast():
    """``torch.autocast("cuda", torch.bfloat16)``, which torch does not enter where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@contextlib.contextmanager
def fake_cuda(*modules):
    """Within this context, the modules are on "cuda" without values, and an operation that waits raises WaitError."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cuda")
        try:
            with _Watch():
                yield
        except WAITING as error:
            raise WaitError(f"the host needs the content of a tensor: {error}") from error
