"""Two processes against one on the joined batch: losses, gradients, queues and weights."""

import multiprocessing
import os
import socket
from functools import partial

import pytest
import torch
from torch import distributed as dist, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from twoview import distributed, methods
from twoview.heads import projection_head
from twoview.losses import clip_loss
from twoview.training.gradient_caching import split_batch, step_in_pieces

N, STEPS = 12, 2
QUEUES = ("queue.", "support_set.")  # prefixes of their buffers
head = partial(projection_head, hidden_dim=10, out_dim=6)
predictor = partial(projection_head, hidden_dim=10, out_dim=6, last_bn=False)

# name: (method, its knobs on two ranks, its knobs on one process, norm layer)
CASES = {
    "simclr": (methods.SimCLR, {}, {}, "group"),
    "simclr same labels": (methods.SimCLR, {"same": "labels"}, {"same": "labels"}, "group"),
    "simclr dclw": (methods.SimCLR, {"variant": "dclw"}, {"variant": "dclw"}, "group"),
    "simclr dcl": (methods.SimCLR, {"variant": "dcl"}, {"variant": "dcl"}, "group"),
    "simclr debiased": (methods.SimCLR, {"variant": "debiased"}, {"variant": "debiased"}, "group"),
    "simclr hard": (methods.SimCLR, {"variant": "hard", "beta": 0.5}, {"variant": "hard", "beta": 0.5}, "group"),
    "simclr masked, learned temperature": (
        methods.SimCLR,
        {"mask_above": 0.9, "learn_temperature": True},
        {"mask_above": 0.9, "learn_temperature": True},
        "group",
    ),
    "moco same labels": (
        methods.MoCo,
        {"queue_size": 30, "same": "labels"},
        {"queue_size": 30, "same": "labels"},
        "group",
    ),
    "moco": (methods.MoCo, {"queue_size": 30}, {"queue_size": 30}, "group"),
    "moco dclw": (methods.MoCo, {"queue_size": 30, "variant": "dclw"}, {"queue_size": 30, "variant": "dclw"}, "group"),
    "moco from an empty queue": (methods.MoCo, {"queue_size": 30}, {"queue_size": 30}, "group"),
    "moco dclw from an empty queue": (
        methods.MoCo,
        {"queue_size": 30, "variant": "dclw"},
        {"queue_size": 30, "variant": "dclw"},
        "group",
    ),
    "moco symmetric": (
        methods.MoCo,
        {"queue_size": 31, "symmetric": True},
        {"queue_size": 31, "symmetric": True},
        "group",
    ),
    "moco_v3": (methods.MoCoV3, {}, {}, "group"),
    "supcon": (methods.SupCon, {}, {}, "group"),
    "nnclr": (methods.NNCLR, {"queue_size": 30}, {"queue_size": 30}, "group"),
    "simclr bn": (methods.SimCLR, {}, {"bn": "split"}, "batch"),
    "moco bn": (methods.MoCo, {"queue_size": 30}, {"bn": "split", "queue_size": 30}, "batch"),
    "moco bn shuffle": (
        methods.MoCo,
        {"bn": "shuffle", "queue_size": 30},
        {"bn": "shuffle", "queue_size": 30},
        "batch",
    ),
    "moco bn split in four": (
        methods.MoCo,
        {"bn": "split", "bn_groups": 4, "queue_size": 30},
        {"bn": "split", "bn_groups": 4, "queue_size": 30},
        "batch",
    ),
    "moco_v3 bn": (methods.MoCoV3, {}, {"bn": "split"}, "batch"),
    "supcon bn": (methods.SupCon, {}, {"bn": "split"}, "batch"),
    "nnclr bn": (methods.NNCLR, {"queue_size": 30}, {"bn": "split", "queue_size": 30}, "batch"),
    # The ranks encode their images in pieces, the one process does not.
    "simclr in pieces": (methods.SimCLR, {}, {}, "group"),
    "moco_v3 in pieces": (methods.MoCoV3, {}, {}, "group"),
    "supcon in pieces": (methods.SupCon, {}, {}, "group"),
    "nnclr in pieces": (methods.NNCLR, {"queue_size": 30}, {"queue_size": 30}, "group"),
}


