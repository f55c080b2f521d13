import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZE, judge, pretrain, short_data
from PIL import Image
from torch import nn

import twoview
from twoview import runs
from twoview.augment import TwoViews
from twoview.backbones import build_arguments, create_backbone
from twoview.checkpoints import read_checkpoint
from twoview.data import ImageArrays, digits
from twoview.data.images import BatchOrder
from twoview.errors import UserError
from twoview.evaluate import Protocol, split_holdout
from twoview.methods import MoCo, SimCLR
from twoview.monitors import FeatureCheck
from twoview.optim import Optimization
from twoview.schedules import constant

CPU = runs.Training(max_epochs=2, accelerator="cpu", precision="32-true", log_every=3, check_every=1)


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [row["train/loss"] for row in metrics(folder) if row["train/loss"]]


def test_a_run_trains_and_reports(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert report == finished.report
    assert report["training"]["steps"] == 2 * (1347 // 128)
    assert report["training"]["images_seen"] == 20 * 128
    assert set(report["results"]) == {"trained", "random initialisation", "raw pixels"}
    assert report["results"]["trained"]["geometry"]["diagnosis"] == "healthy"
    for row in report["results"].values():
        assert 0.3 < row["linear"]["test_top1"] <= 1
        assert 0.3 < row["knn"]["test_top1"] <= 1
    assert report["figures"]["val/linear_top1"] == report["results"]["trained"]["linear"]["val_top1"]
    for key in ("seed", "protocol", "versions", "commit", "hardware", "command"):
        assert key in report


def test_everything_promised_is_logged(finished):
    columns = metrics(finished.folder)[0].keys()
    names = """
        loss chance contrastive_top1 positive_similarity negative_similarity alignment uniformity
        feature_std embedding_std lr images_per_second time_load time_augment time_train
    """
    for name in names.split():
        assert f"train/{name}" in columns
    assert {"val/knn_top1", "val/effective_rank", "val/effective_rank_rows"} <= columns
    row = next(row for row in metrics(finished.folder) if row["train/loss"])
    shares = [float(row[f"train/time_{part}"]) for part in ("load", "augment", "train")]
    assert sum(shares) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares)
    assert float(row["train/chance"]) == pytest.approx(math.log(2 * 128 - 1))


def test_the_learning_rate_follows_the_schedule(finished):
    rates = [float(row["train/lr"]) for row in metrics(finished.folder) if row["train/lr"]]
    assert max(rates) <= 3e-3
    assert rates[-1] < 0.2 * max(rates)
    assert rates[0] < max(rates)


def test_the_checkpoint_is_plain_and_loads_in_one_line(finished):
    content = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["twoview"]["mean"] == pytest.approx(short_data().mean_std[0])
    assert (finished.folder / "checkpoints" / "best.ckpt").exists()
    backbone, preprocess = twoview.load(finished.folder)
    assert not backbone.training
    assert backbone(preprocess(short_data().test.pixels[:3])).shape == (3, 96)
    assert backbone(preprocess(Image.new("RGB", (50, 50)))).shape == (1, 96)


def test_probing_a_checkpoint_gives_the_figures_of_the_run(finished, tmp_path):
    for name, task in (("linear", runs.linear_probe), ("knn", runs.knn)):
        report = task(finished.folder, short_data, Protocol(l2=(1e-2, 1e-3), k=(1, 5)), run_dir=tmp_path / name)
        assert report["results"]["trained"] == {name: finished.report["results"]["trained"][name]}
        assert report["results"]["random initialisation"] == {
            name: finished.report["results"]["random initialisation"][name]
        }
        assert json.loads((tmp_path / name / "report.json").read_text()) == report


def test_the_evaluation_leaves_the_backbone_untouched(finished):
    before = read_checkpoint(finished.folder)["state_dict"]
    backbone, preprocess = twoview.load(finished.folder)
    data = short_data()
    from twoview.evaluate import extract

    train, test = (extract(backbone, split, preprocess) for split in (data.train, data.test))
    judge(train, data.train.labels, test, data.test.labels, Protocol(l2=(1e-2,)), 0)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before["method.backbone." + key]), key


def test_the_same_seed_repeats_to_the_last_digit_and_another_does_not(finished, tmp_path):
    pretrain(tmp_path / "again", protocol=None)
    pretrain(tmp_path / "other", protocol=None, seed=1)
    assert losses(tmp_path / "again") == losses(finished.folder)
    assert losses(tmp_path / "other") != losses(finished.folder)


