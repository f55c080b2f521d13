"""What may be put into an index or searched for: images, vectors, or a file of embeddings."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twoview.data import Images, LazyImages, TensorImages
from twoview.encoder import MAX_SIZE, Encoder, ModelCard
from twoview.errors import UserError, require
from twoview.losses import l2_normalize
from twoview.tools.embedding_file import Embeddings, read_embeddings
from twoview.torch_files import hash_tensors

BLOCK = 65_536  # vectors that are checked or scaled at once

Source = str | Path | Embeddings | Tensor | Images | Iterable[Any]  # or one PIL image


def checkpoint_of(encoder: Encoder | str) -> str:
    """Return the hash of the weights of an encoder; a hash is returned unchanged."""
    return encoder if isinstance(encoder, str) else hash_tensors(encoder.network.state_dict())


def as_embeddings(encoder: Encoder | str | None, source: Source, checkpoint: str | None = None) -> Embeddings:
    """Compute or read embeddings, and check them.

    Args:
        encoder: the network; or the hash of its weights, for vectors; or None for embeddings that hold this hash.
        source: path of a Parquet file of embeddings; :class:`Embeddings`; floating point vectors ``[N, D]``; or images
            in any form that :class:`twoview.Encoder` takes.
        checkpoint: result of :func:`checkpoint_of` for the encoder if it is known already, else None.

    Returns:
        Finite embeddings of at least one dimension.

    Raises:
        UserError: if the embeddings are of another network or are not finite, or the network is not known.
    """
    if isinstance(source, str | Path):
        source = read_embeddings(source)
    if isinstance(source, Embeddings):
        stored = source.metadata.get("checkpoint")
        require(stored and isinstance(stored, str), "embeddings: do not name their checkpoint; embed the images again")
        given = stored if encoder is None else checkpoint or checkpoint_of(encoder)
        message = f"its weights have the hash {given}, the embeddings are of {stored}; embed the images again"
        require(given == stored, f"encoder: {message}")
    elif encoder is None:
        raise UserError("encoder=None: give the encoder of these images or vectors")
    else:
        source = _computed(encoder, source, checkpoint or checkpoint_of(encoder))
    vectors = source.vectors
    fits = vectors.ndim == 2 and vectors.shape[1] and vectors.is_floating_point()
    require(fits, f"vectors: give floating point numbers [N, D], not {vectors.dtype} {list(vectors.shape)}")
    require(len(source.paths) == len(vectors), f"vectors: there are {len(vectors)} of {len(source.paths)} images")
    bad = torch.cat([~part.isfinite().all(1) for part in vectors.split(BLOCK)]).nonzero().flatten().tolist()
    names = ", ".join(str(source.paths[row] or f"row {row}") for row in bad[:3])
    require(not bad, f"vectors: {len(bad)} of {len(vectors)} are not finite, such as {names}; leave them out")
    return source


def network_of(found: Embeddings) -> dict[str, Any]:
    """Return the network of embeddings as plain values: "checkpoint", "source" and "card", empty if not known.

    Raises:
        UserError: if the metadata are of other types.
    """
    card, preprocessing, source = (found.metadata.get(name) for name in ("card", "preprocessing", "source"))
    fits = isinstance(card, dict | None) and isinstance(preprocessing, dict | None) and isinstance(source, str | None)
    require(fits, "embeddings: their metadata are damaged; embed the images again")
    card = {**card, **(preprocessing or {})} if card else {}
    return {"checkpoint": found.metadata["checkpoint"], "source": source or "", "card": card}


def unit_vectors(vectors: Tensor, half: bool = False) -> Tensor:
    """Return fp32 or fp16 ``[N, D]`` vectors scaled to unit length; zero vectors stay zero."""
    scaled = torch.empty(vectors.shape, dtype=torch.float16 if half else torch.float32)
    for part, target in zip(vectors.split(BLOCK), scaled.split(BLOCK), strict=True):
        target.copy_(l2_normalize(part.detach()))
    return scaled


def with_preprocessing(encoder: Encoder, card: dict[str, Any], source: str) -> Encoder:
    """Return the encoder with the preprocessing of a stored card; unchanged if the card is empty.

    Args:
        encoder: a network with the weights that the card describes.
        card: fields of the model card, as :func:`as_embeddings` returns them.
        source: where the card is stored, for messages.

    Raises:
        UserError: if the card is damaged.
    """
    if not card:
        return encoder
    known = ModelCard.from_plain(_with_statistics(card), source)
    channels = encoder.card.channels
    require(
        known.channels == channels, f"{source}: is of images of {known.channels} channels, the encoder of {channels}"
    )
    same = {name: getattr(known, name) for name in ("image_size", "store_size", "resize_size", "mean", "std")}
    return encoder.with_card(**same).to(encoder.device)


def require_same_preprocessing(found: Embeddings, card: dict[str, Any]) -> None:
    """Refuse embeddings whose images were preprocessed in another way than a stored card says, as far as it is known.

    Raises:
        UserError: if a size or a statistic differs, or a card is damaged.
    """
    theirs = network_of(found)["card"]
    if not card or not theirs:
        return
    ours, others = (_preprocessing(known, "embeddings") for known in (card, theirs))
    different = ", ".join(f"{name} is {others[name]}, not {ours[name]}" for name in ours if ours[name] != others[name])
    require(not different, f"embeddings: their {different}, as for the index; embed the images in the same way")


def _preprocessing(card: dict[str, Any], source: str) -> dict[str, Any]:
    known = ModelCard.from_plain(_with_statistics(card), source)
    sizes = {"image_size": known.image_size, "store_size": known.store_size}
    statistics = {name: [round(value, 5) for value in getattr(known, name)] for name in ("mean", "std")}
    return {**sizes, "resize_size": known.resize_size or known.image_size, **statistics}


def _computed(encoder: Encoder | str, source: Any, checkpoint: str) -> Embeddings:
    """Embeddings of images or vectors, numbered from 0."""
    vectors, paths, labels = source, None, None
    if not (isinstance(source, Tensor) and source.is_floating_point()):
        if isinstance(encoder, str):
            raise UserError(f"encoder={encoder}: images need the encoder itself; a hash is enough for vectors")
        images = [source] if hasattr(source, "getbands") or getattr(source, "ndim", 4) == 3 else source
        features = list(encoder.features(images))
        vectors = torch.cat(features) if features else torch.empty(0, encoder.width)
    if isinstance(source, LazyImages | TensorImages):
        kept = torch.arange(len(source))
        if isinstance(source, LazyImages):  # other images have replaced those that could not be read
            kept = kept[~source.lost[source.positions]]
        vectors = vectors[kept]
        named = isinstance(source, LazyImages) or source.names is not None
        paths = [source.name(i) if named else "" for i in kept.tolist()]
        labels = [None if label < 0 else str(label) for label in source.labels[kept].tolist()]
    count = len(vectors)
    paths, labels = paths or [""] * count, labels or [None] * count
    return Embeddings(paths, torch.arange(count), labels, vectors, _metadata(encoder, checkpoint))


def _metadata(encoder: Encoder | str, checkpoint: str) -> dict[str, Any]:
    """Metadata of embeddings; of a hash, nothing else is known."""
    if isinstance(encoder, str):
        return {"checkpoint": checkpoint}
    facts = {"card": asdict(encoder.card), "preprocessing": encoder.preprocess.plain, "source": encoder.location}
    return {"checkpoint": checkpoint, **facts}


def _with_statistics(card: dict[str, Any]) -> dict[str, Any]:
    """The card with the statistics of :class:`twoview.Encoder` where it has none."""
    channels = card.get("channels")
    count = min(channels, MAX_SIZE) if isinstance(channels, int) else 1  # a card may come from anyone
    defaults = {"mean": [0.5] * count, "std": [0.25] * count}
    return {**card, **{name: card.get(name) or value for name, value in defaults.items()}}
