"""Projected pixels: cosines and accuracies of all pixels; which pixels are projected."""

import numpy as np
import pytest
import torch
from short_runs import make_inputs
from torch.nn import functional as F

from twoview import runs
from twoview.data import ImageData, TensorImages
from twoview.evaluation import projection
from twoview.evaluation.feature_store import pixel_features
from twoview.evaluation.few_labels import FewLabels
from twoview.evaluation.geometry import Geometry, geometry_figures
from twoview.evaluation.integrity import thumbnails
from twoview.evaluation.knn import KNN
from twoview.evaluation.linear import Linear
from twoview.evaluation.projection import DIRECTIONS, fit_projection, projects
from twoview.evaluation.settings import EvaluationSettings
from twoview.loading import load
from twoview.reporting.tables import tables


def smooth_images(n, side=12, seed=0, noise=3.0):
    """Smooth patterns of four classes with little noise, uint8 [n, 1, side, side], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    shapes = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    coarse = shapes[labels] + torch.randn(n, 1, 4, 4, generator=generator)
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    pixels = 128 + 25 * fine + noise * torch.randn(n, 1, side, side, generator=generator)
    return pixels.round().clamp(0, 255).to(torch.uint8), labels


def test_the_projection_is_that_of_a_singular_value_decomposition():
    pixels = smooth_images(400)[0]
    found = fit_projection(pixels, directions=20)
    rows = pixels.flatten(1).double().numpy() / 255
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)
    assert found.share == pytest.approx((lengths[:20] ** 2).sum() / (lengths**2).sum(), rel=1e-6)
    assert found.facts() == {"pixels": 144, "directions": 20, "images": 400, "share": found.share}
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(20), atol=1e-5, rtol=0)
    # The same subspace; single directions may have another sign.
    theirs = directions[:16].T @ directions[:16]
    ours = found.basis[:, :16].double().numpy()
    np.testing.assert_allclose(ours @ ours.T, theirs, atol=1e-3)
    assert found.scale == pytest.approx(np.sqrt(rows.var(0).mean()), rel=1e-6)


def test_projected_pixels_keep_lengths_and_cosines():
    train, test = smooth_images(400)[0], smooth_images(50, seed=1)[0]
    found = fit_projection(train, directions=40)
    whole, cut = pixel_features(test), pixel_features(test, basis=found.basis)
    assert cut.shape == (50, 40)
    assert found.share > 0.999
    torch.testing.assert_close(cut.square().sum(1), whole.square().sum(1), rtol=4 * (1 - found.share), atol=0)
    cosines = [F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (whole, cut)]
    torch.testing.assert_close(*cosines, atol=4 * (1 - found.share), rtol=0)


@pytest.mark.parametrize(
    ("images", "pixels", "expected"),
    [(20_000, 3072, True), (19_999, 3072, False), (20_000, 512, False), (10**6, 49_152, False), (1347, 1024, False)],
)
def test_pixels_of_few_images_and_few_pixels_are_not_projected(images, pixels, expected):
    assert projects(images, pixels) is expected


def test_black_images_have_a_projection():
    found = fit_projection(torch.zeros(200, 1, 12, 12, dtype=torch.uint8), directions=20)
    assert (found.share, found.scale) == (0.0, 1.0)
    assert found.basis.isfinite().all()


def inputs_of(found, basis, **changes):
    (train, labels), (test, _) = smooth_images(600), smooth_images(400, seed=1)
    features = pixel_features(train, basis=basis), pixel_features(test, basis=basis)
    return make_inputs(features[0], labels, features[1], name="raw pixels", projection=found, **changes)


@pytest.mark.parametrize("l2_images", [20_000, 300])  # both solvers
def test_probes_of_projected_pixels_are_those_of_pixels_divided_by_one_number(l2_images):
    whole = inputs_of(None, None)
    found = fit_projection(smooth_images(600)[0], directions=143)  # leaves out next to nothing
    cut = inputs_of(found, found.basis)
    grid = {"l2": (1.0, 0.1), "l2_images": l2_images}
    expected = Linear(batch_norm=False, **grid).choose(whole, {})
    predicted = Linear(**grid).choose(cut, {})
    assert predicted.chosen["l2"] == expected.chosen["l2"]
    torch.testing.assert_close(predicted.probabilities, expected.probabilities, atol=5e-3, rtol=0)
    # Each direction divided by its own standard deviation would be another problem.
    other = Linear(**grid).choose(inputs_of(None, found.basis), {})
    assert (other.probabilities - expected.probabilities).abs().max() > 0.05
    few = FewLabels(labels_per_class=(5,), label_shares=(0.1,), draws=2)
    ours, theirs = (few.choose(x, {}).predictions["10 %"][0] for x in (cut, whole))
    assert (ours == theirs).double().mean() > 0.97


def test_knn_of_projected_pixels():
    found = fit_projection(smooth_images(600)[0], directions=40)
    ours, theirs = (KNN(k=(5,)).choose(x, {}).classes for x in (inputs_of(found, found.basis), inputs_of(None, None)))
    assert (ours == theirs).double().mean() > 0.97


def test_geometry_of_projected_pixels_is_that_of_the_pixels():
    pixels, labels = smooth_images(600)
    found = fit_projection(pixels, directions=20)
    small = {"train": thumbnails(TensorImages(pixels, labels), 12)}
    ours = Geometry().choose(inputs_of(found, found.basis, thumbnails=small), {})
    expected = geometry_figures(pixel_features(pixels))
    assert ours["width"] == 144
    assert ours["alignment"] is expected["alignment"] is None
    for name in expected.keys() - {"alignment", "diagnosis", "words"}:
        assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert (ours["diagnosis"], ours["words"]) == (expected["diagnosis"], expected["words"])


def test_the_report_tells_of_the_projection_and_takes_it_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "IMAGES", 600)
    side = 24
    train, test = (TensorImages(*smooth_images(n, side, seed)) for seed, n in enumerate((600, 60)))
    network = load("random:test_resnet", image_size=side, channels=1)
    settings = EvaluationSettings.from_knobs(parts=["knn"], k=[5], bootstrap=100, cache=str(tmp_path / "cache"))

    def data(**_):
        return ImageData(train, train, test, list("abcd"), 128)

    first, again = (runs.evaluate(network, data, settings, run_dir=tmp_path / name) for name in "ab")
    facts = first["results"]["raw pixels"]["projection"]
    assert (facts["pixels"], facts["directions"], facts["images"]) == (side**2, DIRECTIONS, 600)
    assert 0.999 < facts["share"] <= 1
    assert again["results"] == first["results"]
    assert first["protocol"]["pixel_directions"] == DIRECTIONS
    assert "projection" not in first["results"]["trained"]
    assert "576 pixels projected to 512 directions, which keep" in tables(first)[0].note
