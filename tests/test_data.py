import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from twoview.data import (
    BatchOrder,
    ImageArrays,
    ImageData,
    Preprocess,
    cifar10,
    digits,
    fake,
    fit_channels,
    fit_size,
    stl10,
)
from twoview.errors import UserError


def test_digits_are_the_fixed_stratified_split():
    data, again = digits(), digits()
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert data.train.pixels.dtype == torch.uint8
    assert torch.equal(data.test.pixels, again.test.pixels)
    assert data.train.pixels.shape[1:] == (1, 32, 32)
    assert (data.test.labels.bincount() - 45).abs().max() <= 2
    assert data.pretrain is data.train


def test_mean_and_deviation_are_those_of_the_pixels():
    data = fake(images=100, channels=4, batch_size=10)
    mean, std = data.mean_std
    values = data.pretrain.pixels.double() / 255
    assert_close(torch.tensor(mean, dtype=torch.float64), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    assert_close(torch.tensor(std, dtype=torch.float64), values.std((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def order(done=0, rank=0, world_size=1, seed=0, size=23, batch_size=6):
    return list(BatchOrder(size, batch_size, seed, lambda: done, rank, world_size))


def test_an_epoch_sees_each_image_at_most_once_and_drops_the_last_part():
    batches = order()
    assert [len(b) for b in batches] == [6, 6, 6]
    assert len(torch.cat(batches).unique()) == 18


def test_the_order_depends_on_seed_and_epoch_and_goes_on_where_it_stopped():
    first = torch.stack(order())
    assert torch.equal(first, torch.stack(order()))
    assert not torch.equal(first, torch.stack(order(seed=1)))
    second = torch.stack(order(done=3))
    assert not torch.equal(first, second)
    assert torch.equal(second[1:], torch.stack(order(done=4)))


def test_ranks_share_each_global_batch():
    whole = order()
    parts = [order(rank=r, world_size=3) for r in range(3)]
    for i, batch in enumerate(whole):
        assert all(len(p[i]) == 2 for p in parts)
        assert set(torch.cat([p[i] for p in parts]).tolist()) == set(batch.tolist())


def test_neighbouring_seeds_and_epochs_do_not_share_orders():
    orders = {tuple(torch.cat(order(seed=s, done=3 * e)).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_wrong_arrays_are_refused():
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UserError, match="uint8"):
        ImageArrays(pixels.float(), labels)
    with pytest.raises(UserError, match="uint8"):
        ImageArrays(pixels[:, :, :4], labels)
    with pytest.raises(UserError, match="one label an image"):
        ImageArrays(pixels, labels[:3])
    images = ImageArrays(pixels, labels + 2)
    with pytest.raises(UserError, match="labels must lie in 0 to 1"):
        ImageData(images, images, images, ["a", "b"], batch_size=2)


def test_sizes_and_channels():
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert fit_size(pixels, 8) is pixels
    assert fit_size(pixels, 16).shape == (5, 3, 16, 16)
    assert fit_size(torch.full((1, 1, 9, 7), 200, dtype=torch.uint8), 4).unique().tolist() == [200]
    expected = [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L")) for p in pixels]
    assert (fit_channels(pixels, 1)[:, 0].int() - torch.from_numpy(np.stack(expected)).int()).abs().max() <= 1
    assert fit_channels(pixels[:, :1], 3).shape == (5, 3, 8, 8)
    with pytest.raises(UserError, match="data.channels=4"):
        fit_channels(pixels, 4)


def test_preprocess_takes_tensors_and_pictures():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    preprocess = Preprocess(8, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(preprocess(pixels), preprocess(picture))
    assert torch.equal(preprocess(pixels), preprocess(pixels[0]))
    expected = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(
        3, 1, 1
    )
    assert_close(preprocess(pixels), expected)
    with pytest.raises(TypeError, match="uint8"):
        preprocess(pixels.float())


def write_cifar(root):
    """A data set in CIFAR-10's own format, small; its checksums are not those of the real one."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    write_cifar(tmp_path)
    # The files are made here, so only the comparison with the checksums of the real ones is left out.
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = cifar10(tmp_path, batch_size=10)
    assert (len(data.train), len(data.test)) == (100, 20)
    raw = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"]
    assert torch.equal(data.train.pixels[3], torch.from_numpy(raw[3].reshape(3, 32, 32)))
    assert data.classes[2] == "class2"


def test_stl10_learns_from_its_unlabelled_images(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10), ("unlabeled", 30)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    data = stl10(tmp_path, image_size=48, batch_size=10)
    assert (len(data.pretrain), len(data.train), len(data.test)) == (30, 20, 10)
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    assert (data.pretrain.labels == -1).all()
    assert data.image_size == 48


def test_what_is_neither_there_nor_to_be_had_is_said_in_a_sentence(tmp_path):
    root = tmp_path / "München it's (1)"
    with pytest.raises(UserError, match=r"data.root=.*cifar10 is not there and data.download=false"):
        cifar10(root, download=False)
    assert not root.exists()


def test_corrupt_files_are_not_trained_on(tmp_path):
    write_cifar(tmp_path)
    with pytest.raises(UserError, match="data.download=false"):
        cifar10(tmp_path, download=False)
