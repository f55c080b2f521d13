import pytest
from servers import Server, make_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("my photos"))


@pytest.fixture(scope="session")
def running():
    """The running server, if there is one."""
    servers = []
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def server(photos, running, tmp_path_factory):
    """A server with low limits, the same one for all tests; another one after it has been stopped."""
    knobs = ["k=3", "timeout_s=3", "max_upload=300000", "max_pixels=1000000", "concurrency=6", "max_wait_ms=50"]
    if not running or running[-1].process.poll() is not None:
        running.append(Server(photos.index, tmp_path_factory.mktemp("server"), *knobs))
    return running[-1]
