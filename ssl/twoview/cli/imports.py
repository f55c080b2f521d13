"""Import of everything that a task needs, and settings of the process that make it faster."""

import atexit
import gc
import os
import sys
from importlib import import_module
from types import ModuleType

from twoview.allocator import DEFAULTS, set_allocator

_GLIBC = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}


def import_runs() -> ModuleType:
    """Import :mod:`twoview.runs`, and torch with it.

    Python would search the objects of thousands of modules for garbage: 2 seconds during the import, and 3 seconds at
    the end of the process. They are excluded from all searches. Memory of freed tensors up to 32 MiB is used again, see
    :data:`twoview.allocator.DEFAULTS`, or the system would have to clear it for each batch. Settings of glibc in the
    environment have precedence.
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
        if not _GLIBC & os.environ.keys():
            set_allocator(DEFAULTS)
        atexit.register(gc.freeze)  # what a task has imported since
    return sys.modules["twoview.runs"]
