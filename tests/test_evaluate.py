import numpy as np
import pytest
import torch
from conftest import judge
from scipy import optimize, stats
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from twoview.backbones import create_backbone
from twoview.data import ImageArrays, Preprocess
from twoview.errors import UserError
from twoview.evaluate import Protocol, extract, few_label_splits, score, split_holdout
from twoview.evaluate.probes import (
    Labelled,
    Prediction,
    bootstrap,
    confusion,
    few_labels,
    fit_linear,
    predict,
    score_few_labels,
)


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


def assert_is_scikit_learns(features, labels, grid, probes):
    standard = StandardScaler().fit_transform(features.double())
    for l2, probe in zip(grid, probes, strict=True):
        model = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=5000, tol=1e-8).fit(standard, labels)
        ours = torch.softmax(features @ probe[:-1] + probe[-1], 1)
        np.testing.assert_allclose(ours, model.predict_proba(standard), atol=2e-3)


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
    assert_is_scikit_learns(features, labels, grid, probes)


def test_fewer_images_than_features_reach_scikit_learns_optimum():
    features, labels = blobs(30, 3, 100, spread=3.0)
    grid = [1.0, 1e-2]
    probes, _ = fit_linear(features, labels, grid, 1000)
    assert_is_scikit_learns(features, labels, grid, probes)


def test_balanced_class_weights_are_scikit_learns():
    features, labels = blobs(300, 3, 6, spread=4.0)
    keep = (labels == 0) | (torch.arange(300) % 10 == 0)  # one class has ten times the images
    features, labels, test = features[keep], labels[keep], blobs(90, 3, 6, seed=1, spread=4.0)[0]
    result = {}
    for weights in ("none", "balanced"):
        protocol = Protocol(l2=(1e-2,), class_weights=weights)
        result[weights] = predict(Labelled(features, labels), test, protocol, 0, ["linear"], 3)["linear"]
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (1e-2 * len(labels)), max_iter=5000, tol=1e-8, class_weight="balanced")
    expected = model.fit(scaler.transform(features), labels).predict_proba(scaler.transform(test))
    np.testing.assert_allclose(result["balanced"].probabilities, expected, atol=2e-3)
    assert (result["balanced"].classes == 0).sum() < (result["none"].classes == 0).sum()


def test_label_smoothing_is_the_minimum_that_scipy_finds():
    features, labels = blobs(60, 3, 2, spread=2.0)
    (probe,), _ = fit_linear(features, labels, [1e-2], label_smoothing=0.2)
    standard = StandardScaler().fit_transform(features.double())
    targets = 0.8 * np.eye(3)[labels] + 0.2 / 3

    def loss(flat):
        weights = flat.reshape(3, 3)
        scores = standard @ weights[:2] + weights[2]
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return -(targets * logs).sum(1).mean() + 1e-2 / 2 * (weights[:2] ** 2).sum()

    weights = optimize.minimize(loss, np.zeros(9), tol=1e-10).x.reshape(3, 3)
    scores = standard @ weights[:2] + weights[2]
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(torch.softmax(features @ probe[:-1] + probe[-1], 1), expected, atol=1e-3)