def test_shuffled_test_labels_change_nothing_but_the_final_test_figures(finished, tmp_path):
    def shuffled():
        data = short_data()
        data.test.labels = data.test.labels[torch.randperm(450, generator=torch.Generator().manual_seed(0))]
        return data

    report = pretrain(tmp_path, data=shuffled)
    assert losses(tmp_path) == losses(finished.folder)
    for name, row in report["results"].items():
        expected = finished.report["results"][name]
        assert row["geometry"] == expected["geometry"]
        for probe in ("linear", "knn"):
            assert row[probe]["test_top1"] < 0.3 < expected[probe]["test_top1"]
            for choice in {"val_top1", "l2", "converged", "k", "temperature"} & expected[probe].keys():
                assert row[probe][choice] == expected[probe][choice]


def test_time_becomes_a_number_of_steps(tmp_path, caplog):
    caplog.set_level("INFO")
    pretrain(tmp_path, training=replace(CPU, max_epochs=None, max_time="5s", check_every=0), protocol=None)
    content = read_checkpoint(tmp_path)
    assert content["twoview"]["total_steps"] == content["global_step"] < math.inf
    assert "the run has" in caplog.text
    rates = [float(row["train/lr"]) for row in metrics(tmp_path) if row["train/lr"]]
    assert rates[-1] < 0.1 * max(rates)


def test_accumulation_updates_once_for_several_batches(tmp_path):
    class Counting(SimCLR):
        updates = batches = 0

        def after_update(self, progress):
            Counting.updates += 1
            Counting.progress = progress

        def after_batch(self, step):
            Counting.batches += 1

    report = pretrain(tmp_path, method=Counting, training=replace(CPU, accumulate=2), protocol=None)
    assert (Counting.updates, Counting.batches) == (report["training"]["steps"], 20) == (10, 20)
    assert Counting.progress == 1


def test_collapse_is_said_in_plain_words(tmp_path, caplog):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.bias + 0 * x[:, :8]

    pretrain(tmp_path, head=lambda width: Constant(), protocol=None)
    assert caplog.text.count("The features are collapsing: all images get nearly the same") == 1


def test_a_collapsed_backbone_is_seen_through_the_batchnorm_of_the_head(tmp_path, caplog):
    class Collapsed(SimCLR):
        """A backbone whose features differ by a thousandth, which the head's BatchNorm spreads again."""

        def __init__(self, backbone, head):
            super().__init__(backbone, head)
            self.backbone.register_forward_hook(lambda module, inputs, features: 1 + 1e-3 * features)

    pretrain(tmp_path, method=Collapsed, protocol=None)
    rows = [row for row in metrics(tmp_path) if row["train/embedding_std"]]
    assert float(rows[-1]["train/embedding_std"]) > 0.5
    assert caplog.text.count("The features are collapsing") == 1


def test_divergence_is_said_in_a_sentence(tmp_path):
    sentence = (
        r"at step \d+ the loss is nan .* training has diverged; lower optimizer.lr .*no checkpoint had been written"
    )
    with pytest.raises(UserError, match=sentence):
        pretrain(tmp_path, optimization=Optimization(torch.optim.SGD, lr=1e20), schedule=constant)


class Breaks(MoCo):
    """A method whose loss is not a number for the batch that holds image 7."""

    def __init__(self, backbone, head):
        super().__init__(backbone, head, queue_size=200)

    def forward(self, view_a, view_b, ids=None, labels=None):
        bad = bool((ids == 7).any())
        step = super().forward(view_a * (float("nan") if bad else 1), view_b, ids, labels)
        assert bool(step.loss.isfinite()) != bad
        return step


def epoch_of(image):
    """Steps before the batch of an image, and its images, for every epoch of the two."""
    batches = list(BatchOrder(1347, 128, 0, lambda: 0)) + list(BatchOrder(1347, 128, 0, lambda: 10))
    return [(number, batch.tolist()) for number, batch in enumerate(batches) if image in batch]


