"""Image files and shards for tests."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from twoview.data import folder

RNG = np.random.default_rng(0)
CLASSES = ["ant", "bee"]


def photo(height=20, width=28):
    """A smooth random image, which JPEG changes little."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root, classes=("ant", "bee"), each=12):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            image = photo()
            Image.fromarray((np.asarray(image) // 2 + 100 * i).astype(np.uint8)).save(root / name / f"{j}.png")
    return root


def load(root, **changes):
    return folder(str(root), **({"image_size": 16, "batch_size": 4, "num_workers": 0, "cache": False} | changes))


def gradient(size=40):
    return np.linspace(0, 1, size)[None, :].repeat(size, 0)


def encoded(value, kind="PNG"):
    """A gray image of one value, by which it is recognized."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(file, values, labels=None, column="image", group=5, plain=False):
    images = [v if isinstance(v, bytes | None) else encoded(v) for v in values]
    content = {column: images if plain else [{"bytes": p, "path": None} for p in images]}
    schema = None
    if labels is not None:
        content["label"] = labels
        features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
        schema = {b"huggingface": json.dumps(features).encode()}
    table = pyarrow.table(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(schema), file, row_group_size=group)


def write_tar(file, samples, mode="w"):
    """``samples``: (key, {extension: bytes})."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as shard:
        for key, parts in samples:
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def options(**changes):
    return {"image_size": 16, "batch_size": 4, "num_workers": 0, "cache": False} | changes


def make_both(root, n=40):
    """The same images as two Parquet files and as two tar shards, labelled."""
    values = [5 * i for i in range(n)]
    for part, name in ((slice(0, 23), "train-0"), (slice(23, n), "train-1")):
        labels = [i % 2 for i in range(n)][part]
        write_parquet(root / "parquet" / f"{name}.parquet", values[part], labels)
        write_tar(
            root / "tar" / f"{name}.tar",
            [
                (f"{name}/{v:04d}", {"png": encoded(v), "cls": str(y).encode()})
                for v, y in zip(values[part], labels, strict=True)
            ],
        )
    return values
