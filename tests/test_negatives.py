import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from twoview.errors import UserError
from twoview.negatives import NegativeQueue


def keys(n, seed=0, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_contents_equal_those_of_a_list_for_batches_of_different_sizes():
    queue, expected, first = NegativeQueue(10, 4), [], 0
    for i, n in enumerate((3, 1, 4, 2, 5)):
        batch, ids = keys(n, i), torch.arange(first, first + n)
        queue.push(batch, ids)
        expected = (expected + list(zip(F.normalize(batch, dim=1).tolist(), ids.tolist(), strict=True)))[-10:]
        first += n
        stored, stored_ids = queue.read()
        assert len(queue) == len(stored) == min(first, 10)
        assert sorted(zip(stored.tolist(), stored_ids.tolist(), strict=True)) == sorted(expected)


def test_a_new_queue_is_empty():
    queue = NegativeQueue(6, 4)
    stored, ids = queue.read()
    assert stored.shape == (0, 4)
    assert ids.shape == (0,)
    assert queue.age == 0


@pytest.mark.parametrize("n", [6, 7, 20])
def test_a_batch_of_at_least_the_queue_size(n):
    queue = NegativeQueue(6, 4)
    queue.push(keys(2), torch.tensor([90, 91]))
    queue.push(keys(n, 1), torch.arange(n))
    assert sorted(queue.read()[1].tolist()) == list(range(n - 6, n))
    queue.push(keys(1, 2), torch.tensor([50]))  # replaces the oldest
    assert sorted(queue.read()[1].tolist()) == [*range(n - 5, n), 50]


def test_age_of_the_oldest_key_in_batches():
    queue = NegativeQueue(6, 4)
    ages = []
    for i in range(6):
        queue.push(keys(2, i), torch.arange(2))
        ages.append(queue.age)
    assert ages == [1, 2, 3, 3, 3, 3]


def test_ages_for_batches_of_different_sizes():
    queue, pushed = NegativeQueue(7, 4), []
    for i, n in enumerate((3, 1, 0, 9, 2, 4, 0, 1, 7, 5)):
        queue.push(keys(n, i), torch.arange(n))
        pushed = (pushed + [i] * n)[-7:]
        assert queue.age.dtype == torch.int64
        assert queue.age == 1 + i - min(pushed)


def test_numbers_of_the_host_equal_the_buffers():
    queue = NegativeQueue(7, 4)
    for i, n in enumerate((3, 1, 0, 9, 2)):
        queue.push(keys(n, i), torch.arange(n))
        assert len(queue) == queue.filled == (queue.pushed_at > 0).sum()
        same = copy.deepcopy(queue)
        for q in (queue, same):
            q.push(keys(2, 20), torch.tensor([70 + i, 80 + i]))
        assert torch.equal(queue.cursor, same.cursor)
        assert torch.equal(queue.read()[1], same.read()[1])


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_replaces_a_longer_one(assign):
    """An outer module loads the state, as a checkpoint does; the names are those of every version."""
    empty, other = (nn.ModuleDict({"queue": NegativeQueue(6, 4)}) for _ in range(2))
    names = ("keys", "ids", "pushed_at", "filled", "cursor", "pushes")
    assert list(empty.state_dict()) == [f"queue.{name}" for name in names]
    other["queue"].push(keys(8), torch.arange(8))
    other.load_state_dict({name: value.clone() for name, value in empty.state_dict().items()}, assign=assign)
    other["queue"].push(keys(1), torch.tensor([5]))
    assert len(other["queue"]) == 1
    assert other["queue"].read()[1].tolist() == [5]
    assert other["queue"].age == 1


def test_an_empty_push_changes_nothing():
    queue = NegativeQueue(6, 4)
    queue.push(keys(4), torch.arange(4))
    before = queue.read()[0].clone()
    queue.push(keys(0), torch.arange(0))
    assert torch.equal(queue.read()[0], before)
    assert len(queue) == 4


def test_a_loaded_state_continues_with_another_batch_size(tmp_path):
    queue, other = NegativeQueue(10, 4), NegativeQueue(10, 4)
    for i in range(3):
        queue.push(keys(4, i), torch.arange(4 * i, 4 * i + 4))
    torch.save(queue.state_dict(), tmp_path / "q.pt")
    other.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    for q in (queue, other):
        q.push(keys(3, 9), torch.tensor([70, 71, 72]))
    assert torch.equal(queue.read()[0], other.read()[0])
    assert sorted(other.read()[1].tolist()) == [5, 6, 7, 8, 9, 10, 11, 70, 71, 72]


def test_wrong_shapes_and_sizes_are_refused():
    with pytest.raises(UserError, match="method.queue_size=0"):
        NegativeQueue(0, 4)
    queue = NegativeQueue(6, 4)
    for k, ids in ((keys(3, d=5), torch.arange(3)), (keys(3), torch.arange(2)), (keys(3)[0], torch.arange(4))):
        with pytest.raises(ValueError, match="push needs"):
            queue.push(k, ids)