def test_a_loss_that_is_no_number_ends_the_run_with_the_batch_and_the_last_good_checkpoint(tmp_path):
    (first, images), (second, later) = epoch_of(7)
    with pytest.raises(UserError, match=rf"at step {first} the loss is nan .*no checkpoint had been written"):
        pretrain(tmp_path, method=Breaks, protocol=None)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": first, "loss": "nan", "images": images}
    folder = tmp_path / "second"
    with pytest.raises(UserError, match=rf"at step {second} the loss is nan .*checkpoint is .*last.ckpt"):
        pretrain(folder, method=Breaks, protocol=None, training=replace(CPU, skip_nonfinite=1))
    content = read_checkpoint(folder)
    assert content["global_step"] == 10
    assert content["twoview"]["skipped"] == 1
    assert json.loads((folder / "nonfinite.jsonl").read_text().splitlines()[1])["images"] == later


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_left_out_leaves_no_trace(tmp_path, accumulate):
    training = replace(CPU, skip_nonfinite=2, accumulate=accumulate)
    report = pretrain(tmp_path, method=Breaks, protocol=None, training=training)
    assert report["training"]["batches_not_finite"] == 2
    state = read_checkpoint(tmp_path)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())  # statistics of BatchNorm and the queue too
    keys = state["method.queue.keys"]
    assert (keys.norm(dim=1) - 1).abs().max() < 1e-4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Spoils(SimCLR):
        def after_update(self, progress):
            if progress == 1:
                next(self.parameters()).data.fill_(float("inf"))

    training = replace(CPU, check_every=0)
    with pytest.raises(UserError, match="the weights are not finite"):
        pretrain(tmp_path, method=partial(Spoils, temperature=0.2), protocol=None, training=training)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_epochs_may_end_a_run_before_its_time(tmp_path):
    pretrain(tmp_path, training=replace(CPU, max_time="1h"), protocol=None)
    assert read_checkpoint(tmp_path)["twoview"]["total_steps"] == 20
    rates = [float(row["train/lr"]) for row in metrics(tmp_path) if row["train/lr"]]
    assert rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize("batch_size", [1, 0, 1348])
def test_batches_that_cannot_be_are_refused(tmp_path, batch_size):
    with pytest.raises(UserError, match=f"data.batch_size={batch_size}: digits has 1347 images"):
        pretrain(tmp_path, data=partial(short_data, batch_size=batch_size))


def test_checks_of_a_part_see_every_class():
    labels = torch.arange(10).repeat_interleave(100)
    images = ImageArrays(torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), labels)
    everything = torch.arange(len(images))
    check = FeatureCheck(images, everything, everything, 10, nn.Identity(), None, limit=200)
    for part in (check.bank, check.held_out):
        assert len(part) == 200
        assert len(part.labels.unique()) == 10


def test_the_effective_rank_of_a_check_is_that_of_all_classes():
    labels = torch.arange(8).repeat_interleave(300)  # class by class, as pictures of a folder lie
    images = ImageArrays((labels * 30).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels)

    class Level(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x[:, 0, 0, 0] / 30).long(), 8).float()

    check = FeatureCheck(images, torch.arange(2400), None, 8, nn.Identity(), None)
    shell = SimpleNamespace(method=SimpleNamespace(backbone=Level()), device="cpu")
    figures, _ = check._check(shell)
    assert figures["val/effective_rank"] == pytest.approx(8, rel=1e-3)


def test_the_probe_takes_sizes_from_the_checkpoint_and_refuses_others(finished, tmp_path):
    for knob in ({"image_size": 24}, {"channels": 3}):
        with pytest.raises(UserError, match=f"data.{next(iter(knob))}=.*: the checkpoint was made for"):
            runs.linear_probe(finished.folder, partial(digits, **knob), run_dir=tmp_path)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_any_network_is_rebuilt_from_its_checkpoint(name):
    network, _ = create_backbone(name, in_chans=1, image_size=32)
    rebuilt, _ = create_backbone(**build_arguments(network))
    rebuilt.load_state_dict(network.state_dict())


def test_a_healthy_run_does_not_warn(tmp_path, caplog):
    pretrain(tmp_path, protocol=None)
    assert "collapsing" not in caplog.text


def test_bf16_trains(tmp_path):
    report = pretrain(tmp_path, training=replace(CPU, precision="bf16-mixed"), protocol=None)
    assert report["training"]["precision"] == "bf16-mixed"
    assert all(math.isfinite(float(x)) for x in losses(tmp_path))


def test_a_preview_is_a_picture_of_all_views(tmp_path):
    path = runs.preview(short_data, partial(TwoViews, blur=0.0), images=5, pairs=2, run_dir=tmp_path)
    with Image.open(path) as picture:
        assert picture.size == (5 * SIZE, 5 * SIZE)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs=0"),
        ({"max_epochs": None}, "trainer.max_time=null"),
        ({"max_epochs": None, "max_time": "soon"}, "trainer.max_time=soon"),
        ({"max_epochs": None, "max_time": "-5m"}, "trainer.max_time=-5m"),
        ({"max_epochs": None, "max_time": "infh"}, "trainer.max_time=infh"),
        ({"max_time": ""}, "trainer.max_time="),
        ({"accelerator": "tpu"}, "trainer.accelerator=tpu"),
        ({"clip": "abc"}, "trainer.clip=abc"),
        ({"log_every": 0}, "trainer.log_every=0"),
    ],
)
def test_impossible_training_is_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        runs.Training(**knobs)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("01:30:05", 5405)])
def test_times_are_read(text, seconds):
    assert runs.Training(max_epochs=None, max_time=text).seconds == seconds


