"""What an evaluation will measure, and about how long it will take."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from twoview.data import ImageData
from twoview.encoder import Encoder
from twoview.evaluation.measure import Workload
from twoview.evaluation.progress import duration
from twoview.evaluation.projection import DIRECTIONS, projects
from twoview.evaluation.settings import EvaluationSettings

log = logging.getLogger(__name__)

PIECE = 32  # images whose features are timed
SIDE = 512  # rows and columns of the matrices whose product is timed


def announce(encoder: Encoder, images: ImageData, settings: EvaluationSettings, side: int) -> dict[str, float]:
    """Log what will be measured on how many images, and about how long it will take.

    The duration is estimated from the time for the features of 32 training images, the time of a matrix product, and
    :meth:`twoview.evaluation.measure.Measure.expected_seconds`. Files that are not yet in the cache of the operating
    system, other programs and measures without an estimate make the evaluation slower.

    Args:
        encoder: the network, on the device of the computation.
        images: labeled training and test images.
        settings: measures, baselines and cache.
        side: height and width of the images of the baseline "raw pixels".

    Returns:
        Expected seconds for each network.
    """
    train, test = images.labelled
    image_seconds, width = _image_seconds(encoder, images)
    widths = {"trained": width}
    if settings.baselines:
        pixels = encoder.card.channels * side**2
        projected = DIRECTIONS if projects(len(train), pixels) else pixels
        widths |= {"random initialization": width, "raw pixels": projected}
    speed, expected = _operation_seconds(encoder.device), {}
    for name, features in widths.items():
        each = 0.0 if name == "raw pixels" else image_seconds
        work = Workload(len(train), len(test), features, len(images.classes), each, speed)
        whole = each * (work.train + work.test)
        expected[name] = whole + sum(measure.expected_seconds(work) for measure in settings.measures)
    seconds = sum(expected.values())
    about = f"about {duration(seconds)}" if seconds >= 2 else "a few seconds"
    parts, networks = ", ".join(measure.name for measure in settings.measures), ", ".join(widths)
    number = f"{len(train):,} training and {len(test):,} test images"
    less = ", less for what is in eval.cache" if settings.cache else ""
    log.info("evaluation: %s of %s on %s; %s%s", parts, networks, number, about, less)
    return expected


def _image_seconds(encoder: Encoder, images: ImageData) -> tuple[float, int]:
    """Seconds per image, without those of the first batch, and number of features."""
    train, encoder = images.labelled[0], encoder.folded()
    some = train.subset(torch.arange(min(PIECE, len(train), images.batch_size)))
    width = encoder.feature_matrix(some, len(some)).shape[1]
    return _seconds(lambda: encoder.feature_matrix(some, len(some))) / len(some), width


def _operation_seconds(device: torch.device) -> float:
    matrix = torch.ones(SIDE, SIDE, device=device)
    float((matrix @ matrix)[0, 0])  # reading a value waits for the device
    return _seconds(lambda: float((matrix @ matrix)[0, 0])) / (2 * SIDE**3)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
