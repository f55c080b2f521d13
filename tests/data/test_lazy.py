import multiprocessing
import shutil

import pytest
import torch
from data.image_files import load, make_folder
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from twoview.data import LazyImages, TensorImages, from_dataset, in_order
from twoview.errors import UserError


def test_images_that_do_not_fit_in_memory_are_decoded_as_those_that_do(tmp_path):
    make_folder(tmp_path)
    held, streamed = load(tmp_path), load(tmp_path, memory=0)
    assert isinstance(held.pretrain, TensorImages)
    assert isinstance(streamed.pretrain, LazyImages)
    for a, b in ((held.pretrain, streamed.pretrain), (held.test, streamed.test)):
        whole = next(iter(in_order(b)))
        assert torch.equal(whole.pixels, a.pixels)
        assert torch.equal(whole.labels, a.labels)
        assert torch.equal(b.subset(torch.tensor([3, 1]))[[0, 1]].pixels, a.pixels[[3, 1]])
    assert held.mean_std == streamed.mean_std


def test_a_file_that_breaks_during_the_run_is_replaced(tmp_path, caplog):
    make_folder(tmp_path)
    data = load(tmp_path, memory=0, max_broken=0.1)
    victim = data.pretrain.source[int(data.pretrain.positions[2])]
    (tmp_path / victim).write_bytes(b"")
    assert torch.equal(data.pretrain[[2]].pixels, data.pretrain[[3]].pixels)
    assert victim in caplog.text
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"data.max_broken=0.1: 3 of 24 images can no longer be read"):
        data.pretrain[[0]]


def test_spawned_workers(tmp_path):
    make_folder(tmp_path)
    data = load(tmp_path, memory=0)
    loader = DataLoader(
        data.pretrain,
        batch_size=None,
        sampler=list(torch.arange(19).split(8)),
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    pixels = torch.cat([batch.pixels for batch in loader])
    assert torch.equal(pixels, next(iter(in_order(data.pretrain))).pixels)


@pytest.mark.parametrize("memory", [None, 0])
def test_loader_processes_check_many_images_as_one_process_does(tmp_path, memory):
    (tmp_path / "all").mkdir()
    for i in range(1100):
        Image.new("L", (12, 12), i % 251).save(tmp_path / "all" / f"{i:04d}.png")
    (tmp_path / "all" / "0500.png").write_bytes(b"")
    alone, helped = (load(tmp_path, num_workers=n, memory=memory, channels=1, image_size=8) for n in (0, 2))
    assert len(alone.pretrain) == len(helped.pretrain) == 1099
    assert alone.broken == helped.broken
    assert alone.mean_std == helped.mean_std
    assert alone.fingerprint == helped.fingerprint
    assert torch.equal(alone.pretrain[[0, 499, 500, 1098]].pixels, helped.pretrain[[0, 499, 500, 1098]].pixels)


def test_a_dataset_that_is_already_normalized_is_refused():
    class Normalized(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.randn(3, 20, 20), i

    with pytest.raises(UserError, match="the first item of Normalized is not an image, or tuple.*not normalized"):
        from_dataset(Normalized(), image_size=16)
