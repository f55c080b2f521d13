"""Damaged files of the cache of decoded images, and files that somebody else put there."""

import os

import pytest
import torch
from data.image_files import load
from data.test_disk_cache import assert_equal, files_of, stored
from data.test_whole_images import mixed

from twoview.data import LazyImages, TensorImages


def described(file, **changes):
    content = torch.load(file, weights_only=True)
    torch.save(content | changes, file)


def of_description(**changes):
    return lambda pixels, description: described(description, **changes)


def replace_by_fifo(file):
    file.unlink()
    os.mkfifo(file)


DAMAGED = {
    "pixels cut off": lambda pixels, _: os.truncate(pixels, pixels.stat().st_size - 1),
    "pixels too long": lambda pixels, _: os.truncate(pixels, pixels.stat().st_size + 4096),
    "pixels empty": lambda pixels, _: os.truncate(pixels, 0),
    "pixels gone": lambda pixels, _: pixels.unlink(),
    "pixels all zero": lambda pixels, _: pixels.write_bytes(bytes(pixels.stat().st_size)),
    "pixels a fifo": lambda pixels, _: replace_by_fifo(pixels),
    "pixels a folder": lambda pixels, _: (pixels.unlink(), pixels.mkdir()),
    "description cut off": lambda _, file: file.write_bytes(file.read_bytes()[:300]),
    "description empty": lambda _, file: file.write_bytes(b""),
    "description gone": lambda _, file: file.unlink(),
    "description a fifo": lambda _, file: replace_by_fifo(file),
    "description of text": lambda _, file: file.write_text("hello"),
    "description a list": lambda _, file: torch.save([1], file),
    "side": of_description(side=31),
    "side of a billion": of_description(side=10**9),
    "side of another type": of_description(side="32"),
    "sizes of another shape": of_description(sizes=torch.ones(3, 2, dtype=torch.int64)),
    "sizes too large": of_description(sizes=torch.full((27, 2), 10**6)),
    "sizes of zero": of_description(sizes=torch.zeros(27, 2, dtype=torch.int64)),
    "other sizes": of_description(sizes=torch.full((27, 2), 7)),
    "statistics": of_description(statistics=torch.full((27, 3, 3), 0.5, dtype=torch.float64)),
    "statistics not finite": of_description(statistics=torch.full((27, 3, 3), torch.nan, dtype=torch.float64)),
    "statistics of another type": of_description(statistics=torch.zeros(27, 3, 3)),
    "unreadable out of range": of_description(unreadable=torch.tensor([99]), reasons=["x"]),
    "unreadable twice": of_description(unreadable=torch.tensor([3, 3]), reasons=["x", "y"]),
    "reasons": of_description(reasons=[5]),
    "no sizes": of_description(sizes=None),
    "a missing field": lambda _, file: torch.save({"side": 32}, file),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_cache_is_built_again(tmp_path, name, caplog):
    root = mixed(tmp_path / "images")
    (root / "ant" / "mixed0.png").unlink()
    (root / "ant" / "mixed0.png").write_text("no image")
    stored(root, tmp_path / "cache", max_broken=0.5)
    ((pixels,), (description,)) = (files_of(tmp_path / "cache", kind) for kind in (".pixels", ".pt"))
    whole = pixels.read_bytes()
    assert len(torch.load(description, weights_only=True)["statistics"]) == 27  # as in the table above
    DAMAGED[name](pixels, description)
    caplog.clear()
    if name == "pixels a folder":  # cannot be replaced by a file
        assert isinstance(stored(root, tmp_path / "cache", max_broken=0.5).pretrain, LazyImages)
        assert "cannot be written" in caplog.text
        return
    again = stored(root, tmp_path / "cache", max_broken=0.5)
    assert_equal(again, load(root, max_broken=0.5))
    assert isinstance(again.pretrain, TensorImages)
    assert pixels.read_bytes() == whole
    assert ("is damaged" in caplog.text) == (name != "description gone")
