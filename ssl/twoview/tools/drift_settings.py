"""Settings of the detection of drift."""

import math
from dataclasses import dataclass

from twoview.errors import require
from twoview.evaluation.two_sample import TESTS

LEAST = 20  # images of each set
MOST = 20_000  # images of each set that are compared; their kernel matrix takes 13 GB
MOST_PERMUTATIONS = 100_000


@dataclass(frozen=True)
class DriftSettings:
    """How two sets of embeddings are compared.

    Args:
        level: largest probability of a false alarm of all tests together (family-wise error rate), 0.001 to 0.5.
        permutations: permutations of each test, at least 3 / ``level`` - 1, so that a test can reject, and at most
            100,000.
        splits: random splits of the reference into halves on which false alarms are counted; 0 for none.
        max_images: largest number of images of each set that are compared, 20 to 20,000; of larger sets, a random
            sample is compared. Memory and time grow with its square.
        clusters: number of clusters whose shares are compared, at least 2; at most a tenth of the compared images.
        listed: number of images that are listed, of each set, at least 0.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> DriftSettings(level=0.01).permutations
        999
    """

    level: float = 0.05
    permutations: int = 999
    splits: int = 100
    max_images: int = 2000
    clusters: int = 10
    listed: int = 12

    def __post_init__(self) -> None:
        known = isinstance(self.level, float) and 0.001 <= self.level <= 0.5
        require(known, f"level={self.level}: give a probability from 0.001 to 0.5")
        _require_range("splits", self.splits, 0, 10_000)
        _require_range("max_images", self.max_images, LEAST, MOST)
        _require_range("clusters", self.clusters, 2, 1000)
        _require_range("listed", self.listed, 0, 1000)
        least = math.ceil(round(len(TESTS) / self.level, 6)) - 1
        _require_range("permutations", self.permutations, least, MOST_PERMUTATIONS, f", for level={self.level}")


def _require_range(knob: str, value: int, least: int, most: int, why: str = "") -> None:
    fits = isinstance(value, int) and least <= value <= most
    require(fits, f"{knob}={value}: give a whole number from {least:,} to {most:,}{why}")
