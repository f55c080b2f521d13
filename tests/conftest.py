import gc
from types import SimpleNamespace

import pytest
import torch
from short_runs import pretrain

# The first backward pass of a process starts a thread for each device; a process with such threads cannot be forked for
# training. FakeTensorMode pretends that there is a GPU, so a test with it must not be the first.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run: its folder and its report."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    return SimpleNamespace(folder=folder, report=pretrain(folder))


def pytest_collection_finish():
    """Exclude all modules from garbage collection: in each forked process it would copy the memory that they share."""
    gc.freeze()
