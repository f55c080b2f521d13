"""What tests and doctests share."""

import os

# Before torch is imported: each process of pytest-xdist computes on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_configure(config):
    """Hide GPUs from all tests but those that need one, which ``pytest -m gpu`` selects.

    The other tests compare with results of a CPU, and fork processes, which cannot use CUDA after the first one has.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _names(request):
    """Names that doctests use: ``torch``, ``nn``, and ``folder``, a fresh folder."""
    if isinstance(request.node, pytest.DoctestItem):
        import torch

        names = request.getfixturevalue("doctest_namespace")
        names |= {"torch": torch, "nn": torch.nn, "folder": str(request.getfixturevalue("tmp_path"))}