def test_without_batchnorm_one_scale_serves_all_features():
    features, labels = blobs(spread=3.0)
    features = features * torch.logspace(-1, 1, 8)
    test = features[::3]
    protocol = Protocol(l2=(1e-2,))
    ours = predict(Labelled(features, labels), test, protocol, 0, ["linear_without_bn"], 4)["linear_without_bn"]
    scale = float(features.var(0, correction=0).mean().sqrt())
    model = LogisticRegression(C=1 / (1e-2 * 200), max_iter=5000, tol=1e-8).fit(features / scale, labels)
    np.testing.assert_allclose(ours.probabilities, model.predict_proba(test / scale), atol=2e-3)
    thousandfold = predict(Labelled(1e3 * features, labels), 1e3 * test, protocol, 0, ["linear_without_bn"], 4)
    np.testing.assert_allclose(thousandfold["linear_without_bn"].probabilities, ours.probabilities, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_without_batchnorm_dead_dimensions_have_no_say(scale):
    features, labels = blobs(spread=3.0)
    protocol = Protocol(l2=(1e-2,))
    found = []
    for dead in (0, 24):
        wide = scale * torch.cat([features, torch.full((200, dead), 0.7)], 1)
        probe = predict(Labelled(wide, labels), wide, protocol, 0, ["linear_without_bn"], 4)["linear_without_bn"]
        found.append(probe.probabilities)
    # The mean deviation is over all dimensions: a penalty of a quarter counts as much with four times as many.
    alone = predict(Labelled(features, labels), features, Protocol(l2=(2.5e-3,)), 0, ["linear_without_bn"], 4)
    np.testing.assert_allclose(found[1], alone["linear_without_bn"].probabilities, atol=2e-3)
    assert (found[0] - found[1]).abs().max() < 0.2


@pytest.mark.parametrize("constant", [0.0, 3.3])
def test_constant_features_get_a_probe_that_says_the_most_frequent_class(constant):
    labels = torch.tensor([0, 1, 1, 2, 1] * 6)
    for n in (30, 5):
        found = predict(
            Labelled(torch.full((n, 8), constant), labels[:n]),
            torch.full((4, 8), constant),
            Protocol(),
            0,
            ["linear", "linear_without_bn"],
            3,
        )
        assert all(p.classes.tolist() == [1] * 4 for p in found.values())


def scored(labels, predicted, classes=4, probabilities=None):
    prediction = Prediction(predicted, {}, probabilities)
    return score(prediction, labels, classes, Protocol(), seed=0)


@pytest.mark.parametrize("case", ["random", "one class", "all wrong", "a class without test images"])
def test_scores_are_scikit_learns(case):
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 4, (2, 120), generator=generator)
    if case == "one class":
        labels = torch.zeros_like(labels)
    if case == "all wrong":
        predicted = (labels + 1) % 4
    if case == "a class without test images":
        labels = labels.clamp(max=2)
    found = scored(labels, predicted)
    assert found["test_top1"] == pytest.approx(sk.accuracy_score(labels, predicted))
    present = labels.unique()
    recalls = sk.recall_score(labels, predicted, labels=present, average=None, zero_division=0)
    assert found["balanced"] == pytest.approx(recalls.mean())
    expected = [None] * 4
    for c, recall in zip(present.tolist(), recalls, strict=True):
        expected[c] = pytest.approx(recall)
    assert found["per_class"] == expected
    table = confusion(Prediction(predicted, {}), labels, 4)
    for a in range(4):
        for b in range(4):
            assert table[a, b] == ((labels == a) & (predicted == b)).sum()


@pytest.mark.parametrize("case", ["random", "certain", "ties"])
def test_the_calibration_error_is_the_loop(case):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(200, 4, generator=generator), 1)
    if case == "certain":
        probabilities = torch.nn.functional.one_hot(probabilities.argmax(1), 4).float()
    if case == "ties":
        probabilities = torch.full((200, 4), 0.25)
    labels = torch.randint(0, 4, (200,), generator=generator)
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            error += float(inside.double().mean() * abs(right - confidence[inside].double().mean()))
    assert scored(labels, predicted, 4, probabilities)["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_the_interval_is_that_of_resampled_images():
    correct = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7).double().numpy()
    low, high = bootstrap(correct, 4000, seed=1)
    # Resampling zeros and ones is drawing from a binomial distribution.
    expected = stats.binom(400, correct.mean()).ppf([0.025, 0.975]) / 400
    assert [low, high] == pytest.approx(expected, abs=0.006)
    assert bootstrap(correct, 4000, seed=1) == [low, high]
    assert bootstrap(np.ones(20), 100, seed=0) == [1, 1]
    assert bootstrap(np.ones(1), 100, seed=0) == [1, 1]


