"""Uploads that are broken, too large, slow or not images, while the server goes on."""

import gzip
import os
import signal
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from servers import form

HEAD = "POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def png(width, height, rows=b""):
    """A PNG file that declares a size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noise(kind, size=64):
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def array(shape):
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


WHOLE = noise("PNG")
BOMB = zlib.compress(bytes(40_000_000), 9)
HOSTILE = {
    "nothing": (b"", 400, "the image has no bytes"),
    "a text": (b"hello\n" * 50, 415, "no image in a format"),
    "a page": (b"<html><script>alert(1)</script>", 415, "no image in a format"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "no image in a format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "no image in a format"),
    "a compressed image": (gzip.compress(WHOLE), 415, "no image in a format"),
    "broken PNG": (WHOLE[: len(WHOLE) // 2], 422, "cannot be decoded"),
    "broken JPEG": (noise("JPEG")[:400], 422, "cannot be decoded"),
    "random bytes after a header": (b"\xff\xd8\xff" + bytes(range(256)) * 2, 415, "no image in a format"),
    "huge": (png(60_000, 60_000, BOMB), 413, "more than max_pixels=1000000"),
    "just too large": (png(1001, 1000, BOMB), 413, "more than max_pixels=1000000"),
    "as long as wide is short": (png(2**31 - 1, 1), 413, "more than max_pixels"),
    "a bomb of the allowed size": (png(1000, 1000, BOMB), 200, ""),
    "a huge array": (array((100_000, 100_000, 3)), 413, "more than max_pixels=1000000"),
    "an array of objects": (b"\x93NUMPY\x01\x00\x10\x00{'descr': 'O'}  \n", 422, "cannot be decoded"),
    "too many bytes": (WHOLE + bytes(400_000), 413, "larger than max_upload=300000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_in_a_sentence(name, server):
    image, expected, message = HOSTILE[name]
    for body, kind in ((image, "image/png"), form(image)):
        status, content = server.post("/search", body, kind)
        assert status == expected
        if expected != 200:
            assert message in content["detail"]
            assert "\n" not in content["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (WHOLE, "text/plain", 415),
        (WHOLE, "application/x-www-form-urlencoded", 415),
        (WHOLE, "image/\x80", 200),
        (form(WHOLE)[0][:-60], form(b"")[1], 400),
        (form(WHOLE)[0][:40], form(b"")[1], 400),
        (form(WHOLE)[0], "multipart/form-data", 400),
        (form(WHOLE)[0], "multipart/form-data; boundary=other", 400),
        (form(WHOLE)[0], f"Multipart/Form-Data; boundary={'b' * 999}", 400),
        (form(WHOLE)[0].removesuffix(b"--bound--\r\n") + form(WHOLE)[0], form(b"")[1], 400),
        (b"--bound\r\nX: " + b"y" * 200_000, form(b"")[1], 400),
        (form(b"\r\n--boundx" * 20_000)[0], form(b"")[1], 415),
    ],
)
def test_other_types_and_damaged_forms(body, kind, status, server):
    found, content = server.post("/search", body, kind)
    assert found == status, content
    assert found == 200 or content["detail"]


def exchange(server, *parts, wait=0.0):
    """What the server answers to bytes, which are sent apart, until it closes the connection."""
    with server.connect() as connection:
        for part in parts:
            connection.sendall(part if isinstance(part, bytes) else part.encode())
            time.sleep(wait)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_the_size_is_checked_before_and_while_a_body_is_read(server):
    answer = exchange(server, HEAD + "Connection: close\r\nContent-Length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    answer = exchange(
        server, HEAD + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n", chunk * 12, b"0\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413")
    answer = exchange(server, HEAD + "Expect: 100-continue\r\nConnection: close\r\nContent-Length: 300001\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert server.metric("twoview_upload_bytes") == 0


def test_slow_clients_are_ended_and_the_others_served(server, photos):
    start = time.monotonic()
    slow = [HEAD + "Content-Length: 1000\r\n\r\n", "x"]
    with ThreadPoolExecutor(20) as clients:
        uploads = [clients.submit(exchange, server, *slow, wait=0.3) for _ in range(12)]  # twice the concurrency
        time.sleep(0.5)
        assert server.metric("twoview_uploading") >= 8
        assert server.post("/search", photos.files[0].read_bytes())[0] == 200
        answers = [upload.result() for upload in uploads]
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
        assert b"took more than timeout_s=3" in answers[0]
    assert time.monotonic() - start < 20
    assert server.metric("twoview_uploading") == 0


def test_clients_that_leave_do_not_disturb_others(server, photos):
    image = photos.files[1].read_bytes()
    for sent in (image, image[:50]):
        for _ in range(4):
            connection = server.connect()
            connection.sendall(f"{HEAD}Content-Length: {len(image)}\r\n\r\n".encode() + sent)
            connection.close()
    status, content = server.post("/search", image)
    assert status == 200
    assert content["neighbors"][0]["id"] == 101
    assert exchange(server, b"\x16\x03\x01 no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.metric("twoview_upload_bytes") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_processes_that_hang_or_end_are_replaced(server, photos):
    image = photos.files[2].read_bytes()
    stopped = server.decoders()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    before = server.metric("twoview_decoders_killed")
    with ThreadPoolExecutor(8) as clients:
        waiting = [clients.submit(server.post, "/search", image) for _ in range(6)]
        while server.metric("twoview_working") < 6 and not waiting[0].done():
            time.sleep(0.02)
        status, headers, content = server.request("POST", "/search", image, {"Content-Type": "image/png"})
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "busy" in content["detail"]
        assert server.request("GET", "/health")[0] == 200
        answers = [answer.result() for answer in waiting]
    refused = [content["detail"] for status, content in answers if status == 422]
    # On a busy machine, starting other processes may take longer than a request waits.
    assert len(refused) >= len(stopped)
    assert server.metric("twoview_decoders_killed") - before >= len(stopped)
    assert all("took more than timeout_s=3" in sentence for sentence in refused)
    assert {status for status, _ in answers} <= {200, 422, 503}
    for pid in server.decoders():
        os.kill(pid, signal.SIGKILL)
    assert [server.post("/search", image)[0] for _ in range(4)] == [200] * 4
    assert server.metric("twoview_decoders_ended") >= 1
