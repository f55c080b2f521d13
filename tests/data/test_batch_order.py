from types import SimpleNamespace

import pytest
import torch

from twoview.data import fake
from twoview.data.images import WINDOW
from twoview.training.loader import BatchOrder, PretrainingData


def order(done=0, rank=0, world_size=1, seed=0, size=23, batch_size=6):
    return list(BatchOrder(size, batch_size, seed, lambda: done, rank, world_size))


def test_an_epoch_sees_each_image_at_most_once_and_drops_the_last_part():
    batches = order()
    assert [len(b) for b in batches] == [6, 6, 6]
    assert len(torch.cat(batches).unique()) == 18


def test_the_order_depends_on_seed_and_epoch_and_goes_on_where_it_stopped():
    first = torch.stack(order())
    assert torch.equal(first, torch.stack(order()))
    assert not torch.equal(first, torch.stack(order(seed=1)))
    second = torch.stack(order(done=3))
    assert not torch.equal(first, second)
    assert torch.equal(second[1:], torch.stack(order(done=4)))


def test_ranks_share_each_global_batch():
    whole = order()
    parts = [order(rank=r, world_size=3) for r in range(3)]
    for i, batch in enumerate(whole):
        assert all(len(p[i]) == 2 for p in parts)
        assert set(torch.cat([p[i] for p in parts]).tolist()) == set(batch.tolist())


def test_neighboring_seeds_and_epochs_do_not_share_orders():
    orders = {tuple(torch.cat(order(seed=s, done=3 * e)).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_blocks_are_read_few_at_a_time_every_image_once_an_epoch():
    blocks = torch.arange(1000) // 5  # 200 blocks
    order = BatchOrder(1000, 20, 3, lambda: 0, blocks=blocks)
    epoch = torch.cat(list(order))
    assert sorted(epoch.tolist()) == list(range(1000))
    for start in range(0, 1000, WINDOW * 5):
        assert len(blocks[epoch[start : start + WINDOW * 5]].unique()) == WINDOW or start + WINDOW * 5 > 1000
    later = torch.cat(list(BatchOrder(1000, 20, 3, lambda: 57, blocks=blocks)))
    second = torch.cat(list(BatchOrder(1000, 20, 3, lambda: 50, blocks=blocks)))
    assert not torch.equal(second, epoch)
    assert torch.equal(later, second[7 * 20 :])


def test_ranks_read_their_own_blocks():
    blocks = torch.arange(2000) // 5
    shares = [torch.cat(list(BatchOrder(2000, 20, 0, lambda: 0, r, 2, blocks))) for r in range(2)]
    assert [len(s) for s in shares] == [1000, 1000]
    assert sorted(torch.cat(shares).tolist()) == list(range(2000))
    shared = set(blocks[shares[0]].tolist()) & set(blocks[shares[1]].tolist())
    assert len(shared) <= WINDOW


def test_the_loader_continues_after_the_batches_that_were_started(monkeypatch):
    data = PretrainingData(fake(images=24, batch_size=6), seed=1)
    with pytest.raises(RuntimeError, match="needs a Trainer"):
        data.train_dataloader()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=1, world_size=2)
    monkeypatch.setattr("twoview.training.loader.batches_started", lambda trainer: 5)
    batches = list(data.train_dataloader())
    assert torch.equal(torch.stack([b.ids for b in batches]), torch.stack(order(5, 1, 2, 1, 24)))
    assert torch.equal(batches[0].pixels, data.images.pretrain.pixels[batches[0].ids])