def test_fp16_on_a_cpu_is_refused(tmp_path):
    for precision in ("16-mixed", 16, "64-true"):
        with pytest.raises(UserError, match="trainer.precision="):
            pretrain(tmp_path, training=replace(CPU, precision=precision))


def test_a_missing_accelerator_is_said_in_a_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="trainer.accelerator=gpu"):
        pretrain(tmp_path, training=replace(CPU, accelerator="gpu"))


def test_images_that_do_not_fit_the_backbone_are_refused(tmp_path):
    with pytest.raises(UserError, match="images of 1x24x24 do not fit"):
        pretrain(tmp_path, data=partial(short_data, image_size=24))


def test_out_of_memory_is_a_sentence(tmp_path):
    script = f"""
import resource, sys, torch
from pathlib import Path
from twoview import cli, runs
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["twoview", "data=fake", "data.images=2048", "data.image_size=32", "data.batch_size=2048",
            "trainer.precision=32-true", "trainer.max_epochs=1", "hydra.run.dir={tmp_path}/run"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("twoview: data.batch_size=2048: out of memory; try a smaller data.batch_size")
    assert "Traceback" not in done.stderr


def moco(run_dir, **changes):
    knobs = changes.pop("knobs", {"queue_size": 300})
    return pretrain(run_dir, method=partial(MoCo, temperature=0.2, **knobs), **changes)


def test_the_first_batch_of_moco_fills_the_queue_and_takes_no_step(tmp_path):
    size = len(digits(image_size=SIZE).pretrain)
    one_batch = partial(short_data, batch_size=size)
    report = moco(tmp_path, data=one_batch, training=replace(CPU, max_epochs=1), protocol=None)
    assert report["training"]["batches_without_step"] == 1
    content = read_checkpoint(tmp_path)
    assert content["optimizer_states"][0]["state"] == {}  # neither moments nor weight decay
    assert int(content["state_dict"]["method.queue.filled"]) == 300


def test_a_run_with_a_queue_logs_it_and_says_when_it_is_large(tmp_path, caplog):
    with caplog.at_level("INFO"):
        report = moco(tmp_path, knobs={"queue_size": 5000})
    assert report["method"] == "MoCo"
    assert report["training"]["batches_without_step"] == 1
    assert "method.queue_size=5000: larger than the data set of 1347 images" in caplog.text
    rows = [row for row in metrics(tmp_path) if row["train/loss"]]
    assert 0 < float(rows[0]["train/queue_fill"]) < float(rows[-1]["train/queue_fill"]) < 1
    assert float(rows[-1]["train/queue_age"]) >= 5
    assert float(rows[-1]["train/queue_masked"]) > 0  # the second epoch meets the first one's keys
    assert 0 < float(rows[-1]["train/chance"]) < math.log(5001)
    backbone, _ = twoview.load(tmp_path)
    weights = read_checkpoint(tmp_path)["state_dict"]
    name = next(iter(backbone.state_dict()))
    assert torch.equal(backbone.state_dict()[name], weights[f"method.backbone.{name}"])
    assert not torch.equal(weights[f"method.backbone.{name}"], weights[f"method.key_encoder.copy.0.{name}"])


def test_the_key_encoder_moves_once_an_optimiser_step(tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr(MoCo, "after_update", lambda self, progress: moves.append(progress))
    training = replace(CPU, max_epochs=2, accumulate=2)
    report = moco(tmp_path, training=training, protocol=None)
    assert report["training"]["batches_without_step"] == 1  # a step with one batch that found no negatives is none
    assert len(moves) == report["training"]["steps"] == 9
    assert moves[-1] == 1.0


def test_labels_that_choices_are_made_on_are_kept_from_pretraining(tmp_path):
    seen = {}

    class Looks(SimCLR):
        def forward(self, view_a, view_b, ids=None, labels=None):
            seen.update(zip(ids.tolist(), labels.tolist(), strict=True))
            return super().forward(view_a, view_b, ids, labels)

    pretrain(tmp_path, method=Looks, training=replace(CPU, max_epochs=3), protocol=None)
    images = digits(image_size=SIZE)
    _, held = split_holdout(images.train.labels, 0.2, 0)
    held = set(held.tolist())
    assert len(seen) > 1300
    assert all((label == -1) == (i in held) for i, label in seen.items())
    assert all(label == images.train.labels[i] for i, label in seen.items() if i not in held)
