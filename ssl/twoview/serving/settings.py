"""Settings and limits of a server."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from twoview.devices import size_in_bytes
from twoview.errors import require

MAX_K = 1000  # largest number of neighbors of one request
BODIES = 16  # largest uploads that may be in memory together
UPLOADING = 8  # uploads for each image that may be worked on


@dataclass(frozen=True)
class ServeSettings:
    """Where a server listens, and its limits.

    Args:
        host: address or name of this machine to listen on. Other machines can connect unless it is one of the loopback
            interface; there is no authentication.
        port: TCP port, 0 for any free one.
        hosts: further names that clients may use for this machine, such as that of a reverse proxy.
        k: number of neighbors where a request does not give one, 1 to 1000.
        max_batch: largest number of images that the network computes at once.
        max_wait_ms: milliseconds that an image waits for others to be computed with, >= 0.
        max_upload: size of an image file in bytes, or a text such as "20MB".
        max_pixels: number of pixels of an image.
        timeout_s: seconds that an upload may take, and that the decoding of an image may take. A request that has no
            answer twice as long after its upload is given up.
        concurrency: number of images that are worked on, or wait for it, at the same time.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> ServeSettings(max_upload="1.5MB").upload_bytes
        1500000
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: Sequence[str] = ()
    k: int = 10
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_upload: str | int = "20MB"
    max_pixels: int = 50_000_000
    timeout_s: float = 10.0
    concurrency: int = 64

    def __post_init__(self) -> None:
        require(self.host and isinstance(self.host, str), f"host={self.host}: give an address, such as 127.0.0.1")
        names = isinstance(self.hosts, list | tuple) and all(isinstance(name, str) for name in self.hosts)
        require(names, f"hosts={self.hosts}: give a list of names")
        whole = {"port": (0, 65535), "k": (1, MAX_K), "max_batch": (1, 4096), "concurrency": (1, 4096)}
        for knob, (least, most) in whole.items():
            value = getattr(self, knob)
            fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            require(fits, f"{knob}={value}: give a whole number from {least} to {most}")
        fits = isinstance(self.max_pixels, int) and self.max_pixels >= 1
        require(fits, f"max_pixels={self.max_pixels}: give a whole number, at least 1")
        for knob, small, large in (("max_wait_ms", 0, 10_000), ("timeout_s", 0.1, 3600)):
            value = getattr(self, knob)
            fits = isinstance(value, int | float) and small <= value <= large  # a comparison with NaN is false
            require(fits, f"{knob}={value}: give a number from {small} to {large}")
        require(1 <= self.upload_bytes <= 2**31, f"max_upload={self.max_upload}: give 1 byte to 2GiB")

    @property
    def upload_bytes(self) -> int:
        """``max_upload`` as a number of bytes."""
        return int(size_in_bytes("max_upload", self.max_upload))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
