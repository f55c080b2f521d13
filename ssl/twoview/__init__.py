"""twoview: self-supervised image features from two views of each image."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("twoview")
except PackageNotFoundError:  # run from a clone without installation
    __version__ = "0+unknown"

_MODULES = {"MomentumCopy": "twoview.momentum", "NegativeQueue": "twoview.negatives"}
_MODULES |= {"Encoder": "twoview.encoder", "ModelCard": "twoview.encoder", "load": "twoview.loading"}
__all__ = ["Encoder", "ModelCard", "MomentumCopy", "NegativeQueue", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `python train.py --help` and a mistyped knob should not wait for torch.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'twoview' has no attribute {name!r}")
