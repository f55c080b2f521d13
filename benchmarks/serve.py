"""A server under load: latency and speed beside the bare encoder, and hostile uploads while it serves.

    python benchmarks/serve.py --root CIFAR10 --checkpoint RUN                            # 32 clients, 60 seconds
    python benchmarks/serve.py --root CIFAR10 --checkpoint RUN --seconds 5 --images 500   # a small form

An index of the images is built, and ``task=serve`` is started on it in a process of its own. Clients are threads of
another process; each keeps its connection and posts image files to /search, one after the other. The bare encoder
decodes the same files and computes their features in batches of 32 in one process, before and after the clients.

200 hostile uploads follow while as many clients go on, a quarter each: files that are cut off, PNG files that declare
60,000 x 60,000 pixels, PNG files of some kilobytes with nearly the allowed number of pixels, and uploads that stop
after one byte. Errors are answers other than 200 to the clients, and unexpected answers to the hostile uploads.
"""

import argparse
import csv
import http.client
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import begin, save

import twoview
from twoview.data.decode import SUFFIXES
from twoview.tools import ServeSettings

TRAIN = Path(__file__).parents[1] / "train.py"
BATCH = 32
JPEG = {"Content-Type": "image/jpeg"}
# A server that is busy may refuse any request with 503, but not those of the clients.
EXPECTED = {"broken": {415, 422, 503}, "huge": {413, 503}, "bomb": {200, 413, 422, 503}, "slow": {408, 503}}
COLUMNS = ("what", "images", "errors", "images/s", "p50 ms", "p95 ms", "p99 ms")


def build(given: argparse.Namespace, scratch: Path) -> tuple[Path, list[str]]:
    """Index of a random sample of the images, made by the command line, and its files."""
    found = sorted(file for file in given.root.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = [str(file.resolve()) for file in random.Random(0).sample(found, min(given.images, len(found)))]
    with (scratch / "images.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label"], *([name, Path(name).parent.name] for name in files)])
    commands: list[list[str]] = [
        ["task=embed", "data=folder", f"data.root={scratch}/images.csv", f"checkpoint={given.checkpoint}"],
        ["task=index", f"embeddings={scratch}/images.parquet"],
    ]
    for command, to in zip(commands, ("images.parquet", "images.index"), strict=True):
        run = [sys.executable, str(TRAIN), *command, f"to={scratch / to}"]
        subprocess.run(run, cwd=scratch, check=True, stdout=sys.stderr)
    return scratch / "images.index", files


