"""Memory of the process, and settings of the allocator of the C library if it is glibc."""

import ctypes
import math
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of mallopt(3)
# A freed tensor above 32 MiB is returned to the system at once, other memory if more than 64 MiB lie free at the end of
# the heap. glibc raises its limits to these values only as it frees tensors of such sizes.
# Where torch has an allocator of its own, as on Linux for ARM, tensors on the CPU are not affected.
DEFAULTS = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}  # all memory is kept in the process


def peak_memory() -> float:
    """Return the largest number of bytes that this process has occupied; infinity if it is not known."""
    if not sys.platform.startswith("linux"):
        return math.inf
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def set_allocator(parameters: dict[int, int]) -> bool:
    """Set parameters of the allocator for the whole process; returns whether it took all of them.

    Args:
        parameters: DEFAULTS or KEPT.
    """
    library = _glibc()
    return library is not None and all(library.mallopt(name, value) == 1 for name, value in parameters.items())


def return_memory() -> None:
    """Return free memory to the system; no effect without glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process; None if it is not glibc."""
    try:
        library = ctypes.CDLL(None)
        return library if library.gnu_get_libc_version and library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # TypeError on Windows
        return None
