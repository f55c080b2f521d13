"""Evaluations of whole images use their center squares, and nothing beside them."""

from typing import ClassVar

import pytest
import torch
from PIL import Image

from twoview import load, runs
from twoview.augment import TwoViews
from twoview.data import ImageData, TensorImages
from twoview.data.canvases import on_canvases
from twoview.evaluation import EvaluationSettings, FineTuning
from twoview.evaluation.integrity import shared_images, thumbnails

SIZE, SHAPES = 16, [(16, 16), (16, 31), (29, 16), (16, 17)]


def images(n, seed, whole):
    """Squares of two classes; or rectangles around them, whose other pixels are noise that differs between classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    squares = torch.randint(0, 156, (n, 3, SIZE, SIZE), generator=generator)
    squares = (squares + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    if not whole:
        return TensorImages(squares, labels)
    around = []
    for i, square in enumerate(squares):
        height, width = SHAPES[i % 4]
        image = torch.full((3, height, width), int(250 * labels[i]), dtype=torch.uint8)
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        image[:, top : top + SIZE, left : left + SIZE] = square
        around.append(image)
    pixels, sizes = on_canvases(around, 3, 31)
    return TensorImages(pixels, labels, sizes=sizes)


def data(whole):
    train, test = images(80, 0, whole), images(40, 1, whole)
    return ImageData(train, train, test, ["dark", "light"], batch_size=16, image_size=SIZE)


@pytest.fixture
def encoder():
    return load("random:test_resnet", SIZE).with_card(mean=(0.5,) * 3, std=(0.3,) * 3, resize_size=SIZE)


PARTS = ["linear", "knn", "few_labels", "retrieval", "clustering", "geometry", "invariance", "integrity"]


def test_every_measure_is_that_of_the_center_squares(encoder, tmp_path):
    knobs = {"labels_per_class": (5,), "label_shares": (0.2,), "draws": 2}
    settings = EvaluationSettings.from_knobs(PARTS, l2=(1e-2,), k=(1,), bootstrap=100, baselines=False, **knobs)
    found = {}
    for whole in (False, True):
        folder = tmp_path / str(whole)
        found[whole] = runs.evaluate(encoder, data(whole), settings, TwoViews, run_dir=folder)
        assert (folder / "report.html").stat().st_size > 10_000
    assert set(found[True]["results"]["trained"]) == set(PARTS) - {"integrity"}
    assert found[True]["results"] == found[False]["results"]
    assert found[True]["integrity"]["shared"] == {"train": {"exact": 0, "near": 0}}


class Recorded(TwoViews):
    """Records the sizes of the images from which crops are drawn."""

    sizes: ClassVar = []

    def forward(self, pixels, key=None, sizes=None):
        self.sizes.append(None if sizes is None else sizes.max(0).values.tolist())
        return super().forward(pixels, key, sizes)


def test_random_crops_of_labeled_training_are_drawn_from_the_whole_images(encoder, tmp_path):
    tuning = FineTuning(epochs=1, least_steps=2, batch_size=16, learning_rates=[1e-3], supervised=False)
    probe = EvaluationSettings.from_knobs(
        ["linear_sgd"], sgd_epochs=1, sgd_batch_size=16, bootstrap=100, baselines=False
    )
    for whole, expected in ((False, None), (True, [29, 31])):
        Recorded.sizes.clear()
        runs.finetune(encoder, data(whole), Recorded, settings=tuning, run_dir=tmp_path / f"{whole} finetune")
        tuned = len(Recorded.sizes)
        runs.evaluate(encoder, data(whole), probe, Recorded, run_dir=tmp_path / f"{whole} probe")
        assert tuned > 0
        assert all(sizes == expected for sizes in Recorded.sizes[:tuned])
        assert expected in Recorded.sizes[tuned:]  # the report shows views of center squares too


def test_raw_pixels_are_those_of_the_center_squares():
    plain, whole = (thumbnails(images(8, 0, whole), SIZE).pixels for whole in (False, True))
    assert torch.equal(plain, whole)


def test_a_shared_image_has_the_same_shape_too():
    train, test = images(20, 0, whole=True), images(20, 1, whole=True)
    test.pixels[3], test.sizes[3] = train.pixels[5], train.sizes[5]
    found = shared_images(thumbnails(train), thumbnails(test))
    assert [pair[:3] for pair in found] == [(3, 5, True)]
    flat = [torch.full((3, h, w), 9, dtype=torch.uint8) for h, w in ((2, 8), (8, 2), (4, 4))]
    pixels, sizes = on_canvases(flat, 3, 8)
    assert len(set(thumbnails(TensorImages(pixels, torch.zeros(3).long(), sizes=sizes)).hashes)) == 3


def test_a_preview_shows_the_center_squares(tmp_path):
    paths = [runs.preview(data(w), TwoViews, images=4, pairs=1, run_dir=tmp_path / str(w)) for w in (False, True)]
    shown = [Image.open(path).crop((0, 0, SIZE, 4 * SIZE)).tobytes() for path in paths]
    assert shown[0] == shown[1]


def test_the_card_of_whole_images_and_of_squares():
    whole, squares = data(True), data(False)
    assert (squares.store_size, squares.resize_size) == (None, SIZE)
    assert (whole.store_size, whole.resize_size) == (31, 18)