def start(index: Path, given: argparse.Namespace, scratch: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A running server and its port."""
    log = scratch / "server.log"
    command = [sys.executable, str(TRAIN), "task=serve", f"index={index}", f"checkpoint={given.checkpoint}", "port=0"]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=scratch, stdout=file, stderr=file)
    while server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text()):
            return server, int(found[1])
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def clients(port: int, count: int, seconds: float, files: list[str]) -> None:
    """Post files from ``count`` threads, for some seconds or until standard input is closed; print what came of it."""
    images, stop = [Path(file).read_bytes() for file in files], threading.Event()
    times: list[float] = []
    errors: Counter[str] = Counter()

    def client(number: int) -> None:
        draw, connection = random.Random(number), http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                connection.request("POST", "/search", draw.choice(images), JPEG)
                response = connection.getresponse()
                found = len(json.loads(response.read()).get("neighbors", []))
                if response.status != 200 or found == 0:
                    errors[str(response.status)] += 1
            except (OSError, http.client.HTTPException) as error:
                errors[type(error).__name__] += 1
                connection.close()
            times.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": time.perf_counter() - begun, "times": times, "errors": errors}))


def start_clients(port: int, count: int, seconds: float, files: Path) -> subprocess.Popen[str]:
    """The clients in a process of their own."""
    command = [sys.executable, __file__, "--client", str(port), str(count), str(seconds), str(files)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def row_of(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the clients, and print their row."""
    if process.stdin is not None and name != "clients":
        process.stdin.close()
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    process.wait()
    times = 1000 * np.array(found["times"])
    shares = {f"p{share}": float(np.percentile(times, share)) for share in (50, 95, 99)}
    row = {"name": name, "images": len(times), "errors": found["errors"], "per_second": len(times) / found["seconds"]}
    cells = [name, f"{len(times):,}", str(sum(found["errors"].values())), f"{row['per_second']:,.0f}"]
    print(f"| {' | '.join([*cells, *(f'{value:,.0f}' for value in shares.values())])} |", flush=True)
    return row | shares


def bare(encoder: twoview.Encoder, files: list[str], seconds: float) -> dict[str, Any]:
    """Decode files and compute their features, some seconds long."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        some = [files[(done + i) % len(files)] for i in range(BATCH)]
        pixels = torch.stack([encoder.preprocess.decoded(file)[0] for file in some])
        encoder.apply_network(encoder.preprocess.normalized(pixels))
        done += BATCH
    row = {"name": "bare encoder", "images": done, "per_second": done / (time.perf_counter() - begun)}
    print(f"| bare encoder | {done:,} | | {row['per_second']:,.0f} | | | |", flush=True)
    return row


def png(side: int, rows: bytes) -> bytes:
    """A PNG file of one bit per pixel that declares its size."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def hostile(port: int, each: int, files: list[str]) -> dict[str, Any]:
    """Send the hostile uploads, 25 at a time and the slow ones all at once."""
    side = int(ServeSettings().max_pixels ** 0.5)
    images = {
        "broken": lambda: Path(random.choice(files)).read_bytes()[: random.randint(100, 600)],
        "huge": lambda: png(60_000, zlib.compress(bytes(10**6))),
        "bomb": lambda: png(side, zlib.compress(bytes(side * (side // 8 + 2)), 9)),
    }

    def send(kind: str) -> tuple[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", "/search", images[kind](), JPEG)
        return kind, connection.getresponse().status

    def slow(_: int) -> tuple[str, int]:
        with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
            connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n")
            connection.sendall(b"Content-Length: 1000\r\n\r\nx")
            return "slow", int(connection.recv(4096).split()[1])

    kinds = [kind for kind in images for _ in range(each)]
    random.Random(0).shuffle(kinds)
    begun = time.perf_counter()
    with ThreadPoolExecutor(25) as some, ThreadPoolExecutor(each) as all_at_once:
        waiting = all_at_once.map(slow, range(each))
        answers = Counter([*some.map(send, kinds), *waiting])
    wrong = sum(count for (kind, status), count in answers.items() if status not in EXPECTED[kind])
    found = {kind: {status: count for (k, status), count in answers.items() if k == kind} for kind in EXPECTED}
    row = {"name": "hostile uploads", "images": 4 * each, "errors": wrong, "answers": found}
    row["per_second"] = 4 * each / (time.perf_counter() - begun)
    print(f"| hostile uploads, {found} | {4 * each} | {wrong} | {row['per_second']:,.1f} | | | |", flush=True)
    return row


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def measure(given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """All rows."""
    index, files = build(given, scratch)
    encoder, part = twoview.load(given.checkpoint), min(10.0, given.seconds)
    server, port = start(index, given, scratch)
    try:
        rows = [bare(encoder, files, part)]
        rows.append(row_of("clients", start_clients(port, given.clients, given.seconds, scratch / "images.csv")))
        rows.append(bare(encoder, files, part))
        others = start_clients(port, given.clients, 3600, scratch / "images.csv")
        rows.append(hostile(port, given.hostile // 4, files))
        rows.append(row_of("clients beside hostile uploads", others))
        status, health = get(port, "/health")
        figures = dict(line.rpartition(" ")[::2] for line in get(port, "/metrics")[1].splitlines() if line[0] != "#")
        images, batches = (float(figures[f"twoview_batch_images_{name}"]) for name in ("sum", "count"))
        memory = float(figures["process_resident_memory_bytes"]) / 1e6
        print(
            f"\nafterwards: /health {status} {json.loads(health)['status']}; {images / batches:.1f} images a batch;",
            end=" ",
        )
        print(f"{memory:,.0f} MB of memory; {figures['twoview_decoders_killed']} decoders killed;", end=" ")
        server.send_signal(signal.SIGTERM)
        print(f"exit code {server.wait(60)} after SIGTERM")
        return rows
    finally:
        server.kill()


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        port, count, seconds, listed = sys.argv[2:]
        with open(listed, newline="", encoding="utf-8") as file:
            clients(int(port), int(count), float(seconds), [row["path"] for row in csv.DictReader(file)])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of image files, of any nesting")
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
    parser.add_argument("--images", type=int, default=5000, help="number of images in the index")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hostile", type=int, default=200, help="number of hostile uploads")
    parser.add_argument("--json", help="file for the table with provenance")
    given = parser.parse_args()
    provenance = begin("A server under load", extra_packages=["fastapi", "uvicorn"], columns=COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(given, Path(scratch))
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
