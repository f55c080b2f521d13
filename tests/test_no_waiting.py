"""No training step waits for the device: shown on a CUDA device without a GPU, see fake_device."""

import pytest
import torch
from fake_device import WaitError, bf16_autocast, fake_cuda
from small_methods import ALL, make

from twoview.augment import TwoViews
from twoview.methods import MoCo, SimCLR

N = 8
CASES = {
    **{method.__name__: (method, knobs) for method, knobs in ALL.items()},
    "MoCo symmetric": (MoCo, {"queue_size": 16, "symmetric": True}),
    "MoCo dclw": (MoCo, {"queue_size": 20, "variant": "dclw"}),
    "MoCo shuffled": (MoCo, {"queue_size": 16, "bn": "shuffle"}),
    "MoCo statistics": (MoCo, {"queue_size": 16, "statistics": "average"}),
    "SimCLR hard": (SimCLR, {"variant": "hard"}),
    "SimCLR labels": (SimCLR, {"same": "labels"}),
    "SimCLR split": (SimCLR, {"bn": "split"}),
}


def augmentation(engine="fused", cls=TwoViews):
    """Both views of images of different sizes, with every operation of a recipe."""
    return cls(32, 3, [0.5] * 3, [0.25] * 3, view_b={"solarize_p": 0.2, "blur_p": 0.1}, engine=engine)


def train_on_fake_device(method, augment=None, steps=4):
    """Steps of a method in bf16, without the backward pass, which needs a real device."""
    augment = augment or augmentation()
    sizes = torch.randint(20, 41, (N, 2), generator=torch.Generator().manual_seed(0))  # on the host
    with fake_cuda(method, augment):
        for i in range(steps):
            ids, labels = torch.arange(i * N, (i + 1) * N, device="cuda"), torch.arange(N, device="cuda") % 3
            pixels = torch.randint(0, 256, (N, 3, 40, 40), dtype=torch.uint8, device="cuda")
            with bf16_autocast():
                views = augment(pixels, key=(0, i), sizes=sizes if i % 2 else None)
                step = method(*views, ids=ids, labels=labels)
            assert all(view.device.type == "cuda" and view.dtype == torch.float32 for view in views)
            assert step.embeddings[0].dtype in (torch.bfloat16, torch.float32)
            assert step.loss.device.type == "cuda"
            assert step.loss.dtype == torch.float32
            method.after_update((i + 1) / steps)
            method.after_batch(step)


@pytest.mark.parametrize("name", CASES)
def test_no_method_waits_for_the_device(name):
    method, knobs = CASES[name]
    built = make(method, **knobs)
    train_on_fake_device(built)
    queue = getattr(built, "queue", getattr(built, "support_set", None))
    assert queue is None or len(queue) == len(queue.keys)  # it was read empty, partly filled and full


def planted(hook, wait):
    """MoCo with one statement that waits, in one of its functions."""

    class Planted(MoCo):
        pass

    def function(self, *args, **kwargs):
        wait(self.key_encoder.copy[1][0].weight)
        return getattr(MoCo, hook)(self, *args, **kwargs)

    setattr(Planted, hook, function)
    return make(Planted, queue_size=16)


@pytest.mark.parametrize("hook", ["encode", "loss", "after_update", "after_batch"])
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.arange(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.ones(x.shape),
        lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
        lambda x: torch.empty(x.shape).copy_(x),
    ],
    ids=["item", "bool", "mask", "nonzero", "cpu", "to", "tensor", "mixed", "scalar", "copy"],
)
def test_a_planted_wait_is_found(hook, wait):
    with pytest.raises(WaitError):
        train_on_fake_device(planted(hook, wait))


def test_the_fast_engine_does_not_wait_and_a_planted_wait_in_the_augmentation_is_found():
    train_on_fake_device(make(SimCLR), augmentation("fast"))

    class Planted(TwoViews):
        def forward(self, pixels, key=None, sizes=None):
            pixels.max().item()
            return super().forward(pixels, key, sizes)

    with pytest.raises(WaitError):
        train_on_fake_device(make(SimCLR), augmentation(cls=Planted))


def test_a_copy_that_does_not_block_is_accepted():
    train_on_fake_device(planted("loss", lambda x: torch.arange(3).to(x.device, non_blocking=True)))