def test_few_label_splits_are_fixed_balanced_and_nested():
    labels = torch.cat([torch.arange(200) % 4, torch.tensor([4, 4])])
    splits = few_label_splits(labels, Protocol())
    assert list(splits) == ["1 per class", "5 per class", "10 per class", "1 %", "10 %"]
    for name, count in (("1 per class", 1), ("5 per class", 5), ("10 %", 5)):
        assert [len(draw) for draw in splits[name]] == [4 * count + min(2, 1 if name != "5 per class" else 2)] * 5
        for draw in splits[name]:
            assert labels[draw].bincount().tolist()[:4] == [count] * 4
    assert all(
        set(a.tolist()) <= set(b.tolist()) for a, b in zip(splits["1 per class"], splits["5 per class"], strict=True)
    )
    assert len({tuple(draw.tolist()) for draw in splits["5 per class"]}) == 5
    again = few_label_splits(labels, Protocol())
    assert all(torch.equal(a, b) for name in splits for a, b in zip(splits[name], again[name], strict=True))


def test_few_labels_read_no_other_label_and_give_mean_and_t_interval():
    train, test = Labelled(*blobs()), Labelled(*blobs(seed=1))
    splits = few_label_splits(train.labels, Protocol(labels_per_class=(3,), label_shares=(0.1,)))
    found = few_labels(train, test.features, splits, Protocol(), 4)
    hidden = train.labels.clone()
    hidden[torch.tensor(sorted(set(range(200)) - set(splits["3 per class"][0].tolist())))] = 0
    again = few_labels(Labelled(train.features, hidden), test.features, {"x": splits["3 per class"][:1]}, Protocol(), 4)
    assert torch.equal(found["3 per class"][0], again["x"][0])
    scores = score_few_labels(found, test.labels)["10 %"]
    accuracies = [sk.accuracy_score(test.labels, guesses) for guesses in found["10 %"]]
    assert scores["draws"] == pytest.approx(accuracies)
    interval = stats.t.interval(0.95, 4, np.mean(accuracies), stats.sem(accuracies))
    assert scores["interval"] == pytest.approx(list(interval))
    scaler = StandardScaler().fit(train.features)
    draw = splits["10 %"][0]
    model = LogisticRegression(C=1 / (0.1 * len(draw)), max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(train.features[draw]), train.labels[draw])
    assert accuracies[0] == pytest.approx(model.score(scaler.transform(test.features), test.labels), abs=0.006)


def test_balanced_choices_look_at_every_class_alike():
    # Where the rare class lies, four in five images are of the other: it is never the most frequent among many.
    labels = (torch.arange(400) < 50).long()
    angles = torch.rand(400, generator=torch.Generator().manual_seed(0))
    angles[:250] *= 0.3
    angles[250:] += 1
    features, found = torch.stack([angles.cos(), angles.sin()], 1), {}
    for weights in ("none", "balanced"):
        protocol = Protocol(class_weights=weights, k=(1, 200), temperature=(1.0,))
        found[weights] = predict(Labelled(features, labels), features, protocol, 0, ["knn"], 2)["knn"].chosen["k"]
    assert found == {"none": 200, "balanced": 1}  # the rare class is seen by its own neighbours alone


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
        assert right[probe]["test_top1"] > 0.8
        assert wrong[probe]["test_top1"] < 0.5
        for choice in {"val_top1", "l2", "converged", "k", "temperature"} & right[probe].keys():
            assert right[probe][choice] == wrong[probe][choice]


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
    [
        ({"holdout": 1.0}, "holdout"),
        ({"l2": ()}, "l2"),
        ({"k": (0,)}, "k"),
        ({"temperature": (-1,)}, "temperature"),
        ({"parts": ("linaer",)}, "parts"),
        ({"parts": ()}, "parts"),
        ({"class_weights": "even"}, "class_weights"),
        ({"retrieval": "all"}, "retrieval"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_shares": (1.5,)}, "label_shares"),
        ({"draws": 1}, "draws"),
        ({"bootstrap": 10}, "bootstrap"),
        ({"sgd_epochs": 0}, "sgd_epochs"),
        ({"few_label_l2": 0.0}, "few_label_l2"),
    ],
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
