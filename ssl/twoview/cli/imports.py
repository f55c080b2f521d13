"""Import of everything that a task needs, and settings of the process that make it faster."""

import atexit
import gc
import sys
from importlib import import_module
from types import ModuleType

from twoview.allocator import DEFAULTS, set_allocator


def import_runs() -> ModuleType:
    """Import :mod:`twoview.runs`, and torch with it.

    Python would search the objects of thousands of modules for garbage: 2 seconds during the import, and 3 seconds at
    the end of the process. They are excluded from all searches. Memory of freed tensors is used again, see
    :data:`twoview.allocator.DEFAULTS`; otherwise the system would have to clear it for each batch.
    """
    if "twoview.runs" not in sys.modules:
        collects = gc.isenabled()
        gc.disable()
        try:
            import_module("twoview.runs")
        finally:
            if collects:
                gc.enable()
        gc.freeze()
        set_allocator(DEFAULTS)
        atexit.register(gc.freeze)  # what a task has imported since
    return sys.modules["twoview.runs"]
