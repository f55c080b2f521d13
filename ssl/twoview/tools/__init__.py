"""What is done with features: tools of the public API, each of which is also a task of the command line."""

from importlib import import_module
from typing import Any

_MODULES = {
    "DriftSettings": "twoview.tools.drift_settings",
    "Index": "twoview.tools.index",
    "IndexSettings": "twoview.tools.index_settings",
    "ServeSettings": "twoview.serving.settings",
    "drift": "twoview.tools.drift_detection",
    "embed": "twoview.tools.embedding",
    "export": "twoview.tools.exporting",
    "find_duplicates": "twoview.tools.near_duplicates",
    "read_embeddings": "twoview.tools.embedding_file",
    "serve": "twoview.serving.server",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    # Imported on first use: each tool has its own optional libraries.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'twoview.tools' has no attribute {name!r}")
