"""Groups of equal and nearly equal images in one set or between two sets, verified on their pixels."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from twoview.data import ImageData
from twoview.devices import pick_device, require_memory
from twoview.encoder import Encoder
from twoview.errors import UserError, require
from twoview.evaluation.feature_store import network_features
from twoview.evaluation.progress import part, shown_by
from twoview.loading import load
from twoview.reporting.progress_bar import EvaluationBar
from twoview.tools.duplicate_files import write_groups
from twoview.tools.duplicate_search import KINDS, search_duplicates
from twoview.tools.image_sets import ImageSets

DEFAULT_KINDS = ("re-encoded", "resized", "mirrored", "cropped")
BYTES = 8000  # of memory per image, for small copies, thumbnails and descriptors
Images = ImageData | Callable[..., ImageData]
Place = str | Path | Sequence[str]


def find_duplicates(
    data: Images,
    encoder: Encoder | None = None,
    against: ImageData | Place | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    run_dir: str | Path = "run",
) -> dict[str, Any]:
    """Find groups of equal and nearly equal images; nothing is deleted.

    Candidates are the images with the most similar small copies, and the most similar features if there is an encoder.
    Each candidate pair is verified on its pixels, see :func:`twoview.tools.duplicate_pairs.near_pairs`. Images of
    nearly one gray level, such as empty pages, are duplicates only if they are equal.

    Args:
        data: images, or a function that loads them; all splits are searched, with and without labels.
        encoder: network whose features select further candidates; None to select by pixels only.
        against: images of a second set; or a place of them, given as ``root`` to the function ``data``. Groups then
            have images of both sets. None to search within ``data``.
        kinds: kinds of duplicates to find besides equal images: "re-encoded", "resized", "mirrored", "cropped" (to
            about 70 % of width and height or more) and "recolored". A pair of several of the last three kinds is found
            if all of them are given.
        run_dir: folder for ``duplicates.csv`` and ``duplicates.html``; created if missing.

    Returns:
        Numbers: ``images``, ``groups``, ``grouped`` (images in groups), ``pairs`` (duplicates by kind), ``candidates``
        (verified pairs) and ``blank`` (images that were compared by equality only); and ``run_dir``.

    Raises:
        UserError: if an argument is invalid, or the small copies do not fit in memory.

    Example:
        >>> from twoview.data import TensorImages
        >>> pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        >>> images = TensorImages(torch.cat([pixels, pixels[:2]]), torch.full((8,), -1))
        >>> report = find_duplicates(ImageData(images, None, None, []), run_dir=folder)
        >>> report["images"], report["groups"], report["grouped"]
        (8, 2, 4)
    """
    known = isinstance(kinds, list | tuple) and len(kinds) > 0 and all(kind in KINDS for kind in kinds)
    require(known, f"kinds={kinds}: give a list of one or more of {', '.join(KINDS)}")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)  # what cannot be written is reported before the search
    sets = _open(data, against)
    needed = len(sets) * (BYTES + (8 * encoder.width if encoder is not None else 0))
    require_memory(f"data: comparing {len(sets):,} images", needed, "search a part of the images")
    device = pick_device()
    with shown_by(EvaluationBar()):
        with part("small copies of all images"):
            copies = sets.small_copies()
        features = None
        if encoder is not None:
            with part("features of all images"):
                each = [network_features(encoder.to(device), images, 256) for images in sets.parts]
                features = torch.cat(each)
        search = search_duplicates(sets, copies, features, kinds, device)
    report = {
        "images": len(sets),
        "groups": len(search.groups),
        "grouped": sum(map(len, search.groups)),
        "pairs": search.pairs,
        "candidates": search.candidates,
        "blank": search.blank,
        "run_dir": str(run_dir),
    }
    write_groups(sets, search.groups, report, run_dir)
    return report


def optional_encoder(
    source: str | Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> Encoder | None:
    """Load an encoder as :func:`twoview.load` does, or return None if ``source`` is None.

    Args:
        source: run folder, checkpoint file, "timm:NAME" or "random:NAME".
        image_size: height and width in pixels of the input of "random:NAME"; other networks have their own.
        channels: number of channels of the input of "timm:NAME" and "random:NAME".
        weights: local file with weights for "timm:NAME"; None for the published weights.
        seed: seed of the random initialization.

    Raises:
        UserError: see :func:`twoview.load`.

    Example:
        >>> optional_encoder() is None
        True
    """
    if source is None:
        return None
    kind = str(source).partition(":")[0]
    size = image_size if kind == "random" else None
    return load(source, size, channels if kind in ("timm", "random") else None, weights=weights, seed=seed)


def _open(data: Images, against: ImageData | Place | None) -> ImageSets:
    if against is None or isinstance(against, ImageData):
        return ImageSets(data if isinstance(data, ImageData) else data(), against)
    message = f"against={against}: goes with images that have data.root, such as data=folder"
    accepted = set() if isinstance(data, ImageData) else inspect.signature(data).parameters.keys()
    if isinstance(data, ImageData) or "root" not in accepted:
        raise UserError(message)
    try:
        second = data(root=against, **dict.fromkeys({"eval_root"} & accepted))
    except UserError as error:
        raise UserError(str(error).replace("data.root=", "against=", 1)) from error
    return ImageSets(data(), second)
