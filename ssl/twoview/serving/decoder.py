"""A process that decodes images for a server: it may be killed at any time, and the server goes on.

Requests and answers are bytes, since the server must not unpickle what a process sends that has read a hostile image.
"""

import contextlib
import io
import logging
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError

from twoview.data import Preprocess, whole
from twoview.data.decode import ImageSizeError
from twoview.errors import UserError

THUMBNAIL = 160  # largest height and width in pixels
SMALL = 2**24  # pixels of an image that any process may decode
# Requests: the input of the network from an uploaded body, which follows its Content-Type and a line break; a thumbnail
# of a path. In upper case, images may have more than SMALL pixels.
UPLOAD, PATH = b"u", b"p"
# Answers: the result; an HTTP status of three digits and a sentence; that the image may be a larger one.
DONE, REFUSED, LARGER = b"+", b"-", b"?"
FORM = b"multipart/form-data"
ADVICE = (
    "send the bytes of an image with Content-Type: image/jpeg, or a form with one file, as curl -F image=@FILE does"
)
MEMORY, MEMORY_OF_PIXEL = 2**28, 48  # bytes that decoding may take in addition to those of an idle process


class NoImageError(ValueError):
    """A body holds no image."""


def run(pipe: Connection, preprocess: Mapping[str, Any], max_pixels: int) -> None:
    """Answer requests until the other end of the pipe is closed.

    Args:
        pipe: receives requests, sends answers.
        preprocess: arguments of :class:`twoview.data.Preprocess`.
        max_pixels: number of pixels above which an image is refused by its header.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the group of the server, which finishes its requests
        signal.signal(number, signal.SIG_IGN)
    logging.disable()  # what is wrong with an image is in the answer
    torch.set_num_threads(1)
    steps = Preprocess(**preprocess)
    _limit_memory(MEMORY + MEMORY_OF_PIXEL * max_pixels)
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv_bytes()
            pipe.send_bytes(answer(request[:1], request[1:], steps, max_pixels))


def answer(kind: bytes, content: bytes, steps: Preprocess, max_pixels: int) -> bytes:
    """Answer one request."""
    Image.MAX_IMAGE_PIXELS = limit = max_pixels if kind.isupper() else min(SMALL, max_pixels)
    try:
        if kind.lower() == UPLOAD:
            return DONE + steps.decoded(image_of(*content.split(b"\n", 1)))[0].contiguous().numpy().tobytes()
        return DONE + thumbnail(os.fsdecode(content))
    except Exception as error:  # Pillow raises exceptions of many classes for damaged files
        status, sentence = _reason(error)
        if limit < max_pixels and status == 413:
            return LARGER
        return REFUSED + f"{status}{UserError(sentence)}".encode(errors="backslashreplace")


def image_of(content_type: bytes, body: bytes) -> bytes:
    """Return the image in a body: the only file of a multipart form, otherwise the whole body.

    Raises:
        NoImageError: if there is none.
    """
    image = body
    if content_type.startswith(FORM):
        files: list[Any] = []
        # python-multipart takes seconds for some forms, which is why they are read here.
        try:
            parser = create_form_parser(
                {"Content-Type": content_type}, None, files.append, {"MAX_MEMORY_FILE_SIZE": 2**40}
            )
            parser.write(body)
            parser.finalize()
        except FormParserError as error:
            raise NoImageError(f"the form cannot be read ({error})") from error
        if len(files) != 1:
            raise NoImageError(f"the form holds {len(files)} complete files, not one")
        files[0].file_object.seek(0)
        image = files[0].file_object.read()
    if not image:
        raise NoImageError("the image has no bytes")
    return image


def thumbnail(path: str) -> bytes:
    """Return a small JPEG of an image file.

    Args:
        path: absolute path, as the index holds it.

    Raises:
        OSError, ValueError, SyntaxError, or any other error of Pillow: if there is no such image.
    """
    if not Path(path).is_absolute():
        raise ValueError("it is in no file of its own")
    pixels, file = whole(path, THUMBNAIL, 3), io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=85)
    return file.getvalue()


def _reason(error: Exception) -> tuple[int, str]:
    kinds = (Image.DecompressionBombError, Image.DecompressionBombWarning, ImageSizeError)
    if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
        return 413, f"the image has more than max_pixels={Image.MAX_IMAGE_PIXELS}; send a smaller one"
    if isinstance(error, MemoryError):
        return 413, "decoding the image takes too much memory; send a smaller one"
    if isinstance(error, NoImageError):
        return 400, f"{error}; {ADVICE}"
    if isinstance(error, UnidentifiedImageError):
        return 415, "this is no image in a format that is read here; send a JPEG or PNG file, for example"
    return 422, f"the image cannot be decoded ({error}); send it in another form"


def _limit_memory(more: int) -> None:
    """Limit the data of this process to what it has now and ``more`` bytes, on Linux."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        lines = Path("/proc/self/status").read_text().splitlines()
        limit = more + sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