def build(name, ranks):
    make, on_two, on_one, norm = CASES[name]
    torch.manual_seed(0)
    between = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with_bn = norm == "batch"
    knobs = dict(on_two if ranks == 2 else on_one)
    if make in (methods.MoCoV3, methods.NNCLR):
        knobs["predictor"] = partial(predictor, hidden_bn=with_bn)
    method = make(backbone, head(32, hidden_bn=with_bn, last_bn=with_bn), **knobs)
    queue = getattr(method, "queue", getattr(method, "support_set", None))
    if queue is not None and "empty" not in name:  # keys of some images of the batch and of others
        queue.push(torch.randn(16, 6), torch.arange(6, 22))
    return method.double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        views = torch.randn(2, N, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield *views, torch.arange(step, step + N), torch.arange(N) % 4 - 1


class InPieces(nn.Module):
    """A method that encodes its images in two pieces."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, *views, ids, labels):
        pieces = split_batch(len(ids), len(ids) // 2)
        return step_in_pieces(self.method, lambda part: [view[part] for view in views], pieces, (0,), ids, labels)


def train(name, rank=0, world=1):
    method = model = build(name, world)
    reductions = []
    if world > 1:
        model = InPieces(method) if "pieces" in name else method
        model = DistributedDataParallel(model, broadcast_buffers=False)

        def reduce(_state, bucket):
            reductions.append(bucket.index())
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, reduce)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses, gradients = [], []
    for view_a, view_b, ids, labels in batches():
        view_a, view_b, ids, labels = (x[rank::world] for x in (view_a, view_b, ids, labels))
        step = model(view_a, view_b, ids=ids, labels=labels)
        optimizer.zero_grad()
        step.loss.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in method.parameters()])
        optimizer.step()
        method.after_update(0.5)
        method.after_batch(step)
        losses.append(step.loss.item())
    keep = {k: v for k, v in method.state_dict().items() if "running" not in k and "num_batches" not in k}
    return {"losses": losses, "gradients": gradients, "state": keep, "reductions": reductions}


def clip(rank=0, world=1):
    """Loss of the images of a rank, and the gradient of the sum of the losses of all ranks."""
    views = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = views[:, rank::world].clone().requires_grad_()
    loss = clip_loss(distributed.gather(own[0]), distributed.gather(own[1]), 0.2, distributed.own_rows())
    loss.backward()
    return loss.detach(), own.grad


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in CASES:
        torch.save(train(name, rank, 2), f"{folder}/{name} {rank}.pt")
    torch.save(clip(rank, 2), f"{folder}/clip {rank}.pt")
    x = torch.arange(6.0).view(3, 2) * (rank + 1)
    torch.save(distributed.gather(x), f"{folder}/gathered {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Folder with the results of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, str(folder)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_on_the_joined_batch(name, two_ranks):
    one = train(name)
    two = [torch.load(two_ranks / f"{name} {rank}.pt", weights_only=True) for rank in range(2)]
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-10, abs=1e-10)
    for rank in two:
        for theirs, ours in zip(rank["gradients"], one["gradients"], strict=True):
            for a, b in zip(theirs, ours, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a - b).abs().max() < 1e-10
        assert rank["state"].keys() == one["state"].keys()
        for key, value in one["state"].items():
            if not key.startswith(QUEUES):
                assert_close(rank["state"][key], value, rtol=1e-10, atol=1e-10)
    stored = next((prefix for prefix in QUEUES if prefix + "keys" in one["state"]), None)
    if stored is not None:
        # Slots need not agree: symmetric pushes hold both views of a rank side by side.
        states = (one["state"], two[0]["state"], two[1]["state"])
        sides = [(state[stored + "ids"], state[stored + "keys"]) for state in states]
        contents = [sorted(zip(ids.tolist(), keys.tolist(), strict=True)) for ids, keys in sides]
        assert contents[1] == contents[2]
        for (i, key), (j, other) in zip(contents[0], contents[1], strict=True):
            assert i == j
            assert_close(key, other, rtol=1e-10, atol=1e-10)


def test_clip_loss_of_two_ranks_is_that_of_the_joined_batch(two_ranks):
    loss, gradient = clip()
    losses, gradients = zip(*(torch.load(two_ranks / f"clip {rank}.pt") for rank in range(2)), strict=True)
    assert_close(sum(losses) / 2, loss, rtol=1e-12, atol=0)
    for rank in range(2):
        assert_close(gradients[rank] / 2, gradient[:, rank::2], rtol=1e-10, atol=1e-14)


def test_a_queue_of_two_ranks_is_continued_in_one_process_with_another_batch(two_ranks):
    method = build("moco", 1)
    state = torch.load(two_ranks / "moco 0.pt", weights_only=True)["state"]
    method.load_state_dict(state, strict=False)
    view = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    step = method(view, view, ids=torch.arange(5))
    assert step.logs["queue_masked"] > 0
    method.after_batch(step)
    assert len(method.queue) == 30
    assert set(range(5)) <= set(method.queue.read()[1].tolist())


def test_gathering_interleaves_the_ranks(two_ranks):
    for rank in range(2):
        gathered = torch.load(two_ranks / f"gathered {rank}.pt", weights_only=True)
        assert gathered.tolist() == [[0, 1], [0, 2], [2, 3], [4, 6], [4, 5], [8, 10]]


@pytest.mark.parametrize("name", [name for name in CASES if "pieces" in name])
def test_pieces_are_reduced_once_in_a_step(name, two_ranks):
    in_pieces, whole = (torch.load(two_ranks / f"{each} 0.pt") for each in (name, name.removesuffix(" in pieces")))
    assert len(in_pieces["reductions"]) == len(whole["reductions"]) >= STEPS


def test_gradients_are_not_all_zero():
    for name in CASES:
        assert any(g is not None and g.abs().max() > 1e-4 for g in train(name)["gradients"][1]), name
