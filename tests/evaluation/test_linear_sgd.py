import pytest
import torch
from short_runs import make_inputs, short_data
from torch import nn
from torch.nn import functional as F

from twoview.augment import TwoViews
from twoview.data import split_holdout
from twoview.errors import UserError
from twoview.evaluation.invariance import IDENTITY
from twoview.evaluation.linear_sgd import LinearSGD, shuffled
from twoview.loading import load
from twoview.schedules import cosine_ramp

LIMITS = {"image_size": 16, "channels": 1, "mean": [0.3], "std": [0.4], "allow_flip": False, "min_crop_area": 0.5}
CROPS = {**IDENTITY, "crop_scale": (0.5, 1.0), "crop_ratio": (3 / 4, 4 / 3)}  # what these images allow


def small_digits(n):
    data = short_data()
    return data.train.subset(torch.arange(n)), data.test


def inputs_of(train, test, seed):
    encoder = load("random:test_resnet", 16, 1).with_card(mean=(0.3,), std=(0.4,))
    features = encoder.feature_matrix(train), train.labels, encoder.feature_matrix(test)
    views = TwoViews(**LIMITS, solarize_p=1.0)  # of its recipe nothing is used
    return make_inputs(*features, 10, seed, encoder=encoder, train_images=train, views=views)


def test_linear_sgd_is_the_plain_loop():
    train, test = small_digits(120)
    inputs = inputs_of(train, test, seed=5)
    network = inputs.encoder.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = LinearSGD(sgd_lr=(0.1, 3.0), sgd_epochs=3, sgd_batch_size=32).choose(inputs, {})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    fitted, held_out = split_holdout(train.labels, 0.2, 5)

    def loop(rate, allowed):
        head = nn.Linear(96, 10)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
        augment = TwoViews(**LIMITS, **CROPS)
        for batch, progress, key in shuffled(train, torch.arange(120), 32, 3, 5):
            seen = [i for i, position in enumerate(batch.ids.tolist()) if position in allowed]
            with torch.no_grad():
                x = network.eval()(augment(batch.pixels, key)[0])[seen]
            optimizer.param_groups[0]["lr"] = cosine_ramp(progress, 1.0, 0.0)
            optimizer.zero_grad()
            (rate * 32 / 256 * F.cross_entropy(head(x), batch.labels[seen])).backward()
            optimizer.step()
        return head

    accuracies = []
    for rate in (0.1, 3.0):
        head = loop(rate, set(fitted.tolist()))
        predicted = head(inputs.train.features[held_out]).argmax(1)
        accuracies.append(float((predicted == train.labels[held_out]).double().mean()))
    best = max(range(2), key=lambda i: (accuracies[i], -i))
    assert found.chosen == {"val_top1": pytest.approx(accuracies[best]), "lr": (0.1, 3.0)[best]}
    expected = loop((0.1, 3.0)[best], set(range(120)))(inputs.test).softmax(1)
    torch.testing.assert_close(found.probabilities, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.classify(inputs.test), found.classes)


def test_shuffled_batches_are_a_function_of_the_seed_and_cover_all_but_the_rest():
    train, _ = small_digits(50)
    orders = [
        [(batch.ids.tolist(), progress, key) for batch, progress, key in shuffled(train, torch.arange(10, 35), 8, 2, s)]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert [len(ids) for ids, _, _ in orders[0]] == [8] * 6
    assert len({i for ids, _, _ in orders[0][:3] for i in ids}) == 24
    assert len({key for _, _, key in orders[0]}) == 6
    assert [progress for _, progress, _ in orders[0]] == [i / 6 for i in range(6)]
    assert [len(b.ids) for b, _, _ in shuffled(train, torch.arange(5), 8, 1, 0)] == [5]


def test_raw_pixels_have_no_network_to_train_on():
    features = torch.zeros(4, 2), torch.arange(4) % 2, torch.zeros(2, 2)
    assert not LinearSGD().applies(make_inputs(*features))


@pytest.mark.parametrize("knobs", [{"sgd_lr": ()}, {"sgd_lr": (0.0,)}, {"sgd_epochs": 0}, {"sgd_batch_size": 0}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(UserError, match=f"eval.{next(iter(knobs))}="):
        LinearSGD(**knobs)
