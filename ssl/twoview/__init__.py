"""twoview: self-supervised image features from two views of each image."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("twoview")
except PackageNotFoundError:  # run from a clone without installation
    __version__ = "0+unknown"

__all__ = ["MomentumCopy", "NegativeQueue", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # `python train.py --help` and a mistyped knob should not wait for torch.
    if name == "load":
        from twoview.checkpoints import load

        return load
    if name == "MomentumCopy":
        from twoview.momentum import MomentumCopy

        return MomentumCopy
    if name == "NegativeQueue":
        from twoview.negatives import NegativeQueue

        return NegativeQueue
    raise AttributeError(f"module 'twoview' has no attribute {name!r}")
