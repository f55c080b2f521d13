"""Shared images: planted copies are found, other images are not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from twoview.data import TensorImages, digits
from twoview.evaluation.integrity import shared_images, thumbnails


def scenes(n, size=32, seed=0):
    """Color images with the spectrum of photographs, amplitude ~ 1 / frequency, and smoother, weaker colors."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    amplitude = 1 / np.maximum(frequency, 1 / size)

    def drawn(channels, amplitude):
        noise = np.fft.fft2(generator.standard_normal((n, channels, size, size)))
        images = np.fft.ifft2(noise * amplitude).real
        return images / images.std((1, 2, 3), keepdims=True)

    images = drawn(1, amplitude) + 0.3 * drawn(3, amplitude**2)
    contrast = generator.uniform(20, 60, (n, 1, 1, 1))
    return torch.from_numpy((127 + contrast * images).clip(0, 255).astype(np.uint8))


def reencoded(pixels, quality=60):
    images = []
    for image in pixels:
        file = io.BytesIO()
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if len(image) == 1 else array).save(file, "JPEG", quality=quality)
        again = torch.from_numpy(np.asarray(Image.open(file)).copy())
        images.append(again[None] if len(image) == 1 else again.permute(2, 0, 1))
    return torch.stack(images)


def thumbnails_of(pixels):
    return thumbnails(TensorImages(pixels, torch.zeros(len(pixels), dtype=torch.long)))


@pytest.mark.parametrize("kind", ["scenes", "digits", "large scenes"])
def test_planted_duplicates_are_found_and_others_are_not(kind):
    if kind == "digits":
        data = digits(image_size=16)
        train, clean = data.train.pixels, data.test.pixels
    else:
        side = 32 if kind == "scenes" else 48
        train, clean = scenes(1000, side), scenes(2000, side, 1)
    copies = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:100]
    test = torch.cat([train[copies[:50]], reencoded(train[copies[50:]]), clean])
    found = {pair.test: pair for pair in shared_images(thumbnails_of(train), thumbnails_of(test))}
    assert [found[i].train for i in range(50)] == copies[:50].tolist()
    assert all(found[i].exact and found[i].difference == 0 for i in range(50))
    near = [i for i in range(50, 100) if i in found and found[i].train == copies[i]]
    assert len(near) >= 45
    assert not any(found[i].exact for i in near)
    assert len([i for i in found if i >= 100]) <= 5


def test_features_give_candidates_that_pixels_do_not():
    # All detail is finer than 8x8 pixels, at which these images are the same gray.
    signs = torch.randint(0, 2, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1
    train = (127 + 100 * torch.kron(signs, torch.tensor([[1, -1], [-1, 1]]))).to(torch.uint8)
    test, similar = reencoded(train[7:8], 95), torch.tensor([[3, 7]])
    assert shared_images(thumbnails_of(train), thumbnails_of(test)) == []
    assert [pair.train for pair in shared_images(thumbnails_of(train), thumbnails_of(test), similar)] == [7]


def test_an_image_with_many_copies_in_training_is_found():
    train = scenes(50)
    copies = torch.cat([reencoded(train[:1], quality) for quality in (95, 90, 85, 80, 75, 70)])
    found = shared_images(thumbnails_of(torch.cat([train[1:], copies])), thumbnails_of(train[:1]))
    assert [pair.train >= 49 for pair in found] == [True]


def test_of_equal_training_images_the_first_is_reported():
    train = scenes(5)
    train = torch.cat([train, train])
    assert [pair.train for pair in shared_images(thumbnails_of(train), thumbnails_of(train[8:9]))] == [3]


def test_flat_images_match_only_if_equal():
    flat = torch.arange(0, 250, 50, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    assert [pair.test for pair in shared_images(thumbnails_of(flat), thumbnails_of(flat + 1))] == []
    assert [pair.exact for pair in shared_images(thumbnails_of(flat), thumbnails_of(flat))] == [True] * 5
