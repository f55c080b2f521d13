"""What all methods have in common."""

import pytest
import torch
from small_methods import ALL, filled, make, make_without_bn, predictor, views
from torch import nn
from torch.testing import assert_close

from twoview.errors import UserError
from twoview.methods import MoCo, MoCoV3, SimCLR, SupCon
from twoview.negatives import NegativeQueue

IDS, LABELS = torch.arange(8), torch.arange(8) % 3 - 1


def test_a_bare_loop_overfits_one_batch():
    method, (view_a, view_b) = make(SimCLR, temperature=0.2), views()
    view_b = view_a + 0.1 * view_b
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(40):
        step = method(view_a, view_b)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
    assert step.loss.item() < 0.2 < step.chance
    assert step.logs["contrastive_top1"] == 1


def test_forward_changes_no_state_but_batchnorm_statistics():
    method = make(SimCLR)
    before = {k: v.clone() for k, v in method.state_dict().items() if "running" not in k and "num_batches" not in k}
    step = method(*views())
    method.after_update(0.5)
    method.after_batch(step)
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("method", ALL)
def test_forward_changes_nothing_and_after_batch_the_queue(method):
    built = make(method, **ALL[method])

    def state():
        copied = {k: v.clone() for k, v in built.state_dict().items()}
        return {k: v for k, v in copied.items() if "running" not in k and "num_batches" not in k}

    before = state()
    step = built(*views(), ids=IDS, labels=LABELS)
    assert all(torch.equal(v, before[k]) for k, v in state().items())
    assert built.ready == (method in (SimCLR, MoCoV3, SupCon))
    built.after_batch(step)
    changed = {k for k, v in state().items() if not torch.equal(v, before[k])}
    assert all(k.startswith(("queue.", "support_set.")) for k in changed)
    assert bool(changed) == (step.keys is not None) == (method not in (SimCLR, MoCoV3, SupCon))
    assert built.ready


@pytest.mark.parametrize("method", ALL)
def test_every_method_overfits_one_batch_in_a_bare_loop(method):
    built, (view_a, view_b) = make(method, temperature=0.2, **ALL[method]), views()
    view_b = view_a + 0.1 * view_b
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for i in range(40):
        step = built(view_a, view_b, ids=IDS, labels=IDS)
        if built.ready:
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            built.after_update(i / 40)
            losses.append(step.loss.item())
        built.after_batch(step)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def assert_equal(one, two):
    """Equal to the last bit, for tensors, numbers and containers of them."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_equal(value, two[key])
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


@pytest.mark.parametrize("method", ALL)
def test_forward_is_the_loss_of_what_encode_returns(method):
    built = filled(make(method, **ALL[method]))
    whole = built(*views(), ids=IDS, labels=LABELS)
    in_parts = built.loss(built.encode(*views()), IDS, LABELS)
    assert_equal(vars(whole), vars(in_parts))
    assert whole.loss.requires_grad
    assert not any(x.requires_grad for x in (whole.features, *whole.embeddings))
    assert whole.chance > 0


@pytest.mark.parametrize("method", ALL)
def test_a_batch_may_be_encoded_in_parts(method):
    built = filled(make_without_bn(method, **ALL[method]))
    view_a, view_b = (view.double() for view in views())
    whole = built.encode(view_a, view_b)
    halves = [built.encode(view_a[part], view_b[part]) for part in (slice(0, 3), slice(3, 8))]
    joined = type(whole)(
        torch.cat([half.features for half in halves]),
        *(
            tuple(torch.cat(parts) for parts in zip(*(getattr(half, name) for half in halves), strict=True))
            for name in ("embeddings", "predictions", "targets")
        ),
    )
    for name, values in whole._asdict().items():
        assert_close(getattr(joined, name), values, rtol=1e-12, atol=1e-12)
    gradients = []
    for encoded in (whole, joined):
        built.zero_grad()
        built.loss(encoded, IDS, LABELS).loss.backward()
        gradients.append([p.grad.clone() for p in built.parameters() if p.requires_grad])
    assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients[0])


@pytest.mark.parametrize("method", ALL)
def test_the_loss_applies_no_network(method):
    class AppliedError(Exception):
        pass

    def refuse(*_):
        raise AppliedError

    built = filled(make(method, **ALL[method]))
    encoded = built.encode(*views())
    expected = built.loss(encoded, IDS, LABELS)
    for module in built.modules():
        if module is not built and not isinstance(module, NegativeQueue):
            module.register_forward_pre_hook(refuse)
    assert_equal(vars(built.loss(encoded, IDS, LABELS)), vars(expected))
    built.after_batch(expected)
    with pytest.raises(AppliedError):
        built.encode(*views())


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"temperature": 0}, "method.temperature=0"),
        ({"variant": "dlc"}, "method.variant=dlc"),
        ({"sigma": 0}, "method.sigma=0"),
        ({"tau_plus": 1.0}, "method.tau_plus=1.0"),
        ({"beta": -1}, "method.beta=-1"),
        ({"same": "ids"}, "method.same=ids: choose one of none, labels"),
        ({"bn": "shuffle"}, "method.bn=shuffle: choose one of plain, split, sync"),
        ({"bn": "split", "bn_groups": 1}, "method.bn_groups=1"),
        ({"bn": "sync"}, "method.bn=sync: needs a GPU"),
    ],
)
def test_impossible_knobs_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        SimCLR(nn.Identity(), nn.Identity(), **knobs)


@pytest.mark.parametrize(
    ("method", "knobs", "named"),
    [
        (MoCo, {"momentum": 1.5}, "method.momentum=1.5"),
        (MoCo, {"queue_size": 0}, "method.queue_size=0"),
        (MoCo, {"statistics": "none"}, "method.statistics=none"),
        (MoCo, {"variant": "hard", "tau_plus": -0.1}, "method.tau_plus=-0.1"),
        (MoCoV3, {"momentum_end": -1.0, "predictor": predictor}, "method.momentum_end=-1"),
        (MoCoV3, {"freeze_patch_embedding": True, "predictor": predictor}, "method.freeze_patch_embedding=true"),
        (SupCon, {"temperature": -1}, "method.temperature=-1"),
    ],
)
def test_impossible_knobs_of_other_methods_are_refused(method, knobs, named):
    with pytest.raises(UserError, match=named):
        make(method, **knobs)
