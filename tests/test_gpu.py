"""What only a CUDA device shows; ``pytest -m gpu`` runs these tests, which are skipped without one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from evaluation.helpers_evaluation import ALL_BUT_SGD, evaluate
from short_runs import CPU, pretrain, training_rows
from small_methods import ALL, make
from torch.testing import assert_close

from twoview import losses
from twoview.augment import TwoViews
from twoview.methods import MoCo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
ON_GPU = replace(CPU, accelerator="gpu", precision="auto", compile=False)


@pytest.mark.parametrize("engine", ["fused", "fast"])
@pytest.mark.parametrize("knobs", [{}, {"view_b": {"solarize_p": 0.2}}, {"interpolation": "bicubic"}], ids=str)
def test_views_are_those_of_a_cpu(engine, knobs):
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = TwoViews(32, 3, [0.5] * 3, [0.25] * 3, engine=engine, **knobs)
    expected = torch.cat(views(images, key=(0, 1)))
    found = torch.cat(views.to(CUDA)(images.to(CUDA), key=(0, 1))).cpu()
    assert ((found - expected).abs() > 1e-3).float().mean() < 1e-3  # except where a value is solarized or not


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_views_are_the_same():
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8, device=CUDA)
    views = TwoViews(32, 3, [0.5] * 3, [0.25] * 3).to(CUDA)
    expected = torch.cat(views(images, key=(0, 1)))
    for module in views.compilable:
        module.compile()
    assert_close(torch.cat(views(images, key=(0, 1))), expected, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("method", ALL)
def test_a_step_does_not_wait_for_the_device(method):
    method = make(method, **ALL[method]).to(CUDA)
    augment = TwoViews(32, 3, [0.5] * 3, [0.25] * 3).to(CUDA)
    pixels = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, device=CUDA)
    ids = torch.arange(8, device=CUDA)
    for i in range(4):
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # libraries are loaded in the first step
        try:
            with torch.autocast("cuda", torch.bfloat16):
                step = method(*augment(pixels, key=(0, i)), ids=ids + 8 * i, labels=ids % 3)
            step.loss.backward()
            method.after_update(0.5)
            method.after_batch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_losses_are_those_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    z_a, z_b, keys = (torch.randn(n, 16, generator=generator) for n in (12, 12, 40))
    for loss in (losses.nt_xent, partial(losses.info_nce, negatives=keys)):
        expected = loss(z_a, z_b, temperature=0.1)
        moved = partial(loss, negatives=keys.to(CUDA)) if isinstance(loss, partial) else loss
        assert_close(moved(z_a.to(CUDA), z_b.to(CUDA), temperature=0.1).cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_sync_replaces_every_batchnorm(method):
    built = make(method, **ALL[method], bn="sync")
    kinds = {type(m).__name__ for m in built.modules() if "BatchNorm" in type(m).__name__}
    assert kinds
    assert all("Sync" in kind for kind in kinds)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("compile_networks", [False, True])
def test_a_run_learns_on_a_gpu_and_its_features_are_those_of_a_cpu(tmp_path, compile_networks):
    method = partial(MoCo, queue_size=256)
    trainer = replace(ON_GPU, compile=compile_networks, max_epochs=6)
    report = pretrain(tmp_path / "run", trainer=trainer, settings=None, method=method)
    assert torch.cuda.get_device_name() in report["device"]
    found = [float(row["train/loss"]) for row in training_rows(tmp_path / "run")]
    assert found[-1] < found[0]
    report = evaluate(tmp_path / "gpu", tmp_path / "run")
    assert report["results"]["trained"].keys() >= set(ALL_BUT_SGD) - {"integrity"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        expected = evaluate(tmp_path / "cpu", tmp_path / "run")
    for name in ("linear", "knn"):
        tops = [r["results"]["trained"][name]["test_top1"] for r in (report, expected)]
        assert abs(tops[0] - tops[1]) < 0.02
