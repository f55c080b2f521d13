"""twoview: self-supervised image features from two views of each image."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("twoview")
except PackageNotFoundError:  # run from a clone without installation
    __version__ = "0+unknown"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `python train.py --help` and a mistyped knob should not wait for torch.
    if name == "load":
        from twoview.checkpoints import load

        return load
    raise AttributeError(f"module 'twoview' has no attribute {name!r}")
