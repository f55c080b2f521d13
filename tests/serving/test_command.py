"""Start, stop and mistakes of ``task=serve``, and the page in a browser."""

import http.client
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
from checkpoints import save_checkpoint

from twoview.errors import Interrupted, UserError
from twoview.serving import server as serving
from twoview.tools import Index, ServeSettings, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_in_python_until_sigint(photos, caplog):
    caplog.set_level("INFO")

    def stop():
        end = time.monotonic() + 200
        while time.monotonic() < end and not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", caplog.text)):
            time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/health")
        statuses.append(connection.getresponse().status)
        connection.close()
        os.kill(os.getpid(), signal.SIGINT)

    statuses, before = [], signal.getsignal(signal.SIGINT)
    client = threading.Thread(target=stop, daemon=True)
    client.start()
    with pytest.raises(Interrupted, match="SIGINT: stopped") as stopped:
        serve(photos.index, settings=ServeSettings(port=0))
    client.join()
    assert stopped.value.code == 130
    assert statuses == [200]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"port": 65536}, "port=65536: give a whole number from 0 to 65535"),
        ({"port": True}, "port=True"),
        ({"host": ""}, "host=: give an address"),
        ({"hosts": "a"}, "hosts=a: give a list"),
        ({"k": 0}, "k=0: give a whole number from 1 to 1000"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms=nan: give a number from 0 to 10000"),
        ({"max_upload": "much"}, "max_upload=much: give a number of bytes"),
        ({"max_upload": 0}, "max_upload=0: give 1 byte to 2GiB"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"timeout_s": 0}, "timeout_s=0: give a number from 0.1 to 3600"),
        ({"concurrency": 0}, "concurrency=0"),
    ],
)
def test_wrong_values_are_one_sentence(knobs, message):
    with pytest.raises(UserError, match=message):
        ServeSettings(**knobs)


def test_places_that_cannot_be_used_are_one_sentence(photos, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: is used by another program; choose another one"):
            serve(photos.index, settings=ServeSettings(port=port))
    for host, message in (("203.0.113.7", "cannot be listened on"), ("no.such.host.invalid", "no address of")):
        with pytest.raises(UserError, match=message):
            serving.listen(host, 0)
    assert "no authentication" not in caplog.text
    serving.listen("0.0.0.0", 0).close()
    assert "can be reached from other machines, and there is no authentication" in caplog.text
    anywhere = ServeSettings(port=0)
    with pytest.raises(UserError, match="there is no such file; give one that task=index or task=embed has written"):
        serve(tmp_path / "none.index", settings=anywhere)
    index = Index.load(photos.index)
    index.source = str(tmp_path / "moved.ckpt")
    index.save(tmp_path / "moved.index")
    with pytest.raises(UserError, match=r"moved\.ckpt, which is no file here; give checkpoint="):
        serve(tmp_path / "moved.index", settings=anywhere)
    with pytest.raises(UserError, match="its weights have the hash"):
        serve(photos.index, save_checkpoint(tmp_path / "other.ckpt", 1), anywhere)


def test_the_missing_extra_is_named(photos, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    with pytest.raises(UserError, match=r'needs uvicorn; pip install "twoview\[serve\]"'):
        serve(photos.index)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(server, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=3000", "--dump-dom", f"http://127.0.0.1:{server.port}/"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "12 images of photos.index" in shown.stdout  # the script has run, and has asked the server
    assert re.search(r'<input[^>]*id="k"', shown.stdout)
    assert "Content Security Policy" not in shown.stderr
