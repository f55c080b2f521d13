"""Probes that train on augmented images, invariance, and fine-tuning."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.data import ImageArrays, Preprocess, digits
from twoview.errors import UserError
from twoview.evaluate import Protocol, extract, split_holdout
from twoview.evaluate.invariance import NOTHING, SHIFTS, invariance
from twoview.evaluate.sgd import linear_sgd, shuffled
from twoview.finetune import FineTuning, finetune
from twoview.optim import Optimization
from twoview.schedules import cosine_ramp, warmup_cosine

CPU = torch.device("cpu")
LIMITS = {"image_size": 16, "channels": 1, "mean": [0.3], "std": [0.4]}
OPTIMIZATION = Optimization(torch.optim.AdamW, lr=1.0)


def views():
    return TwoViews(**LIMITS, **{**NOTHING, "crop_scale": (0.5, 1.0)})


def small_digits(n=300):
    data = digits(image_size=16)
    return data.train.subset(torch.arange(n)), data.test


def test_linear_sgd_is_the_plain_loop():
    train, test = small_digits(120)
    backbone, width = create_backbone("test_resnet", 1, 16)
    preprocess = Preprocess(16, LIMITS["mean"], LIMITS["std"])
    features = extract(backbone, train, preprocess), extract(backbone, test, preprocess)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    protocol = Protocol(sgd_lr=(0.1, 3.0), sgd_epochs=3, sgd_batch_size=32)
    found = linear_sgd(backbone, train, features, views(), protocol, 10, 5, CPU)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    fit, held = split_holdout(train.labels, 0.2, 5)

    def loop(rate, allowed):
        head = nn.Linear(width, 10)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
        augment = views()
        for batch, progress, key in shuffled(train, torch.arange(120), 32, 3, 5):
            seen = [i for i, position in enumerate(batch.ids.tolist()) if position in allowed]
            with torch.no_grad():
                x = backbone.eval()(augment(batch.pixels, key)[0])[seen]
            optimizer.param_groups[0]["lr"] = cosine_ramp(progress, 1.0, 0.0)
            optimizer.zero_grad()
            (rate * 32 / 256 * F.cross_entropy(head(x), batch.labels[seen])).backward()
            optimizer.step()
        return head

    accuracies = []
    for rate in (0.1, 3.0):
        head = loop(rate, set(fit.tolist()))
        accuracies.append(float((head(features[0][held]).argmax(1) == train.labels[held]).double().mean()))
    best = max(range(2), key=lambda i: (accuracies[i], -i))
    assert found.chosen == {"val_top1": pytest.approx(accuracies[best]), "lr": (0.1, 3.0)[best]}
    expected = loop((0.1, 3.0)[best], set(range(120)))(features[1]).softmax(1)
    torch.testing.assert_close(found.probabilities, expected, atol=1e-4, rtol=1e-3)


def test_shuffled_batches_are_a_function_of_the_seed_and_cover_what_they_can():
    train, _ = small_digits(50)
    runs = [
        [(batch.ids.tolist(), progress, key) for batch, progress, key in shuffled(train, torch.arange(10, 35), 8, 2, s)]
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert [len(ids) for ids, _, _ in runs[0]] == [8] * 6
    assert len({i for ids, _, _ in runs[0][:3] for i in ids}) == 24
    assert len({key for _, _, key in runs[0]}) == 6
    assert [len(b.ids) for b, _, _ in shuffled(train, torch.arange(5), 8, 1, 0)] == [5]


class Mean(nn.Module):
    """Features that know each channel's mean and nothing else: they ignore mirroring, not brightness."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), torch.ones(len(x), 1)], 1)


def test_what_features_ignore_is_seen():
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (pixels * torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1)).to(torch.uint8)
    images = ImageArrays(pixels, torch.arange(40) // 20)
    limits = {"image_size": 16, "channels": 3, "mean": [0.3] * 3, "std": [0.2] * 3}
    middle = Mean()(Preprocess(16, limits["mean"], limits["std"])(pixels))[:, 0].median()
    found = invariance(Mean(), images, limits, CPU, 16, 0, lambda f: (f[:, 0] > middle).long())
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


def test_grey_images_have_no_colours_to_ignore():
    images = small_digits()[1].subset(torch.arange(30))
    backbone, _ = create_backbone("test_resnet", 1, 16)
    found = invariance(backbone, images, LIMITS, CPU, 16, 0)
    names = {shift["operation"] for shift in found["shifts"]}
    assert names == set(SHIFTS) - {"saturation", "hue", "greyscale"}
    assert all(shift["accuracy"] is None for shift in found["shifts"])
    assert found == invariance(backbone, images, LIMITS, CPU, 16, 0)


def test_features_that_are_all_alike_have_no_invariance():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3)

    found = invariance(Constant(), small_digits()[1].subset(torch.arange(10)), LIMITS, CPU, 16, 0)
    assert {shift["invariance"] for shift in found["shifts"]} == {None}


def tuned(finished, run_dir, **changes):
    short = {"epochs": 3, "least_steps": 0, "batch_size": 32, "learning_rates": (1e-5, 3e-3), "label_share": 0.2}
    tuning = FineTuning(**(short | changes))
    data = partial(digits, image_size=16)
    return finetune(
        finished.folder, data, partial(TwoViews, **NOTHING), OPTIMIZATION, warmup_cosine, tuning, run_dir=run_dir
    )


def test_fine_tuning_uses_a_share_of_the_labels_and_chooses_on_held_out_ones(finished, tmp_path):
    before = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    report = tuned(finished, tmp_path / "a")
    assert (finished.folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert report == json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report["results"]) == {"fine-tuned", "supervised"}
    assert report["protocol"]["labels"] == pytest.approx(0.2 * 1347, abs=10)
    own = report["results"]["fine-tuned"]["finetune"]
    assert own["lr"] == 3e-3  # the other one learns nothing in three epochs
    assert own["test_top1"] > 0.5
    assert report["figures"] == {"val/finetune_top1": own["val_top1"]}
    predictions = load_file(tmp_path / "a" / "predictions.safetensors")
    assert float((predictions["finetune"] == predictions["labels"]).double().mean()) == pytest.approx(own["test_top1"])
    again = tuned(finished, tmp_path / "b", supervised=False)
    assert again["results"] == {"fine-tuned": report["results"]["fine-tuned"]}


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"label_share": 0.0}, "label_share=0.0"),
        ({"label_share": 1.5}, "label_share=1.5"),
        ({"epochs": 0}, "epochs=0"),
        ({"least_steps": -1}, "least_steps=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"learning_rates": ()}, r"learning_rates=\[\]"),
        ({"learning_rates": (-1.0,)}, r"learning_rates=\[-1.0\]"),
    ],
)
def test_impossible_fine_tuning_is_refused(knobs, named):
    with pytest.raises(UserError, match=f"finetune.{named}"):
        FineTuning(**knobs)
