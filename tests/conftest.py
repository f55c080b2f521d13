from types import SimpleNamespace

import pytest
from short_runs import pretrain


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run: its folder and its report."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    return SimpleNamespace(folder=folder, report=pretrain(folder))
