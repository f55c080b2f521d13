"""Import of everything that a task needs, without searches for garbage."""

import atexit
import gc
import sys
from importlib import import_module
from types import ModuleType


def import_runs() -> ModuleType:
    """Import :mod:`twoview.runs`, and torch with it.

    Python would search the objects of thousands of modules for garbage: 2 seconds during the import, and 3 seconds at
    the end of the process. They are excluded from all searches.
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
        atexit.register(gc.freeze)  # what a task has imported since
    return sys.modules["twoview.runs"]
