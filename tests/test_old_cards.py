"""Cards of checkpoints from versions that stored center squares instead of whole images."""

import numpy as np
import pytest
import torch
from data.image_files import photo
from short_runs import SIZE

import twoview
from twoview.data import fit_channels, square
from twoview.errors import UserError


def test_an_old_card_of_larger_squares_keeps_its_meaning(finished, tmp_path):
    old = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    del old["twoview"]["resize_size"]
    old["twoview"]["store_size"] = SIZE + 3  # the short side was resized to this size, however large the image
    torch.save(old, tmp_path / "old.ckpt")
    before = twoview.load(tmp_path / "old.ckpt")
    assert (before.card.store_size, before.card.resize_size) == (None, SIZE + 3)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (before.card.mean, before.card.std))
    image = photo(60, 90)
    for given in (image, torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)):
        pixels = fit_channels(given[None], 1)[0] if isinstance(given, torch.Tensor) else given
        expected = square(pixels, SIZE + 3, 1)[None, :, 1 : SIZE + 1, 1 : SIZE + 1] / 255
        torch.testing.assert_close(before.preprocess(given), (expected - mean) / std)
    with pytest.raises(UserError, match="data.store_size=32: the checkpoint was made for squares"):
        twoview.load(tmp_path / "old.ckpt", store_size=32)
