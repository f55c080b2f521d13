"""A server in a process of its own, and requests to it by the standard library."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from checkpoints import save_checkpoint
from commands import ROOT, environment
from PIL import Image

import twoview
from twoview.tools import Index
from twoview.tools.embedding_file import Embeddings
from twoview.tools.incoming import checkpoint_of


def make_photos(folder, count=12):
    """Images with unusual names, one of which is gone; a checkpoint and an index of them."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        files.append(folder / f"<img src=x onerror=alert(1)> {i} (ü), 'a'.png")
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((60, 50), Image.Resampling.BICUBIC).save(files[-1])
    encoder = twoview.load(save_checkpoint(folder / "net.ckpt", 0))
    vectors = encoder.feature_matrix([Image.open(file) for file in files])
    facts = {"card": asdict(encoder.card), "source": str(folder / "net.ckpt"), "checkpoint": checkpoint_of(encoder)}
    paths = [*map(str, files[:-2]), os.fsdecode(os.fsencode(folder) + b"/gone \xff.png"), "digit 3"]
    labels = [["cat", "dog"][i % 2] for i in range(count)]
    index = folder / "photos.index"
    Index.build(None, Embeddings(paths, torch.arange(count), labels, vectors, facts), ids=range(100, 100 + count)).save(
        index
    )
    return SimpleNamespace(folder=folder, files=files, encoder=encoder, vectors=vectors, index=index)


class Server:
    """A running ``task=serve``.

    Attributes:
        process: the process.
        port: its port.
    """

    def __init__(self, index, folder, *knobs):
        command = [sys.executable, str(ROOT / "train.py"), "task=serve", f"index={index}", "port=0", *knobs]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, env=environment(), start_new_session=True
            )
        self.port = self._started()

    def _started(self):
        end = time.monotonic() + 200
        while time.monotonic() < end and self.process.poll() is None:
            text = self.log.read_text()
            if "stop by Ctrl-C" in text:
                return int(text.partition("http://")[2].split("/")[0].rpartition(":")[2])
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def request(self, method, path, body=None, headers=None, timeout=60):
        """Status, headers and content of an answer, JSON decoded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        kind = response.headers.get_content_type()
        return response.status, response.headers, json.loads(content) if kind == "application/json" else content

    def connect(self):
        """A connection without a request."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path, image, content_type="image/png"):
        """Status and content of the answer to an image."""
        status, _, content = self.request("POST", path, image, {"Content-Type": content_type})
        return status, content

    def metric(self, name):
        """A figure of ``/metrics``."""
        lines = self.request("GET", "/metrics")[2].decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), None)

    def decoders(self):
        """Ids of the processes that decode images: those of the fork server, a child of the server."""
        children = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
        return [pid for child in children[self.process.pid] for pid in children.get(child, [])]

    def stop(self, number=signal.SIGTERM):
        """Exit code after a signal to the whole group of processes, as Ctrl-C is, and the log."""
        os.killpg(self.process.pid, number)
        return self.process.wait(30), self.log.read_text()

    def end(self):
        """End it without asking."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def form(content, boundary="bound", name="a.png"):
    """A multipart form of one file, and its content type."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
