import pytest
import torch
from short_runs import make_inputs, short_data
from torch import nn

from twoview.augment import TwoViews
from twoview.data import TensorImages
from twoview.encoder import Encoder, ModelCard
from twoview.errors import UserError
from twoview.evaluation.invariance import SHIFTS, Invariance, mean_similarity
from twoview.evaluation.probe import Prediction
from twoview.loading import load


class Mean(nn.Module):
    """Features that are the mean of each channel and a constant: flips do not change them, brightness does."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), torch.ones(len(x), 1)], 1)


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 3)


def encoder_of(network, channels):
    card = ModelCard("test", {}, 16, channels, mean=(0.3,) * channels, std=(0.2,) * channels)
    return Encoder(network, card)


def figures(encoder, images, earlier=None, labels=None):
    channels = encoder.card.channels
    views = TwoViews(16, channels, encoder.card.mean, encoder.card.std, allow_flip=False, min_crop_area=0.9)
    unlabelled = images.with_labels(torch.full_like(images.labels, -1))
    nothing = torch.zeros(2, 1), torch.arange(2), torch.zeros(len(images), 1)
    inputs = make_inputs(*nothing, encoder=encoder, test_images=unlabelled, views=views, batch_size=16)
    measure = Invariance()
    return measure.score(measure.choose(inputs, earlier or {}), inputs, images.labels)


def test_what_features_are_invariant_to_is_measured():
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (pixels * torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1)).to(torch.uint8)
    images = TensorImages(pixels, torch.arange(40) // 20)
    encoder = encoder_of(Mean(), 3)
    middle = encoder(pixels)[:, 0].sort().values[19:21].mean()
    by_brightness = Prediction(torch.zeros(40), {}, classify=lambda f: (f[:, 0] > middle).long())
    found = figures(encoder, images, {"linear": by_brightness})
    by_name = {}
    for shift in found["shifts"]:
        by_name.setdefault(shift["operation"], []).append(shift)
    assert list(by_name) == list(SHIFTS)
    assert all(len(by_name[name]) == len(strengths) for name, (strengths, _) in SHIFTS.items())
    assert by_name["mirror"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert by_name["mirror"][0]["invariance"] == pytest.approx(1, abs=1e-4)
    assert found["accuracy"] == by_name["mirror"][0]["accuracy"]
    assert found["accuracy"] > 0.9
    weak, medium, strong = (shift["invariance"] for shift in by_name["brightness"])
    assert 1 > weak > medium > strong
    assert by_name["brightness"][2]["accuracy"] < found["accuracy"]
    assert found["different_images"] == pytest.approx(mean_similarity(encoder(pixels)), abs=1e-6)


def test_gray_images_have_no_colors_to_be_invariant_to():
    images = short_data().test.subset(torch.arange(30))
    encoder = load("random:test_resnet", 16, 1).with_card(mean=(0.3,), std=(0.4,))
    found = figures(encoder, images)
    names = {shift["operation"] for shift in found["shifts"]}
    assert names == set(SHIFTS) - {"saturation", "hue", "grayscale"}
    assert all(shift["accuracy"] is None for shift in found["shifts"])
    assert found == figures(encoder, images)


def test_constant_features_have_no_invariance():
    found = figures(encoder_of(Constant(), 1), short_data().test.subset(torch.arange(10)))
    assert {shift["invariance"] for shift in found["shifts"]} == {None}


def test_a_sample_of_the_images_is_augmented():
    with pytest.raises(UserError, match="eval.shift_images=1"):
        Invariance(shift_images=1)
    seen = []

    class Counts(Mean):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    images = short_data().test
    nothing = torch.zeros(2, 1), torch.arange(2), torch.zeros(len(images), 1)
    views = TwoViews(16, 1, [0.3], [0.2])
    inputs = make_inputs(*nothing, encoder=encoder_of(Counts(), 1), test_images=images, views=views)
    chosen = Invariance(shift_images=7).choose(inputs, {})
    assert set(seen) == {7}
    assert len(Invariance(shift_images=7).score(chosen, inputs, images.labels)["shifts"]) == len(seen) - 1
