"""Parts of the server without a running one: batches, accepted names, large images."""

import asyncio
import struct
import threading
import zlib
from io import BytesIO

import pytest
from PIL import Image

from twoview.data import Preprocess
from twoview.serving import decoder
from twoview.serving.batching import Batcher
from twoview.serving.guard import Guard
from twoview.serving.metrics import Metrics


def test_batches_have_the_right_size_and_return_each_result():
    sizes, threads = [], set()

    def squares(numbers):
        sizes.append(len(numbers))
        threads.add(threading.get_ident())
        if 13 in numbers:
            raise ValueError("unlucky")
        return [number**2 for number in numbers]

    async def scenario():
        batcher = Batcher(squares, max_batch=4, max_wait_s=0.2)
        assert not batcher.running
        async with batcher.started():
            found = await asyncio.gather(*(batcher.result(number) for number in range(10)))
            assert batcher.running
            wrong = await asyncio.gather(*(batcher.result(n) for n in (13, 2, 3, 5)), return_exceptions=True)
            left = asyncio.ensure_future(batcher.result(100))
            await asyncio.sleep(0)
            left.cancel()
            return found, wrong, await batcher.result(7)

    found, wrong, last = asyncio.run(scenario())
    assert found == [number**2 for number in range(10)]
    assert [str(error) for error in wrong] == ["unlucky"] * 4
    assert last == 49
    assert sizes == [4, 4, 2, 4, 1]
    assert len(threads) == 1


@pytest.mark.parametrize(
    ("host", "name", "accepted"),
    [
        ("0.0.0.0", "192.168.0.7:8000", True),
        ("0.0.0.0", "[fe80::1]:8000", True),
        ("0.0.0.0", "photos.example", True),
        ("0.0.0.0", "PHOTOS.example.:80", True),
        ("0.0.0.0", "other.example", False),
        ("127.0.0.1", "192.168.0.7", False),
        ("127.0.0.1", "127.1.2.3", True),
        ("127.0.0.1", "photos.example", True),
        ("::1", "[::1]:80", True),
    ],
)
def test_accepted_names(host, name, accepted):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def send(message):
        statuses.extend([message["status"]] if "status" in message else [])

    statuses = []
    guard = Guard(app, Metrics(), host, ["photos.example"])
    asyncio.run(guard({"type": "http", "headers": [(b"host", name.encode())]}, None, send))
    assert statuses == [204 if accepted else 421]


def test_large_images_are_decoded_in_a_second_request(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    file, steps = BytesIO(), Preprocess(8, [0.5] * 3, [0.2] * 3, store_size=16)
    Image.new("1", (4200, 4200)).save(file, "PNG")
    image = b"image/png\n" + file.getvalue()
    assert decoder.answer(decoder.UPLOAD, image, steps, 10**8) == decoder.LARGER
    assert decoder.answer(decoder.UPLOAD.upper(), image, steps, 10**8) == decoder.DONE + bytes(3 * 8 * 8)
    for kind in (decoder.UPLOAD, decoder.UPLOAD.upper()):
        assert decoder.answer(kind, image, steps, 10**6).startswith(decoder.REFUSED + b"413")
        assert decoder.answer(kind, b"\nhello", steps, 10**8).startswith(decoder.REFUSED + b"415")
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**28, 1)}
    array = b"\n\x93NUMPY\x01\x00\x76\x00" + str(header).encode().ljust(117) + b"\n"
    assert decoder.answer(decoder.UPLOAD, array, steps, 10**8) == decoder.LARGER
    assert decoder.answer(decoder.UPLOAD.upper(), array, steps, 10**7).startswith(decoder.REFUSED + b"413")


def test_chunks_that_decompress_to_much_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    name, content = b"zTXt", b"key\0\0" + zlib.compress(bytes(10**7))
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    file = BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    whole = file.getvalue()
    answer = decoder.answer(b"u", b"\n" + whole[:33] + chunk + whole[33:], Preprocess(8, [0.5] * 3, [0.2] * 3), 10**6)
    assert answer.startswith(decoder.REFUSED + b"422")
