"""Temperatures that are constant, scheduled or learned."""

import math
from functools import partial

import pytest
import torch
from short_runs import StopsAfter, assert_same, logged, pretrain
from small_methods import ALL, filled, make, views

from twoview.errors import Interrupted, UserError
from twoview.loading import read_checkpoint
from twoview.losses import nt_xent
from twoview.methods import MoCo, MoCoV3, SimCLR
from twoview.methods.temperature import Temperature
from twoview.optim import OptimizerSettings

IDS = torch.arange(8)


@pytest.mark.parametrize("method", ALL)
def test_a_scheduled_temperature_follows_a_half_cosine_after_each_update(method):
    built = filled(make(method, temperature=0.5, temperature_end=0.1, **ALL[method]))
    encoded = built.encode(*views())
    for progress, expected in ((0.0, 0.5), (0.5, 0.3), (1.0, 0.1)):
        built.after_update(progress)
        step = built.loss(encoded, IDS, IDS)
        constant = filled(make(method, temperature=expected, **ALL[method])).loss(encoded, IDS, IDS)
        assert step.logs["temperature"] == pytest.approx(expected)
        built.after_update(0.25)  # what was logged does not change
        assert step.logs["temperature"] == pytest.approx(expected)
        built.after_update(progress)
        torch.testing.assert_close(step.loss, constant.loss)
        torch.testing.assert_close(torch.as_tensor(step.chance).double(), torch.as_tensor(constant.chance).double())


def test_a_constant_temperature_has_no_state_and_no_log():
    method = make(SimCLR, temperature=0.3)
    assert not any("temperature" in name for name in method.state_dict())
    assert "temperature" not in method(*views()).logs


@pytest.mark.parametrize("method", [m for m in ALL if m is not MoCoV3])
def test_the_gradient_of_a_learned_temperature_is_the_derivative(method):
    built = filled(make(method, temperature=0.3, learn_temperature=True, **ALL[method]))
    encoded = built.encode(*views())
    built.loss(encoded, IDS, IDS).loss.backward()

    def at(shift):
        with torch.no_grad():
            built.temperature.log_scale += shift
            value = built.loss(encoded, IDS, IDS).loss.item()
            built.temperature.log_scale -= shift
        return value

    slope = (at(1e-2) - at(-1e-2)) / 2e-2
    assert built.temperature.log_scale.grad.item() == pytest.approx(slope, rel=1e-2)
    assert abs(slope) > 1e-3


def test_a_learned_temperature_stays_at_a_hundredth_or_above():
    temperature = Temperature(0.02)
    assert temperature.value().item() == pytest.approx(0.02)
    with torch.no_grad():
        temperature.log_scale += 5
    temperature.move(0.5)
    assert temperature.value().item() == pytest.approx(0.01)
    assert temperature.log_scale.item() == pytest.approx(math.log(100))


def test_a_learned_temperature_has_a_parameter_group_without_weight_decay():
    method = make(SimCLR, learn_temperature=True)
    groups = OptimizerSettings(weight_decay=0.1).build(method, 256).param_groups
    group = next(group for group in groups if group["name"] == "temperature")
    assert [id(p) for p in group["params"]] == [id(method.temperature.log_scale)]
    assert group["weight_decay"] == 0
    assert len(groups) == 3


@pytest.mark.parametrize("knobs", [{"temperature_end": 0.05}, {"learn_temperature": True}], ids=str)
def test_a_run_that_was_stopped_continues_with_the_same_temperature(tmp_path, knobs):
    method = partial(SimCLR, temperature=0.5, **knobs)
    pretrain(tmp_path / "whole", method=method)
    with pytest.raises(Interrupted):
        pretrain(tmp_path / "two", method=method, loggers=[StopsAfter(tmp_path / "two", after=8)])
    pretrain(tmp_path / "two", method=method, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "two")
    temperatures = [float(row["train/temperature"]) for row in logged(tmp_path / "whole") if row["train/loss"]]
    assert len(set(temperatures)) == len(temperatures) > 3
    assert temperatures == [float(row["train/temperature"]) for row in logged(tmp_path / "two") if row["train/loss"]]
    assert any("temperature" in name for name in read_checkpoint(tmp_path / "whole")["state_dict"])


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (SimCLR, {"temperature": 0}, "method.temperature=0: must be above 0"),
        (SimCLR, {"temperature_end": -1}, "method.temperature_end=-1: must be above 0"),
        (SimCLR, {"temperature_end": 0.1, "learn_temperature": True}, "method.temperature_end=0.1: leave it out"),
        (SimCLR, {"temperature": 0.001, "learn_temperature": True}, "method.temperature=0.001: a learned temperature"),
        (SimCLR, {"temperature": 2, "learn_temperature": True}, "method.temperature=2: a learned temperature"),
        (SimCLR, {"temperature": True}, "method.temperature=True: must be above 0"),
        (MoCo, {"variant": "hard", "learn_temperature": True}, "learn_temperature=true: not with method.variant=hard"),
    ],
)
def test_what_cannot_be_is_refused(method, knobs, message):
    with pytest.raises(UserError, match=message):
        make(method, **knobs)


def test_the_bound_of_mutual_information_is_logged_where_it_is_one():
    method = make(SimCLR, temperature=0.3)
    step = method(*views())
    bound = step.logs["mutual_information_bound"]
    assert bound.item() == pytest.approx(math.log(15) - step.loss.item())
    assert bound <= math.log(15)
    others = [make(SimCLR, variant="dcl"), make(SimCLR, mask_above=0.9), filled(make(MoCo, queue_size=16))]
    assert not any("mutual_information_bound" in m(*views(), ids=IDS).logs for m in others)
    labelled = make(SimCLR, same="labels")
    assert "mutual_information_bound" not in labelled(*views(), labels=IDS).logs
    v3 = make(MoCoV3, temperature=0.3, **ALL[MoCoV3])
    step = v3(*views())
    assert step.logs["mutual_information_bound"].item() == pytest.approx(math.log(8) - step.loss.item() / 1.2, rel=1e-5)


def test_masked_negatives_are_left_out_and_their_share_is_logged():
    method = make(SimCLR, temperature=0.3, mask_above=0.1)
    encoded = method.encode(*views())
    step = method.loss(encoded)
    z_a, z_b = (torch.nn.functional.normalize(z, dim=1) for z in encoded.embeddings)
    similarity = z_a @ torch.cat([z_a, z_b]).T
    negatives = ~torch.eye(8, dtype=torch.bool).repeat(1, 2)
    share = ((similarity > 0.1) & negatives).sum() / negatives.sum()
    assert step.logs["masked"].item() == pytest.approx(share.item())
    assert step.logs["masked"] > 0
    assert torch.equal(step.loss, nt_xent(*encoded.embeddings, 0.3, mask_above=0.1))
    assert step.loss < make(SimCLR, temperature=0.3).loss(encoded).loss
    queue = filled(make(MoCo, queue_size=16, mask_above=0.2))(*views(), ids=IDS)
    assert 0 <= queue.logs["masked"] <= 1
    assert "masked" not in make(SimCLR)(*views()).logs
    same = make(SimCLR, same="labels", mask_above=0.1).loss(encoded, labels=torch.zeros(8, dtype=torch.int64))
    assert same.logs["masked"] == 0  # known positives are no negatives
