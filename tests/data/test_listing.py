"""Images that are listed without being read, and the decoding of one item for the network."""

import numpy as np
import pytest
import torch
from data.image_files import load, make_folder, photo, write_parquet
from PIL import Image

from twoview.data import ImageData, LazyImages, Preprocess, TensorImages, parquet
from twoview.data.decode import square_and_shape, whole_and_shape
from twoview.errors import UserError


def test_listed_images_are_all_in_one_split_in_their_order_and_none_is_read(tmp_path):
    root = make_folder(tmp_path / "photos", each=12)
    (root / "ant" / "99.png").write_bytes(b"not an image")
    data = load(root, listed=True)
    assert isinstance(data.pretrain, LazyImages)
    assert data.train is data.test is None
    assert data.broken == []
    assert [data.pretrain.name(i) for i in range(25)] == sorted(str(file) for file in root.rglob("*.png"))
    assert data.pretrain.labels.tolist() == [0] * 13 + [1] * 12
    assert data.splits == {"pretrain": data.pretrain}
    with pytest.raises(UserError, match=r"eval_root=.*data.root only"):
        load(root, eval_root=str(tmp_path), listed=True)


def test_listed_rows_of_parquet_keep_their_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", [3, 1, 2], labels=[0, 1, -1])
    data = parquet(str(tmp_path / "a.parquet"), listed=True, num_workers=0, image_size=16)
    assert [int(data.pretrain[[i]].pixels.max()) for i in range(3)] == [3, 1, 2]
    assert data.pretrain.labels.tolist() == [0, 1, -1]


def test_splits_hold_each_image_once():
    def images(*labels):
        return TensorImages(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), torch.tensor(labels))

    train, test, unlabelled = images(0, 1), images(1), images(-1, -1, -1)
    assert list(ImageData(train, train, test, "ab").splits) == ["pretrain", "test"]
    assert list(ImageData(images(0, -1, 1), train, test, "ab").splits) == ["pretrain", "test"]
    assert list(ImageData(unlabelled, train, test, "ab").splits) == ["pretrain", "train", "test"]
    assert list(ImageData(unlabelled, None, None, "ab").splits) == ["pretrain"]


def test_the_original_shape_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    photo(20, 28).save(tmp_path / "turned.jpg", exif=exif)
    for decode in (whole_and_shape, square_and_shape):
        assert decode(str(tmp_path / "turned.jpg"), 16, 3)[1] == (28, 20, 3)
        assert decode(photo(20, 28), 16, 3)[1] == (20, 28, 3)


@pytest.mark.parametrize(("store_size", "resize_size"), [(None, None), (None, 18), (32, 18), (16, None)])
def test_decoded_gives_the_pixels_of_forward(tmp_path, store_size, resize_size):
    preprocess = Preprocess(16, [0.5] * 3, [0.25] * 3, store_size, resize_size)
    file = tmp_path / "a.png"
    photo(40, 52).save(file)
    tensor = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    image = preprocess(Image.open(file))
    for item, expected in ((str(file), image), (file.read_bytes(), image), (tensor, preprocess(tensor))):
        pixels, shape = preprocess.decoded(item)
        assert pixels.dtype == torch.uint8
        assert shape == (40, 52, 3)
        assert torch.equal(preprocess.normalized(pixels[None]), expected)
