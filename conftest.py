"""What tests and doctests share."""

import os

# Before torch is imported: each process of pytest-xdist computes on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _names(request):
    """Names that doctests use: ``torch``, ``nn``, and ``folder``, a fresh folder."""
    if isinstance(request.node, pytest.DoctestItem):
        import torch

        names = request.getfixturevalue("doctest_namespace")
        names |= {"torch": torch, "nn": torch.nn, "folder": str(request.getfixturevalue("tmp_path"))}
