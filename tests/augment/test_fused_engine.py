"""The fused engine against torchvision's tensor operations with the same parameters."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode, functional as TF

from twoview.augment import TwoViews, derive_seed, fused_engine
from twoview.augment.draws import Draws
from twoview.augment.operations import blend, gaussian_blur, luma, shift_hue, solarize
from twoview.augment.recipe import blur_kernel

KEY = (3, 4)
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def photos(n, height, width, channels=3, seed=0):
    """Smooth images with some noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, channels, height, width, generator=generator) * 255
    return (0.3 * noise + 0.7 * TF.gaussian_blur(noise, [9, 9])).to(torch.uint8)


def colors(m=32):
    """Colors with every tie between channels, black, white and gray."""
    views = torch.rand(m, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    views[0], views[1], views[2, 0] = 0, 0.5, views[2, 1]
    return torch.cat([views, (views * 3).round() / 3, views.round()])


def expected_view(image, draws, row, recipe, size):
    """A view by torchvision's functions, one after the other."""
    top, left, height, width = draws.boxes[row].tolist()
    mode = InterpolationMode(recipe.interpolation)
    view = TF.resized_crop(image / 255, top, left, height, width, [size, size], mode, antialias=recipe.antialias)
    view = view.clamp(0, 1)
    view = TF.hflip(view) if draws.flips[row] else view
    for operation in draws.orders[row].tolist() if draws.jittered[row] else []:
        if operation < 2 or len(image) == 3:
            view = ADJUST[operation](view, float(draws.factors[row, operation]))
    view = TF.rgb_to_grayscale(view, 3) if draws.grays[row] else view
    if draws.sigmas[row]:
        view = TF.gaussian_blur(view, [blur_kernel(size)] * 2, [float(draws.sigmas[row])] * 2)
    return TF.solarize(view, 0.5) if draws.solarized[row] else view


@pytest.mark.parametrize("block", [2**11, 2**17], ids=["in several blocks", "in one block"])
@pytest.mark.parametrize(
    ("size", "shape", "channels", "knobs"),
    [
        (32, (40, 40), 3, {}),
        (32, (24, 70), 3, {}),
        (32, (32, 32), 1, {"jitter": [0.4, 0.4, 0.0, 0.0]}),
        (112, (130, 100), 3, {}),
        (32, (40, 40), 3, {"interpolation": "bicubic"}),
        (32, (90, 70), 3, {"antialias": True}),
        (32, (40, 40), 3, {"view_b": {"interpolation": "bicubic", "blur_p": 0.1, "solarize_p": 0.5}}),
        (32, (40, 40), 3, {"jitter": [0.4, 0.0, 0.4, 0.0], "gray_p": 0.0}),
        (32, (40, 40), 3, {"jitter": [0.0, 0.0, 0.0, 0.3], "view_b": {"jitter": [0.0, 0.3, 0.0, 0.0]}}),
    ],
    ids=str,
)
def test_the_whole_chain_is_torchvisions(size, shape, channels, knobs, block, monkeypatch):
    monkeypatch.setattr(fused_engine, "CPU_BLOCK", block)
    images = photos(6 if size > 64 else 24, *shape, channels)
    views = TwoViews(size, channels, [0.5] * channels, [0.25] * channels, engine="fused", **knobs)
    found = torch.cat(views(images, key=KEY)) * 0.25 + 0.5
    n = len(images)
    draws = Draws.of(views.recipes, np.tile(shape, (n, 1)), derive_seed(KEY))
    rows = range(2 * n)
    if views.compilable:  # as on a GPU
        together = views.engine.make_together(images, draws, np.array(rows), views.mean, views.std)
        found = torch.stack([found, together * 0.25 + 0.5])
    expected = torch.stack([expected_view(images[r % n], draws, r, views.recipes[r // n], size) for r in rows])
    # Solarization is discontinuous at one half.
    near_half = (expected - 0.5).abs() < 1e-5
    found = torch.where(near_half, expected, found)
    assert_close(found, expected.expand_as(found), atol=1e-5, rtol=0)
    assert near_half.float().mean() < 0.01


@pytest.mark.parametrize("turns", [-0.5, -0.31, -0.01, 0.0, 0.2, 0.5])
def test_hue_is_torchvisions(turns):
    views = colors()
    shifted = shift_hue(views, torch.full((len(views), 1, 1), turns))
    assert_close(shifted, torch.stack([TF.adjust_hue(view, turns) for view in views]), atol=3e-6, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.9])
def test_brightness_contrast_and_saturation_are_torchvisions(factor):
    views = colors()
    f, zero = torch.full((len(views), 1, 1, 1), factor), torch.zeros(len(views), 1, 1, 1)
    for adjust, to_mean, to_luma in zip(ADJUST, (zero, 1 - f, zero), (zero, zero, 1 - f), strict=False):
        expected = torch.stack([adjust(view, factor) for view in views])
        assert_close(blend(views.clone(), f, to_mean, to_luma), expected, atol=1e-6, rtol=0)


def test_grayscale_blur_and_solarize_are_torchvisions():
    views = colors()
    assert_close(luma(views), TF.rgb_to_grayscale(views))
    sigmas = torch.linspace(0.1, 2.0, len(views))
    blurred = gaussian_blur(views, sigmas, 9, 2.0)
    expected = torch.stack([TF.gaussian_blur(v, [9, 9], [s, s]) for v, s in zip(views, sigmas.tolist(), strict=True)])
    assert_close(blurred, expected, atol=1e-6, rtol=0)
    small = torch.full((len(views),), 0.6)  # not all of the kernel is used
    expected = torch.stack([TF.gaussian_blur(view, [9, 9], [0.6, 0.6]) for view in views])
    assert_close(gaussian_blur(views, small, 9, 0.6), expected, atol=2e-6, rtol=0)
    assert_close(solarize(views), TF.solarize(views, 0.5))


def test_gray_and_white_stay_as_they_are_when_the_hue_is_shifted():
    for value in (0.0, 0.3, 1.0):
        views = torch.full((1, 3, 4, 4), value)
        assert torch.equal(shift_hue(views, torch.tensor([[[0.4]]])), views)


def test_crops_stay_inside_the_true_size_of_each_image():
    n, side = 40, 64
    sizes = torch.tensor([[64, 20], [20, 64], [9, 9], [64, 64], [1, 30]]).repeat(n // 5, 1)
    canvas = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    for image, (height, width) in zip(canvas, sizes.tolist(), strict=True):
        image[:, :height, :width] = 200
    for engine in ("fused", "fast", "kornia"):
        plain = dict.fromkeys(("jitter_p", "gray_p", "blur_p"), 0.0)
        views = TwoViews(32, 3, [0.0] * 3, [1.0] * 3, engine=engine, **plain)(canvas, key=KEY, sizes=sizes)
        for view in views:
            assert_close(view, torch.full_like(view, 200 / 255), atol=1e-5, rtol=0)


def test_full_canvases_with_and_without_sizes_are_the_same():
    images = photos(8, 40, 40)
    for engine in ("fused", "fast"):
        views = TwoViews(32, 3, [0.5] * 3, [0.5] * 3, engine=engine)
        with_sizes = views(images, key=KEY, sizes=torch.full((8, 2), 40))
        assert all(torch.equal(a, b) for a, b in zip(with_sizes, views(images, key=KEY), strict=True))


def test_views_are_channels_last():
    for view in TwoViews(32, 3, [0.5] * 3, [0.5] * 3, engine="fused")(photos(4, 40, 40)):
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_fast_is_near_the_exact_engine_and_equal_where_nothing_is_approximated():
    images = photos(64, 40, 40)
    smooth = TF.gaussian_blur(images, [9, 9], [4.0, 4.0])
    mild = {"jitter": (0.2, 0.2, 0.2, 0.05), "blur_p": 0.0}
    fast, exact = (TwoViews(32, 3, [0.0] * 3, [1.0] * 3, engine=e, **mild)(smooth, key=KEY) for e in ("fast", "fused"))
    for view, other in zip(fast, exact, strict=True):
        assert (view - other).abs().mean() < 0.02
    whole = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "jitter": (0.2, 0, 0, 0), "gray_p": 0.0, "blur_p": 0.0}
    fast, exact = (TwoViews(40, 3, [0.0] * 3, [1.0] * 3, engine=e, **whole)(images, key=KEY) for e in ("fast", "fused"))
    for view, other in zip(fast, exact, strict=True):
        assert_close(view, other, atol=1e-5, rtol=0)


def test_the_color_matrix_is_the_product_of_the_operations_without_clamping():
    """Brightness, contrast and saturation of the matrix are torchvision's as long as nothing is clamped."""
    images = photos(32, 40, 40) // 4 + 64  # from 64 to 127
    mild = {"jitter": (0.2, 0.2, 0.2, 0.0), "crop_scale": (1, 1), "crop_ratio": (1, 1), "blur_p": 0.0, "gray_p": 0.3}
    fast, exact = (TwoViews(40, 3, [0.0] * 3, [1.0] * 3, engine=e, **mild)(images, key=KEY) for e in ("fast", "fused"))
    for view, other in zip(fast, exact, strict=True):
        assert_close(view, other, atol=2e-4, rtol=0)  # torchvision's weights of the luma add up to 0.9999


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "shape", "channels", "block", "knobs"),
    [
        (32, (40, 40), 3, 2**17, {}),
        (32, (40, 40), 3, 2**12, {"view_b": {"blur_p": 0.1, "solarize_p": 0.5}}),
        (33, (47, 61), 3, 2**14, {"crop_scale": (0.02, 0.1)}),
        (33, (40, 40), 1, 2**14, {}),
        (96, (110, 90), 3, 2**17, {"blur_sigma": (0.1, 4.0)}),
        (192, (200, 220), 3, 2**17, {}),
        (192, (200, 200), 1, 2**17, {}),
        (32, (40, 40), 3, 2**14, {"interpolation": "bicubic", "antialias": True}),
    ],
    ids=str,
)
def test_views_of_pieces_are_those_of_the_batch_to_the_last_bit(
    size, shape, channels, block, knobs, threads, monkeypatch
):
    monkeypatch.setattr(fused_engine, "CPU_BLOCK", block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = photos(11 if size < 64 else 5, *shape, channels)
        sizes = torch.randint(20, min(shape), (len(images), 2), generator=torch.Generator().manual_seed(0))
        views = TwoViews(size, channels, [0.5] * channels, [0.25] * channels, engine="fused", **knobs)
        for given in (None, sizes):
            whole, draws = views(images, key=KEY, sizes=given), views.draw(images, KEY, given)
            for part in (slice(0, 1), slice(2, 5), slice(3, None), slice(None)):
                for piece, view in zip(views(images, draws=draws, part=part), whole, strict=True):
                    assert torch.equal(piece, view[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["fused", "fast"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_the_views_of_a_gpu_are_one_graph_for_the_compiler(engine, monkeypatch):
    monkeypatch.setattr(fused_engine, "GPU_BLOCK", 6 * 40 * 40)  # 12 views in two blocks
    views = TwoViews(32, 3, [0.5] * 3, [0.25] * 3, view_b={"solarize_p": 0.5}, engine=engine)
    images, rows = photos(6, 40, 40), np.arange(12)
    draws = views.draw(images, KEY)
    expected = views.engine.make_in_groups(images, draws, rows, views.mean, views.std)
    (whole,) = views.compilable
    whole.compile(backend="eager", fullgraph=True)
    found = views.engine.make_together(images, draws, rows, views.mean, views.std)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert ((found - expected).abs() > 1e-4).float().mean() < 1e-3  # except where a value is solarized or not


def test_only_crops_that_are_interpolated_together_can_be_compiled():
    assert TwoViews(32, 3, [0.5] * 3, [0.25] * 3, interpolation="bicubic").compilable == []
    assert TwoViews(32, 3, [0.5] * 3, [0.25] * 3, engine="kornia").compilable == []
