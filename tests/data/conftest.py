"""The disk that the cache of decoded images sees, so that no test depends on how full the machine's is."""

import shutil
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    """Set the size and the free space of the disk in bytes; 1 TB, all of it free, unless a test says otherwise."""

    def resize(total, free):
        usage = SimpleNamespace(total=total, used=total - free, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    resize(10**12, 10**12)
    return resize
