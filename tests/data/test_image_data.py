import hashlib
import inspect
import pickle
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from twoview.data import (
    ImageData,
    Preprocess,
    TensorImages,
    cifar10,
    digits,
    fake,
    fit_channels,
    fit_size,
    folder,
    split_holdout,
    stl10,
)
from twoview.data.images import split_labels
from twoview.data.splits import LoadSettings
from twoview.errors import UserError

CONF = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


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


def test_wrong_arrays_are_refused():
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UserError, match="uint8"):
        TensorImages(pixels.float(), labels)
    with pytest.raises(UserError, match="uint8"):
        TensorImages(pixels[:, :, :4], labels)
    with pytest.raises(UserError, match="one label per image"):
        TensorImages(pixels, labels[:3])
    images = TensorImages(pixels, labels + 2)
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


def test_preprocess_takes_tensors_and_images():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    preprocess = Preprocess(8, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(preprocess(pixels), preprocess(image))
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


def test_missing_files_without_a_download(tmp_path):
    root = tmp_path / "München it's (1)"
    with pytest.raises(UserError, match=r"data.root=.*cifar10 is not there and data.download=false"):
        cifar10(root, download=False)
    assert not root.exists()


def test_corrupt_files_are_not_trained_on(tmp_path):
    write_cifar(tmp_path)
    with pytest.raises(UserError, match="data.download=false"):
        cifar10(tmp_path, download=False)


def test_fingerprints_depend_on_images_labels_and_order():
    data = fake(images=40, channels=1, batch_size=4)
    content = data.test.statistics().numpy().tobytes() + data.test.labels.numpy().tobytes()
    assert data.test_fingerprint == hashlib.blake2b(content, digest_size=16).hexdigest()
    turned = data.test.subset(torch.arange(len(data.test)).flip(0))
    others = [
        ImageData(data.pretrain, data.train, turned, data.classes),
        ImageData(data.pretrain, data.train, data.test.with_labels(9 - data.test.labels), data.classes),
        ImageData(data.pretrain, data.train, TensorImages(data.test.pixels.flip(3), data.test.labels), data.classes),
    ]
    assert len({d.test_fingerprint for d in [data, *others]}) == len({d.fingerprint for d in [data, *others]}) == 4
    without = ImageData(data.pretrain, None, None, [])
    assert without.test_fingerprint is None
    assert without.fingerprint != data.fingerprint


def test_limits_of_the_views():
    data = digits(image_size=16)
    mean, std = data.mean_std
    limits = {"image_size": 16, "channels": 1, "allow_flip": False, "min_crop_area": 0.3}
    assert data.view_limits() == limits | {"mean": mean, "std": std}
    assert data.view_limits([0.5], [0.1]) == limits | {"mean": [0.5], "std": [0.1]}


def test_held_out_labels():
    labels = torch.arange(50) % 5
    fitted, held_out = split_holdout(labels, 0.2, seed=3)
    assert labels[held_out].bincount().tolist() == [2] * 5
    assert [part.tolist() for part in split_labels(labels, 0.2, 3)] == [fitted.tolist(), held_out.tolist()]
    with pytest.raises(UserError, match="finetune.holdout=0.2: cannot hold out that share of 1 labels"):
        split_holdout(labels[:1], 0.2, 0, "finetune.holdout")


def test_hidden_labels_are_those_of_the_positions():
    data = digits(image_size=16)
    data.hide_labels(torch.tensor([3, 5]))
    assert torch.nonzero(data.pretrain.labels < 0).flatten().tolist() == [3, 5]
    assert (data.train.labels >= 0).all()


def knobs(file):
    content = yaml.safe_load(file.read_text())
    inherited = [knobs(file.with_name(f"{name}.yaml")) for name in content.pop("defaults", ()) if name != "_self_"]
    return (inherited[0] if inherited else {}) | content


@pytest.mark.parametrize("file", CONF, ids=lambda file: file.stem)
def test_defaults_of_the_configuration_are_those_of_python(file):
    given = knobs(file)
    module, name = given.pop("_target_").rsplit(".", 1)
    del given["_partial_"]
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    defaults = {p.name: p.default for p in parameters.values()}
    if "options" in defaults:
        defaults |= {f.name: f.default for f in fields(LoadSettings)}
    assert given == {knob: "???" if given[knob] == "???" else defaults[knob] for knob in given}


def test_an_unknown_option_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="chanels"):
        folder(str(tmp_path), chanels=1)
