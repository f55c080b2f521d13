import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from twoview.backbones import create_backbone
from twoview.data import ImageArrays, Preprocess
from twoview.errors import UserError
from twoview.evaluate import Protocol, extract, judge, split_holdout
from twoview.evaluate.probes import fit_linear


def blobs(n=200, classes=4, d=8, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


def test_the_holdout_is_stratified_fixed_by_seed_and_disjoint():
    labels = torch.arange(100) % 5
    fit, held = split_holdout(labels, 0.2, seed=3)
    assert len(set(fit.tolist()) | set(held.tolist())) == 100
    assert labels[held].bincount().tolist() == [4] * 5
    assert torch.equal(held, split_holdout(labels, 0.2, seed=3)[1])
    assert not torch.equal(held, split_holdout(labels, 0.2, seed=4)[1])
    split_holdout(torch.tensor([0, 1, 2, 0, 1, 2, 3]), 0.3, seed=0)  # a class of one image
    with pytest.raises(UserError, match="eval.holdout"):
        split_holdout(torch.tensor([0]), 0.2, seed=0)


def test_the_probe_is_scikit_learns_on_standardised_features():
    train, test = blobs(), blobs(seed=1)
    result = judge(*train, *test, Protocol(l2=(1e-2,)), seed=0)["linear"]
    scaler = StandardScaler().fit(train[0])
    model = LogisticRegression(C=1 / (1e-2 * 200), max_iter=1000).fit(scaler.transform(train[0]), train[1])
    assert result["test_top1"] == pytest.approx(model.score(scaler.transform(test[0]), test[1]))
    assert result["converged"]


@pytest.mark.parametrize("constant", [False, True])
def test_every_penalty_of_the_grid_reaches_scikit_learns_optimum(constant):
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(16, 16, generator=generator)
    features = torch.randn(300, 16, generator=generator) * torch.logspace(0, -3, 16) @ turn + 5  # nearly dependent
    if constant:
        features[:, 3] = 7.0
    labels = (features[:, 4:7] + 0.5 * torch.randn(300, 3, generator=generator)).argmax(1)
    grid = [1.0, 1e-2, 1e-4]
    probes, converged = fit_linear(features, labels, grid, 1000)
    assert converged
    standard = StandardScaler().fit_transform(features.double())
    for l2, probe in zip(grid, probes, strict=True):
        model = LogisticRegression(C=1 / (l2 * 300), max_iter=5000, tol=1e-8).fit(standard, labels)
        ours = torch.softmax(features @ probe[:-1] + probe[-1], 1)
        np.testing.assert_allclose(ours, model.predict_proba(standard), atol=2e-3)


def test_dead_and_repeated_features_do_not_stop_the_probe():
    features, labels = blobs()
    wide = torch.cat([features, torch.zeros(200, 227), features[:, :1].repeat(1, 20)], dim=1)
    probes, converged = fit_linear(wide, labels, [1e-2, 1e-3], 1000)
    assert converged
    assert probes.isfinite().all()


def test_a_probe_that_did_not_converge_is_said(caplog):
    _, converged = fit_linear(*blobs(spread=4.0), [1e-4], 2)
    assert not converged
    assert "not converged in 2 iterations; raise eval.max_iterations" in caplog.text


def test_shuffled_test_labels_change_nothing_but_the_test_figures():
    train, (test, labels) = blobs(), blobs(seed=1)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    right, wrong = (judge(*train, test, y, Protocol(), seed=0) for y in (labels, shuffled))
    for probe in ("linear", "knn"):
        assert right[probe].pop("test_top1") > 0.8
        assert wrong[probe].pop("test_top1") < 0.5
        assert right[probe] == wrong[probe]


def test_choices_are_made_on_the_held_out_labels():
    features, labels = blobs(spread=4.0)
    fit, held = split_holdout(labels, 0.2, seed=0)
    result = judge(
        features, labels, features, labels, Protocol(k=(1, 20), temperature=(0.07,)), seed=0, probes=("knn",)
    )["knn"]
    from sklearn.neighbors import KNeighborsClassifier

    best = -1.0, 0
    for k in (1, 20):
        model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        score = model.fit(features[fit], labels[fit]).score(features[held], labels[held])
        best = max(best, (score, -k))
    assert (result["val_top1"], -result["k"]) == pytest.approx(best)


def test_more_neighbours_than_images():
    train = blobs(20)
    result = judge(*train, *train, Protocol(k=(200,)), seed=0, probes=("knn",))["knn"]
    assert result["k"] == 16


@pytest.mark.parametrize(
    ("knobs", "named"),
    [({"holdout": 1.0}, "holdout"), ({"l2": ()}, "l2"), ({"k": (0,)}, "k"), ({"temperature": (-1,)}, "temperature")],
)
def test_impossible_protocols_are_refused(knobs, named):
    with pytest.raises(UserError, match=f"eval.{named}="):
        Protocol(**knobs)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_extraction_leaves_the_backbone_as_it_was(name):
    network, width = create_backbone(name, image_size=32)
    network.train()
    network_modes = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    network_modes.eval()  # a mode of its own somewhere inside
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    images = ImageArrays(pixels, torch.zeros(10, dtype=torch.long))
    features = extract(network, images, Preprocess(32, [0.5] * 3, [0.2] * 3), batch_size=4)
    assert features.shape == (10, width)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(features, extract(network, images, Preprocess(32, [0.5] * 3, [0.2] * 3), batch_size=4))


def test_modes_come_back_after_a_failure():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError

    network = Fails().train()
    images = ImageArrays(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError):
        extract(network, images, Preprocess(8, [0.5] * 3, [0.2] * 3))
    assert network.training
